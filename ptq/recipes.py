"""Recipes: which tensors and layers of a network get which format, and how it is done, as data.

A recipe can be printed, compared, saved beside its result (`asdict`) and read back (`fromdict`).
"""

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


# The four rows of the CIFAR-10 re-implementation, by its own protocol.
PROTOCOL = (
    Recipe("fp32"),
    Recipe("fp16", rules=(Rule(".*", Float16()),)),
    Recipe("int8-fx", peer="torch-fx", calibration_images=32 * 128),
    Recipe("int4-percentile", rules=(Rule(".*", PercentileUniform(), min_ndim=2),)),
)


def _weights(bits: int) -> Uniform:
    return Uniform(bits, granularity="channel")


# The first expansions and depthwise filters live on differences between neighbours of an image
# upsampled eightfold, which are smaller than a level of 8 bits: their inputs and the stem's stay in
# float.
_EARLY = r"stem\.conv|stages\.0\.0\.(expand|depthwise)\.conv|stages\.1\.0\.(expand|depthwise)\.conv"


def _layers(
    weight_bits: int, input_bits: int | None = None, attention_bits: int | None = None
) -> tuple[LayerSpec, ...]:
    """Everything with a product in it. Inputs of depthwise convolutions have a scale per channel,
    which their integer kernels can take in with that of the weights; all others one scale. Those of
    attention are symmetric: OpenVINO computes products of two activations in integers only so."""
    if input_bits is None:
        return (LayerSpec(".*", _weights(weight_bits)),)
    per_tensor = Uniform(input_bits, symmetric=False)
    per_channel = Uniform(input_bits, symmetric=False, granularity="channel", axis=1)
    return (
        LayerSpec(_EARLY, _weights(weight_bits)),
        LayerSpec(r".*\.depthwise\.conv", _weights(weight_bits), per_channel),
        LayerSpec(r".*\.core", input=Uniform(attention_bits or input_bits)),
        LayerSpec(".*", _weights(weight_bits), per_tensor),
    )


def _convolutions(weight_bits: int, input_bits: int) -> tuple[LayerSpec, ...]:
    """As above, but linear layers have 8-bit weights and inputs in float, and attention products
    stay in float."""
    early, depthwise, _, others = _layers(weight_bits, input_bits)
    linear = LayerSpec(r".*\.(qkv|proj|core|ffn\.\d)|classifier", _weights(8))
    return early, depthwise, linear, others


def _pointwise(pattern: str) -> LayerSpec:
    return LayerSpec(pattern, input=Uniform(8, symmetric=False), kind="pointwise")


def _changed(layers: tuple[LayerSpec, ...], **changes) -> tuple[LayerSpec, ...]:
    return tuple(replace(spec, **changes) for spec in layers)


# Weights of the layers that are few or small but feel it most stay at 8 bits.
_MIXED = (LayerSpec(r"stem\.conv|.*\.depthwise\.conv|classifier", _weights(8)), *_layers(4))
_BLOCKS = r"stages\.[01]\.\d|stages\.\d\.0|stages\.\d\.1\.layers\.\d"  # MV2, transformer layer
_CALIBRATED = {"calibration_images": 256, "calibration_batch": 32}
_REPAIRED = {"norms": "shift", **_CALIBRATED}
_GPTQ = {"rounding": "gptq", "units": _BLOCKS, **_REPAIRED}
# AdaRound makes up for norms as they are: shifting them afterwards would undo a part of that.
_LEARNT = {"rounding": "adaround", "units": _BLOCKS, **_CALIBRATED}

# Ours, most with a baseline of the same formats, rounded to nearest, nothing learnt or repaired.
OURS = (
    Recipe("w8a8", layers=_layers(8, 8), **_REPAIRED),
    Recipe("w8a8-nearest", layers=_layers(8, 8), **_CALIBRATED),
    # CPUs without VNNI first add two products in 16 bits, which full 8-bit factors overflow, in
    # attention as well.
    Recipe("w7a8", layers=_layers(7, 8, attention_bits=7), **_REPAIRED),
    # There integer convolutions beat float ones, but integer matrix products do not.
    Recipe("w7a8-convs", layers=_convolutions(7, 8), **_REPAIRED),
    Recipe("w6a6", layers=_layers(6, 6), **_GPTQ),
    Recipe("w6a6-nearest", layers=_layers(6, 6), **_CALIBRATED),
    Recipe("w4a8", layers=_layers(4, 8), **_GPTQ),
    Recipe("w4a8-nearest", layers=_layers(4, 8), **_CALIBRATED),
    Recipe("w4", layers=_layers(4), **_LEARNT),
    Recipe("w4-nearest", layers=_layers(4)),
    Recipe("w4-mixed", layers=_MIXED, **_GPTQ),
    Recipe("w4-mixed-nearest", layers=_MIXED),
)

# Ways to w4, and w8a8 with one thing changed.
_W4 = {"layers": _layers(4)}
_W8A8 = {"layers": _layers(8, 8), **_REPAIRED}
ABLATION = (
    Recipe("w4-minmax", layers=_changed(_layers(4), weight_observer="minmax")),
    Recipe("w4-replace", **_W4, **_CALIBRATED, norms="replace"),
    Recipe("w4-shift", **_W4, **_REPAIRED),
    Recipe("w4-biases", **_W4, **_REPAIRED, correct_biases=True),
    Recipe("w4-gptq", **_W4, **_GPTQ),
    Recipe("w4-adaround", **_W4, **_CALIBRATED, rounding="adaround"),
    Recipe("w4-adaround-shift", **_W4, **_LEARNT | {"norms": "shift"}),
    Recipe("w8a8-replace", **_W8A8 | {"norms": "replace"}),
    Recipe("w8a8-equalized", **_W8A8, equalize=True),
    Recipe("w8a8-minmax", **_W8A8 | {"layers": _changed(_layers(8, 8), input_observer="minmax")}),
    Recipe(
        "w8a8-percentile",
        **_W8A8 | {"layers": _changed(_layers(8, 8), input_observer="percentile")},
    ),
    Recipe("w8a8-kl", **_W8A8 | {"layers": _changed(_layers(8, 8), input_observer="kl")}),
    Recipe("w8a8-tensor", **_W8A8 | {"layers": _changed(_layers(8, 8), weight=Uniform(8))}),
    Recipe("w8a8-early", **_W8A8 | {"layers": _layers(8, 8)[1:]}),
    Recipe("w8a8-norms", **_W8A8 | {"layers": (*_layers(8, 8), _pointwise(r".*norm\d?"))}),
    Recipe("w8a8-silu", **_W8A8 | {"layers": (*_layers(8, 8), _pointwise(r".*\.act|.*\.ffn\.1"))}),
    Recipe("w8a7", layers=_layers(8, 7), **_REPAIRED),
)

# What people would otherwise use, by its own methods, on the same calibration images.
PEERS = (
    Recipe("int8-nncf", peer="nncf", **_CALIBRATED),
    Recipe("int8-ort", peer="ort-static", **_CALIBRATED),
    Recipe("int8-pt2e", peer="torch-pt2e", **_CALIBRATED),
)

RECIPES = {recipe.name: recipe for recipe in PROTOCOL + OURS + ABLATION + PEERS}
