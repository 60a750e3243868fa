"""Ranking-aware quantization, whole and in parts, to be measured on held-out images."""

from dataclasses import replace

from ptq.formats import Uniform
from ptq.recipe import LayerSpec, Recipe
from ptq.recipes.mobilevit import CORES, layers
from ptq.recipes.uniform import ABSMAX

# As many images as the paper calibrates on for CIFAR (section 4.1).
SEARCHED = {"calibration_images": 100, "calibration_batch": 25}
WIDTHS = {"w8a8": (8, 8), "w6a6": (6, 6), "w4a8": (4, 8)}  # bits of weights and of inputs
VARIANTS = {
    "similarity": "ranges by correlation of outputs",
    "ranking": "ranges by correlation and ranking of attention",
    "ranking_alone": "ranges by ranking of attention alone",
}


def _ours(width: str, step: str) -> Recipe:
    """Return our formats, with ranges that start from the extremes, as in the paper."""
    specs = tuple(
        replace(spec, weight_observer="minmax", input_observer="minmax")
        for spec in layers(*WIDTHS[width])
    )
    steps = (step, "shift_norms", "correct_biases")
    return Recipe(f"{width}-{step.replace('_', '-')}", VARIANTS[step], specs, steps, **SEARCHED)


def _published(width: str) -> Recipe:
    """Return the paper's formats: one symmetric scale a tensor, sums over pairs, biases corrected.

    There softmax and layer norms stay in float, as do inputs of pointwise layers here.
    """
    weight, input = (Uniform(bits) for bits in WIDTHS[width])
    specs = (
        # A softmax is never negative: up to its largest magnitude to either side wastes a bit.
        LayerSpec(CORES, input=input, input_observer="minmax"),
        LayerSpec(".*", weight, input, **ABSMAX),
    )
    steps = ("ranking_sum", "correct_biases")
    title = "the same as published: a scale a tensor, sum over pairs"
    return Recipe(f"{width}-ranking-published", title, specs, steps, **SEARCHED)


RANKING = (
    *(_ours(width, step) for width in WIDTHS for step in VARIANTS),
    *(_published(width) for width in WIDTHS),
)
