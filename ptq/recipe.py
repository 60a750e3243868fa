"""Recipes: what is done to which layers of a network, as data."""

import re
from dataclasses import dataclass, fields, is_dataclass, replace

from torch import Tensor

from ptq.formats import Float16, Format, PercentileUniform, Uniform


@dataclass(frozen=True)
class Rule:
    """`format` for the floating tensors of a state dict whose name matches `pattern` in full and
    that have at least `min_ndim` dimensions. They are written in it and read back."""

    pattern: str
    format: Format
    min_ndim: int = 0

    def applies(self, name: str, tensor: Tensor) -> bool:
        return (
            tensor.is_floating_point()
            and tensor.dim() >= self.min_ndim
            and re.fullmatch(self.pattern, name) is not None
        )


@dataclass(frozen=True)
class LayerSpec:
    """How the layers of a kind whose module name matches `pattern` in full are quantized. A format
    that is None leaves its tensor in float.

    `kind`: a name of ptq.layers.KINDS. "product" are convolutions, linear layers and attention
    cores, for which `input` holds for q, k and v, and without a sign for the softmax. "pointwise"
    are layer norms and SiLU, which compute in float on inputs of that format and keep their
    weights.
    """

    pattern: str
    weight: Uniform | None = None
    input: Uniform | None = None
    weight_observer: str = "mse"
    input_observer: str = "mse"
    kind: str = "product"

    def __post_init__(self):
        if self.kind == "pointwise" and self.weight is not None:
            raise ValueError("pointwise layers keep their weights in float")


@dataclass(frozen=True)
class Recipe:
    """A named way to quantize: either `rules` for tensors, or `layers` for layers, or `peer`.
    Of rules and of layers the first that applies decides.

    `equalize`: whether norms share their outputs' ranges with the weights that take them in.
    `rounding`: how codes of weights are chosen, a name of ptq.rounding.
    `units`: pattern of module names whose weights rounding takes together; layers outside of them
    are taken one by one.
    `norms`: how the statistics of batch norms follow quantized weights, a name of
    ptq.correction.NORMS.
    `correct_biases`: whether biases make up for the shift of each layer's mean output.
    `peer`: name of the engine that quantizes the network by its own methods instead.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    layers: tuple[LayerSpec, ...] = ()
    equalize: bool = False
    rounding: str = "nearest"
    units: str | None = None
    norms: str | None = None
    correct_biases: bool = False
    peer: str | None = None
    calibration_images: int = 0
    calibration_batch: int = 128

    def __post_init__(self):
        kinds = [kind for kind in ("rules", "layers", "peer") if getattr(self, kind)]
        rounds = self.rounding != "nearest"
        layered = rounds or self.correct_biases or self.equalize or self.norms
        if len(kinds) > 1 or (layered and kinds != ["layers"]):
            raise ValueError(f"recipe {self.name} mixes what does not go together: {kinds}")
        if self.units and not rounds:
            raise ValueError(f"recipe {self.name} has units, but rounds to nearest")

    def rule_for(self, name: str, tensor: Tensor) -> Rule | None:
        """The rule for a tensor of a state dict, None if it stays as it is."""
        return next((rule for rule in self.rules if rule.applies(name, tensor)), None)

    def format_of(self, name: str, tensor: Tensor) -> Format | None:
        rule = self.rule_for(name, tensor)
        return rule.format if rule else None

    def layer_spec(self, name: str, kind: str | None) -> LayerSpec | None:
        """The first entry for a layer of this name and kind, None if it stays as it is."""
        of_kind = (spec for spec in self.layers if spec.kind == kind)
        return next((spec for spec in of_kind if re.fullmatch(spec.pattern, name)), None)

    def to_nearest(self) -> "Recipe":
        """The same recipe with every weight at its nearest code: as fast to run, and soon made."""
        return replace(self, rounding="nearest", units=None)

    @property
    def quantizes_inputs(self) -> bool:
        return any(spec.input for spec in self.layers)

    @property
    def calibrates(self) -> bool:
        """Whether it needs batches to look at."""
        steps = self.norms or self.equalize or self.correct_biases
        return bool(steps or self.quantizes_inputs or self.rounding != "nearest")

    @property
    def simulated(self) -> bool:
        """Whether floats stand in for the recipe's low-bit numbers when it runs in torch."""
        return bool(self.rules or self.layers)

    @property
    def exportable(self) -> bool:
        """Whether QDQ ONNX can hold what it does to the network."""
        return not self.rules and all(
            spec.kind == "product"
            and (
                spec.input is None
                or spec.input.bits == 8
                or (spec.input.bits < 8 and spec.input.granularity == "tensor")
            )
            and (
                spec.weight is None
                or (spec.weight.bits <= 8 and spec.weight.granularity == "channel")
            )
            for spec in self.layers
        )

    @property
    def storable(self) -> bool:
        """Whether a file with every tensor in its format can be written."""
        return all(isinstance(rule.format, Float16) for rule in self.rules)

    def asdict(self) -> dict:
        """Plain values only; every dataclass names its type."""
        return _plain(self)

    @staticmethod
    def fromdict(plain: dict) -> "Recipe":
        """The inverse of `asdict`, also for fields added since, which get their default. ValueError
        for what it did not write."""
        try:
            rebuilt = _rebuilt(plain)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a recipe: {error}") from error
        if not isinstance(rebuilt, Recipe):
            raise ValueError(f"not a recipe: {plain}")
        return rebuilt


_TYPES = {t.__name__: t for t in (Recipe, Rule, LayerSpec, Float16, PercentileUniform, Uniform)}


def _plain(value):
    if is_dataclass(value):
        plain = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        return {"type": type(value).__name__} | plain
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _rebuilt(plain):
    if isinstance(plain, dict):
        values = {k: _rebuilt(v) for k, v in plain.items() if k != "type"}
        return _TYPES[plain["type"]](**values)
    return tuple(_rebuilt(v) for v in plain) if isinstance(plain, list) else plain
