"""Our recipes, by the names of MobileViT's layers. The network's own names are in mobilevit.py."""

import re

from torch import nn

from ptq.formats import Uniform
from ptq.recipe import LayerSpec, Recipe


def weights(bits: int) -> Uniform:
    """Return the format of signed weights with a scale for each output channel."""
    return Uniform(bits, granularity="channel")


# Images are upsampled eightfold. The first expansions and depthwise filters live on differences
# between neighbouring pixels that are smaller than a level of 8 bits, so their inputs and the
# stem's stay in float.
EARLY = r"stem\.conv|stages\.0\.0\.(expand|depthwise)\.conv|stages\.1\.0\.(expand|depthwise)\.conv"
BLOCKS = r"stages\.[01]\.\d|stages\.\d\.0|stages\.\d\.1\.layers\.\d"  # MV2, transformer layer
CORES = r".*\.core"
DEPTHWISE = r".*\.depthwise\.conv"


def claims(model: nn.Module) -> bool:
    """Say whether a network has the layers that the recipes of this file name."""
    names = [name for name, _ in model.named_modules()]
    patterns = (EARLY, DEPTHWISE, BLOCKS, CORES)  # timm's MobileViT has all but one of them
    return all(any(re.fullmatch(pattern, name) for name in names) for pattern in patterns)


def layers(
    weight_bits: int, input_bits: int | None = None, attention_bits: int | None = None
) -> tuple[LayerSpec, ...]:
    """Return formats for every layer with a product in it.

    Inputs of depthwise convolutions have a scale per channel, which integer kernels can take in
    with the scales of the weights. All other inputs have one scale. Those of attention are
    symmetric, because OpenVINO computes products of two activations in integers only then.
    """
    if input_bits is None:
        return (LayerSpec(".*", weights(weight_bits)),)
    per_tensor = Uniform(input_bits, symmetric=False)
    per_channel = Uniform(input_bits, symmetric=False, granularity="channel", axis=1)
    return (
        LayerSpec(EARLY, weights(weight_bits)),
        LayerSpec(DEPTHWISE, weights(weight_bits), per_channel),
        LayerSpec(CORES, input=Uniform(attention_bits or input_bits)),
        LayerSpec(".*", weights(weight_bits), per_tensor),
    )


def _convolutions(weight_bits: int, input_bits: int) -> tuple[LayerSpec, ...]:
    """Return `layers`, but attention and inputs of linear layers in float, with 8-bit weights."""
    early, depthwise, _, others = layers(weight_bits, input_bits)
    linear = LayerSpec(r".*\.(qkv|proj|core|ffn\.\d)|classifier", weights(8))
    return early, depthwise, linear, others


# Weights of the layers that are few or small, but matter most, stay at 8 bits.
_MIXED = (LayerSpec(r"stem\.conv|.*\.depthwise\.conv|classifier", weights(8)), *layers(4))

CALIBRATED = {"calibration_images": 256, "calibration_batch": 32}
W8A8_STEPS = ("nearest", "shift_norms", "calibrate", "shift_norms")
GPTQ_INPUTS = {"steps": ("gptq", *W8A8_STEPS[1:]), "units": BLOCKS, **CALIBRATED}
_NEAREST_INPUTS = {"steps": ("nearest", "calibrate"), **CALIBRATED}

OURS = (
    Recipe("w8a8", "W8A8: to nearest, norms shifted", layers(8, 8), W8A8_STEPS, **CALIBRATED),
    Recipe("w8a8-nearest", "without norms shifted", layers(8, 8), **_NEAREST_INPUTS),
    # CPUs without VNNI first add two products in 16 bits, which full 8-bit factors overflow, in
    # attention as well.
    Recipe(
        "w7a8",
        "7-bit weights and attention, for CPUs without VNNI",
        layers(7, 8, attention_bits=7),
        W8A8_STEPS,
        **CALIBRATED,
    ),
    # There integer convolutions beat float ones, but integer matrix products do not.
    Recipe(
        "w7a8-convs",
        "the same, convolutions alone in integers",
        _convolutions(7, 8),
        W8A8_STEPS,
        **CALIBRATED,
    ),
    Recipe("w6a6", "GPTQ, norms shifted", layers(6, 6), **GPTQ_INPUTS),
    Recipe("w6a6-nearest", "W6A6: to nearest", layers(6, 6), **_NEAREST_INPUTS),
    Recipe("w4a8", "GPTQ, norms shifted", layers(4, 8), **GPTQ_INPUTS),
    # What a width for each layer (ptq.analysis.mixed) is compared with.
    Recipe("w5a8", "GPTQ, norms shifted", layers(5, 8), **GPTQ_INPUTS),
    Recipe("w6a8", "GPTQ, norms shifted", layers(6, 8), **GPTQ_INPUTS),
    Recipe("w4a8-nearest", "W4A8: to nearest", layers(4, 8), **_NEAREST_INPUTS),
    # AdaRound makes up for norms as they are. Shifting them afterwards would undo a part of that.
    Recipe("w4", "AdaRound by block", layers(4), ("adaround",), BLOCKS, **CALIBRATED),
    Recipe("w4-nearest", "ranges of least squared error", layers(4), ("nearest",)),
    Recipe(
        "w4-mixed", "GPTQ, norms shifted", _MIXED, ("gptq", "shift_norms"), BLOCKS, **CALIBRATED
    ),
    Recipe(
        "w4-mixed-nearest", "W4, but 8 bits in stem, depthwise, classifier", _MIXED, ("nearest",)
    ),
)
