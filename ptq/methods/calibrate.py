"""Ranges of activations from one pass over the calibration images."""

from torch import nn

from ptq.layers import Quantizer, located
from ptq.recipe import Recipe


def calibrate(model: nn.Module, reference: nn.Module, batches, recipe: Recipe) -> None:
    """Give every quantizer of an activation its scale and zero-point."""
    quantizers = {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}
    if not quantizers:
        return
    for quantizer in quantizers.values():
        quantizer.observe()
    for x, *_ in batches:
        model(x)
    for name, quantizer in quantizers.items():
        with located(name):
            quantizer.freeze()
