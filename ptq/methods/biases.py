"""Bias correction: biases that make up for what quantization adds to a layer's mean output."""

import torch
from torch import Tensor, nn

from ptq.graph import captured, norms_after
from ptq.layers import QuantizedLayer
from ptq.recipe import Recipe


@torch.no_grad()
def correct_biases(model: nn.Module, reference: nn.Module, batches, recipe: Recipe) -> None:
    """Give each quantized layer the mean output per channel that it has in `reference`.

    Layers are taken in the order in which the network registers them. Convolutions before a batch
    norm whose statistics another step takes anew are left alone: the norm takes up their mean.
    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV
    2019, section 4.2, with the expectation taken over `batches` (its appendix D). A convolution
    without bias gets one.
    """
    done = set(norms_after(model, batches).values()) if recipe.norm_steps else set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and name not in done:
            expected = mean_output(reference, reference.get_submodule(name), batches)
            layer = module.layer
            shift = expected - mean_output(model, layer, batches)
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros_like(shift))
            layer.bias += shift


def mean_output(model: nn.Module, layer: nn.Module, batches) -> Tensor:
    """Return the mean output [C] per channel of a convolution or linear layer over `batches`."""
    total, n = 0.0, 0
    for output in captured(model, layer, batches, "output"):
        if isinstance(layer, nn.Conv2d):
            output = output.movedim(1, -1)
        output = output.flatten(0, -2)
        total, n = total + output.double().sum(0), n + len(output)
    return (total / n).to(output.dtype)
