"""Rescaling between layers, and biases that make up for shifted means."""

import torch
from torch import Tensor, nn

from ptq.graph import captured, linears_after_norms, norms_after
from ptq.layers import QuantizedLayer


@torch.no_grad()
def make_norms_positive(model: nn.Module) -> None:
    """Turn each negative factor of a batch norm positive by turning the sign of the convolution's
    channel before it, so that folding the norm into quantized weights keeps their codes."""
    for norm_name, conv_name in norms_after(model).items():
        norm, conv = model.get_submodule(norm_name), model.get_submodule(conv_name)
        sign = torch.where(norm.weight < 0, -1.0, 1.0)
        conv.weight *= sign[:, None, None, None]
        if conv.bias is not None:
            conv.bias *= sign
        norm.running_mean *= sign
        norm.weight *= sign


@torch.no_grad()
def equalize(model: nn.Module, batches) -> None:
    """Shrink the channels that a layer norm puts out with the widest range, and multiply the
    weights that take them in instead: the float network computes as before, and a scale per tensor
    loses less.

    Nagel et al., ICCV 2019 (see `correct_biases`), section 4.1, with activations over `batches` in
    the place of the first layer's weights, as in Xiao et al., "SmoothQuant", ICML 2023, equation 4
    with alpha 1/2. Convolutions have no such place here: SiLU lets no factor through, and the
    projections without it also go into sums.
    """
    for norm_name, linear_names in linears_after_norms(model).items():
        norm = model.get_submodule(norm_name)
        weights = [model.get_submodule(name).weight for name in linear_names]  # each [out, d]
        outputs = captured(model, norm, batches, "output")
        range_out = torch.stack([y.abs().flatten(0, -2).amax(0) for y in outputs]).amax(0)  # [d]
        range_in = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
        factor = (range_out / range_in).sqrt()
        factor = torch.where((range_out > 0) & (range_in > 0), factor, 1.0)
        for tensor in (norm.weight, norm.bias):
            tensor /= factor
        for weight in weights:
            weight *= factor


@torch.no_grad()
def correct_biases(model: nn.Module, reference: nn.Module, batches, done=()) -> None:
    """Give each quantized layer but those named in `done`, from input to output, the mean output
    per channel that it has in `reference`. A layer is done whose mean a norm has taken in.

    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV
    2019, section 4.2, with the expectation taken over `batches` (its appendix D). A convolution
    without bias gets one.
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and name not in done:
            wanted = mean_output(reference, reference.get_submodule(name), batches)
            layer = module.layer
            shift = wanted - mean_output(model, layer, batches)
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros_like(shift))
            layer.bias += shift


def mean_output(model: nn.Module, layer: nn.Module, batches) -> Tensor:
    """Mean output [C] per channel of a convolution or linear layer of `model` over `batches`."""
    total, n = 0.0, 0
    for output in captured(model, layer, batches, "output"):
        if isinstance(layer, nn.Conv2d):
            output = output.movedim(1, -1)
        output = output.flatten(0, -2)
        total, n = total + output.double().sum(0), n + len(output)
    return (total / n).float()
