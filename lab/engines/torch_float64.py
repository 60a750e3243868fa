"""torch in float64: what a recipe's simulation gives where float32 does not round its sums."""

import copy

import torch
from torch import Tensor

from lab.engines import Loaded
from ptq.packing import size_bytes

NAME = "torch-float64"


def version() -> str:
    return torch.__version__


def load(model, recipe, calibration, example) -> Loaded:
    """Return the network in float64, with the scales and weights that it has in float32."""
    exact = copy.deepcopy(model).double()

    def run(images: Tensor) -> Tensor:
        return exact(images.double())

    return Loaded(run, size_bytes(model, recipe))
