"""Recipes: what is done to which layers of a network, as data.

A recipe can be printed, compared, saved beside its result (`asdict`) and read back (`fromdict`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import get_args, get_origin

from ptq.formats import Log2, PowerOfTwo, Uniform

# Of fields that came later: written only where they differ from their default, so that recipes that
# do not use them stay what they were when their rows were measured.
LATER = {"later": True}


@dataclass(frozen=True)
class LayerSpec:
    """How the layers of a kind whose module name matches `pattern` in full are quantized.

    A format that is None leaves its tensor in float. The observers are keys of
    ptq.observers.OBSERVERS: `weight_observer` chooses the ranges of weights, `input_observer` those
    of `input`, `attention` and `output`. Inputs in PowerOfTwo have an observer of their own.
    `kind` is a key of ptq.kinds.LAYERS: "product" are convolutions, linear layers and attention
    cores. For a core, `input` is the format of q, k and v, and `attention` that of the softmax: by
    default that of q without a sign.
    "pointwise" are layer norms and SiLU: they compute in float on inputs of that format and keep
    their weights. The kinds of ptq.methods.fq_vit, ibert and ivit compute in integers; of
    these, `output` is the format of what a layer norm puts out, and `published` asks for the
    arithmetic of the paper instead of ours.

    ValueError for values of other types, for what is no pattern, for formats that layers of this
    kind do not take, and for activations with a scale for each image.
    """

    pattern: str
    weight: Uniform | None = None
    input: Uniform | PowerOfTwo | None = None
    weight_observer: str = "mse"
    input_observer: str = "mse"
    kind: str = "product"
    attention: Uniform | Log2 | None = field(default=None, metadata=LATER)
    output: Uniform | None = field(default=None, metadata=LATER)
    published: bool = field(default=False, metadata=LATER)

    def __post_init__(self):
        _require_types(self, "an entry")
        _require_pattern(self.pattern)
        if self.kind != "product" and self.weight is not None:
            raise ValueError(f"{self.kind} layers keep their weights in float")
        for format in (self.input, self.attention, self.output):
            if getattr(format, "granularity", "tensor") == "channel" and format.axis == 0:
                raise ValueError(
                    "axis 0 of activations counts images, which would get a scale each: channels "
                    "are at axis=1 or axis=-1"
                )
        if self.attention and not self.input:
            raise ValueError("a softmax is quantized with q, k and v: the entry has no input")
        if self.kind in ("product", "pointwise"):
            if isinstance(self.input, PowerOfTwo):
                raise ValueError(f"{self.kind} layers take inputs of a uniform format")
            integer = self.output or self.published or isinstance(self.attention, Log2)
            if integer or (self.attention and self.kind == "pointwise"):
                raise ValueError(f"{self.kind} layers compute in float")


def _require_types(made, what: str) -> None:
    for f in fields(made):
        if not _fits(getattr(made, f.name), f.type):
            raise ValueError(f"{f.name} of {what} can't be {getattr(made, f.name)!r:.60}")


def _require_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern[:40]!r} is not a pattern: {error}") from error


def by_names(specs: Mapping[str, LayerSpec]) -> tuple[LayerSpec, ...]:
    """Return entries for {name of a layer: how it is quantized}, one for those quantized alike."""
    names = {}
    for name, spec in specs.items():
        names.setdefault(replace(spec, pattern=""), []).append(re.escape(name))
    return tuple(replace(spec, pattern="|".join(alike)) for spec, alike in names.items())


@dataclass(frozen=True)
class Recipe:
    """A named way to quantize a network: `layers` and `steps`, or `peer`, or none (float).

    `name`: how rows, files and messages call it.
    `title`: what it does, in a few words, for tables. Two recipes may differ in it and be equal.
    `layers`: the formats; the first entry that applies to a layer decides.
    `steps`: names of ptq.methods.STEPS in the order in which they are taken. By default weights are
        rounded to nearest, and inputs calibrated where some are quantized.
    `units`: pattern of names of modules whose weights are rounded together by GPTQ and AdaRound.
        Layers outside of them are rounded one by one.
    `peer`: name of an engine that quantizes the network by its own methods instead.
    `calibration_images`: how many training images quantize.py calibrates on, and
        `calibration_batch` at a time. `ptq.quantize` takes the batches that it is given.

    ValueError for values of other types, for what is no pattern, and for parts that do not go
    together: steps or units without what they work on, or a peer with layers.
    """

    name: str
    title: str = field(default="", compare=False)
    layers: tuple[LayerSpec, ...] = ()
    steps: tuple[str, ...] = ()
    units: str | None = None
    peer: str | None = None
    calibration_images: int = 0
    calibration_batch: int = 128

    def __post_init__(self):
        for f in fields(self):
            if isinstance(getattr(self, f.name), list):
                object.__setattr__(self, f.name, tuple(getattr(self, f.name)))
        _require_types(self, "a recipe")
        if self.calibration_images < 0 or self.calibration_batch < 1:
            raise ValueError(f"recipe {self.name} calibrates on a number of images, in batches")
        if self.units:
            _require_pattern(self.units)
        if self.peer and (self.layers or self.steps):
            raise ValueError(f"recipe {self.name} has a peer, which takes no layers and no steps")
        if self.steps and not self.layers:
            raise ValueError(f"recipe {self.name} has steps, but no layers")
        if self.layers and not self.steps:
            simplest = ("nearest", "calibrate") if self.quantizes_inputs else ("nearest",)
            object.__setattr__(self, "steps", simplest)
        if self.units and not self.calibrates:
            raise ValueError(f"recipe {self.name} has units, but rounds to nearest")

    def layer_spec(self, name: str, kinds: set[str]) -> LayerSpec | None:
        """Return the first entry for a layer of this name and these kinds; None leaves it alone."""
        of_kind = (spec for spec in self.layers if spec.kind in kinds)
        return next((spec for spec in of_kind if re.fullmatch(spec.pattern, name)), None)

    @property
    def quantizes_inputs(self) -> bool:
        return any(spec.input for spec in self.layers)

    @property
    def norm_steps(self) -> tuple[str, ...]:
        """Return the steps that take statistics of norms: those whose names end in `norms`."""
        return tuple(step for step in self.steps if step.endswith("norms"))

    @property
    def calibrates(self) -> bool:
        """Say whether a step needs images to look at: all but rounding to nearest do."""
        return any(step != "nearest" for step in self.steps)

    @property
    def exportable(self) -> bool:
        """Say whether QDQ ONNX can hold what it does to the network."""
        return all(
            spec.kind == "product"
            and (spec.weight is None or exportable_weight(spec.weight))
            and all(exportable_input(fmt) for fmt in (spec.input, spec.attention) if fmt)
            for spec in self.layers
        )

    def asdict(self) -> dict:
        """Return plain values only; every dataclass names its type."""
        return _plain(self)

    @staticmethod
    def fromdict(plain: dict) -> "Recipe":
        """Undo `asdict`; fields added since get their defaults.

        ValueError for anything that `asdict` did not write.
        """
        try:
            rebuilt = _rebuild(plain)
        except ValueError as error:
            raise ValueError(f"not a recipe: {error}") from error
        if not isinstance(rebuilt, Recipe):
            raise ValueError(f"not a recipe: {type(plain).__name__}")
        return rebuilt


def exportable_weight(format: Uniform) -> bool:
    """Say whether QDQ ONNX can hold weights of a format."""
    plain = type(format) is Uniform and not format.group_size
    return plain and format.bits <= 8 and format.axis == 0


def exportable_input(format: Uniform) -> bool:
    """Say whether QDQ ONNX can hold activations of a format."""
    if type(format) is not Uniform:
        return False
    return format.bits == 8 or (format.bits < 8 and format.granularity == "tensor")


_TYPES = {t.__name__: t for t in (Recipe, LayerSpec, Uniform, PowerOfTwo, Log2)}


def _plain(value):
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if not is_dataclass(value):
        return value
    plain = {"type": type(value).__name__}
    for f in fields(value):
        if f.metadata != LATER or getattr(value, f.name) != f.default:
            plain[f.name] = _plain(getattr(value, f.name))
    return plain


def _rebuild(plain):
    """Return a recipe or a part of one from the plain values of `asdict`; ValueError for others."""
    if isinstance(plain, list):
        return tuple(_rebuild(v) for v in plain)
    if not isinstance(plain, dict):
        return plain
    kind = _TYPES.get(plain.get("type")) if isinstance(plain.get("type"), str) else None
    if kind is None:
        raise ValueError(f"there is no type {str(plain.get('type'))[:40]!r}")
    types = {f.name: f.type for f in fields(kind)}
    values = {k: _rebuild(v) for k, v in plain.items() if k != "type"}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"a {plain['type']} has no {name[:40]}")
        if not _fits(value, types[name]):
            raise ValueError(f"{name} of a {plain['type']} can't be {str(value)[:40]!r}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{plain['type']}: {error}") from error


def _fits(value, annotation) -> bool:
    """Say whether a value has the type of a dataclass's field."""
    parts = get_args(annotation)
    if get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(_fits(v, parts[0]) for v in value)
    if parts:  # a union
        return any(_fits(value, part) for part in parts)
    return isinstance(value, annotation) and isinstance(value, bool) == (annotation is bool)
