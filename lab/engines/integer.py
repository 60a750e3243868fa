"""Integers alone, from the codes of images to those of logits: exact, and not a fast kernel."""

import torch
from torch import Tensor

import ptq
from lab.cli import BadInput
from lab.engines import Loaded
from ptq.packing import size_bytes

NAME = "integer"


def version() -> str:
    return torch.__version__


def load(model, recipe, calibration, example) -> Loaded:
    """Return `model` as a network of integers.

    BadInput if a layer has no integer form, or none for images of the example's size.
    """
    try:
        network = ptq.integer_network(model)
        network(network.encode(example))
    except ValueError as error:
        raise BadInput(str(error)) from error

    def run(images: Tensor) -> Tensor:
        # One by one: what 64-bit codes of a single image take fits caches, a batch's does not.
        logits = [network(network.encode(image)) for image in images.split(1)]
        return network.decode(torch.cat(logits))

    return Loaded(run, size_bytes(model, recipe))
