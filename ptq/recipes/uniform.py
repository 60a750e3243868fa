"""The plainest baseline: uniform levels up to the largest magnitude, rounded to nearest.

s = max|x| / (2**(b-1) - 1), codes in [-2**(b-1), 2**(b-1) - 1], for the weights and, in 8 bits and
one scale a tensor, the inputs of convolutions and linear layers. Attention products, which have no
weights, stay in float.
"""

from ptq.formats import Uniform
from ptq.recipe import LayerSpec, Recipe
from ptq.recipes.mobilevit import CALIBRATED, CORES

ABSMAX = {"weight_observer": "absmax", "input_observer": "absmax"}


def _uniform(bits: int, granularity: str) -> Recipe:
    name = f"uniform{bits}" + ("" if granularity == "channel" else "-tensor")
    layers = (
        LayerSpec(CORES),
        LayerSpec(".*", Uniform(bits, granularity=granularity), Uniform(8), **ABSMAX),
    )
    title = f"W{bits}A8 up to the largest magnitude, weights by {granularity}"
    return Recipe(name, title, layers, ("nearest", "calibrate"), **CALIBRATED)


UNIFORM = tuple(_uniform(bits, by) for bits in (8, 6, 4) for by in ("channel", "tensor"))
