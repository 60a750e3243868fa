"""torch, operator by operator, in float32: the reference, and the stage on which quantized values
are simulated."""

import torch

import ptq
from engines import Loaded
from ptq.packing import stored_state

NAME = "torch-eager"


def version() -> str:
    return torch.__version__


def load(model, recipe, calibration) -> Loaded:
    """The network with the recipe's values, computed in float32."""
    quantized = ptq.quantize(model, recipe).to(memory_format=torch.channels_last)
    return Loaded(quantized, stored_state(quantized, recipe))
