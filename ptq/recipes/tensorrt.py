"""For TensorRT: signed 8-bit codes without zero-points, and one scale for each input.

The layers nearest to the image, whose inputs need more than 8 bits, stay in float whole: TensorRT
takes codes for a weight only where the input has codes, too.
"""

from ptq.formats import Uniform
from ptq.recipe import LayerSpec, Recipe
from ptq.recipes.mobilevit import CALIBRATED, CORES, EARLY, W8A8_STEPS, weights

TENSORRT = (
    Recipe(
        "w8a8-tensorrt",
        "W8A8 for TensorRT: no zero-points, one scale an input",
        (
            LayerSpec(EARLY),
            LayerSpec(CORES, input=Uniform(8), attention=Uniform(8)),
            LayerSpec(".*", weights(8), Uniform(8)),
        ),
        W8A8_STEPS,
        **CALIBRATED,
    ),
)
