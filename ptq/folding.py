"""Folding batch norms into the convolutions before them: quantization prepares, export does it."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ptq.graph import norms_after
from ptq.layers import QuantizedLayer, located


@torch.no_grad()
def make_norms_positive(model: nn.Module, batches) -> None:
    """Turn each negative factor of a batch norm positive, with the sign of the channel before it.

    Folding the norm into quantized weights then keeps their codes. The network computes as before.
    """
    untie(model)
    for norm_name, conv_name in norms_after(model, batches).items():
        norm, conv = model.get_submodule(norm_name), model.get_submodule(conv_name)
        sign = torch.where(norm.weight < 0, -1.0, 1.0)
        conv.weight *= sign[:, None, None, None]
        if conv.bias is not None:
            conv.bias *= sign
        norm.running_mean *= sign
        norm.weight *= sign


@torch.no_grad()
def fold_norms(model: nn.Module, batches=None) -> None:
    """Fold each batch norm into the convolution before it.

    Of a quantized layer this changes scales and bias, not codes. ValueError for a norm with a
    negative factor there. `ptq.quantize` leaves none, unless it had no batches and torch.fx can't
    trace the network. `batches` as for `norms_after`.
    Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018, section 3.2.
    """
    untie(model)
    for norm_name, conv_name in norms_after(model, batches).items():
        norm, layer = model.get_submodule(norm_name), model.get_submodule(conv_name)
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()  # [C]
        conv = layer.layer if isinstance(layer, QuantizedLayer) else layer
        bias = 0 if conv.bias is None else conv.bias
        conv.bias = nn.Parameter(norm.bias + (bias - norm.running_mean) * factor)
        conv.weight *= factor[:, None, None, None]
        if isinstance(layer, QuantizedLayer) and layer.format is not None:
            with located(conv_name):
                _scale_rows(layer, factor)
        model.set_submodule(norm_name, nn.Identity())


def spread_scales(model: nn.Module) -> None:
    """Give weights of one scale a scale for each output channel, all the same, as norms need."""
    for module in model.modules():
        format = module.format if isinstance(module, QuantizedLayer) else None
        if format is not None and format.granularity == "tensor":
            module.format = replace(format, granularity="channel", axis=0)
            module.scale = module.scale.expand(len(module.codes)).clone()


def untie(model: nn.Module) -> None:
    """Give each layer a parameter of its own where several share one: each is rounded by itself."""
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                copied = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(module, name, copied)
            seen.add(id(parameter))


def _scale_rows(layer: QuantizedLayer, factor: Tensor) -> None:
    """Multiply output channel c of a quantized weight by factor[c]."""
    if layer.format.granularity != "channel" or layer.format.axis != 0:
        raise ValueError("a batch norm folds into weights with a scale per channel only")
    if (factor < 0).any():
        raise ValueError("a batch norm with a negative factor does not fold into positive scales")
    dead = factor == 0
    layer.codes = torch.where(dead[:, None, None, None], 0, layer.codes)
    layer.scale = torch.where(dead, 1.0, layer.scale * factor)
