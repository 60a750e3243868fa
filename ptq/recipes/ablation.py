"""w4 and w8a8 with one thing changed."""

from dataclasses import replace

from ptq.formats import Uniform
from ptq.recipe import LayerSpec, Recipe
from ptq.recipes.mobilevit import _CALIBRATED, _GPTQ, _LEARNT, _REPAIRED, _layers


def _pointwise(pattern: str) -> LayerSpec:
    return LayerSpec(pattern, input=Uniform(8, symmetric=False), kind="pointwise")


def _changed(layers: tuple[LayerSpec, ...], **changes) -> tuple[LayerSpec, ...]:
    return tuple(replace(spec, **changes) for spec in layers)


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
