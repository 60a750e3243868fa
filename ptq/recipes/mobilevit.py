"""Recipes: which tensors and layers of a network get which format, and how it is done, as data.

A recipe can be printed, compared, saved beside its result (`asdict`) and read back (`fromdict`).
"""

from ptq.formats import Uniform
from ptq.recipe import LayerSpec, Recipe


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
