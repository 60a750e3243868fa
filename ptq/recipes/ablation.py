"""w4 and w8a8 with one thing changed, to be measured on held-out images."""

from dataclasses import replace

from ptq.formats import Uniform
from ptq.recipe import LayerSpec, Recipe
from ptq.recipes.fq_vit import ACTIVATIONS, NORMS
from ptq.recipes.mobilevit import BLOCKS, CALIBRATED, CORES, W8A8_STEPS, layers, weights


def _w4(name: str, title: str, *steps: str, units: str | None = None) -> Recipe:
    return Recipe(f"w4-{name}", title, layers(4), steps, units, **CALIBRATED)


def _w8a8(name: str, title: str, specs=(), steps=W8A8_STEPS, **changes) -> Recipe:
    specs = tuple(replace(spec, **changes) for spec in specs or layers(8, 8))
    return Recipe(f"w8a8-{name}", title, specs, steps, **CALIBRATED)


def _pointwise(pattern: str, bits: int = 8) -> LayerSpec:
    return LayerSpec(pattern, input=Uniform(bits, symmetric=False), kind="pointwise")


def _fx(name, title, *kept: LayerSpec, bits=7, silu=True, steps=("nearest", "calibrate")) -> Recipe:
    """Return a recipe for what torch FX rounds: inputs of all layers, and of SiLU.

    Nothing within attention is rounded. Layers of `kept` keep their inputs in float.
    """
    every = LayerSpec(".*", weights(8), Uniform(bits, symmetric=False))
    specs = (*kept, LayerSpec(CORES), every, *([_pointwise(ACTIVATIONS, bits)] if silu else []))
    return Recipe(f"as-fx{name}", title, specs, steps, **CALIBRATED)


ABLATION = (
    Recipe(
        "w4-minmax",
        "W4: to nearest, ranges up to the extremes",
        (replace(layers(4)[0], weight_observer="minmax"),),
        ("nearest",),
    ),
    _w4("replace", "with statistics of norms replaced", "nearest", "replace_norms"),
    _w4("shift", "with statistics of norms shifted", "nearest", "shift_norms"),
    _w4("biases", "with biases corrected, too", "nearest", "shift_norms", "correct_biases"),
    _w4("gptq", "GPTQ, norms shifted", "gptq", "shift_norms", units=BLOCKS),
    _w4("adaround", "AdaRound by layer", "adaround"),
    _w4(
        "adaround-shift",
        "AdaRound by block, norms shifted",
        "adaround",
        "shift_norms",
        units=BLOCKS,
    ),
    _w8a8(
        "replace",
        "with statistics of norms replaced",
        steps=("nearest", "replace_norms", "calibrate", "replace_norms"),
    ),
    _w8a8("equalized", "with layer norms equalized", steps=("equalize", *W8A8_STEPS)),
    _w8a8("minmax", "with activations from extreme to extreme", input_observer="minmax"),
    _w8a8(
        "percentile", "with activations up to the 99.99th percentile", input_observer="percentile"
    ),
    _w8a8("kl", "with activations of least KL divergence", input_observer="kl"),
    _w8a8("tensor", "with one scale per weight tensor", weight=Uniform(8)),
    _w8a8("early", "with 8-bit inputs of the first five layers, too", layers(8, 8)[1:]),
    _w8a8("norms", "with 8-bit inputs of layer norms, too", (*layers(8, 8), _pointwise(NORMS))),
    _w8a8("silu", "with 8-bit inputs of SiLU, too", (*layers(8, 8), _pointwise(ACTIVATIONS))),
    Recipe("w8a7", "with 7 bits for activations", layers(8, 7), W8A8_STEPS, **CALIBRATED),
    _fx("", "what torch FX rounds, in 7 bits"),
    _fx("-8bit", "in 8 bits", bits=8),
    _fx("-silu", "without the inputs of SiLU", silu=False),
    _fx("-early", "without the first five layers", layers(8, 8)[0]),
    _fx("-shift", "with norms shifted", steps=W8A8_STEPS),
)
