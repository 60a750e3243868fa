"""torch, operator by operator, in float32: the reference, which simulates quantized values, too."""

import torch

from lab.engines import Loaded
from ptq.packing import size_bytes

NAME = "torch-eager"


def version() -> str:
    return torch.__version__


def load(model, recipe, calibration, example) -> Loaded:
    """Return the network as it stands, with the values that the recipe gave it."""
    return Loaded(model, size_bytes(model, recipe))
