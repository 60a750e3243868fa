"""Equalization: rescaling between layer norms and the weights that take them in."""

import torch
from torch import nn

from ptq.graph import captured, linears_after_norms
from ptq.recipe import Recipe


@torch.no_grad()
def equalize(model: nn.Module, reference: nn.Module, batches, recipe: Recipe) -> None:
    """Shrink the widest channels that a layer norm puts out, and enlarge the weights behind them.

    The float network computes as before, and one scale for all channels loses less. This step comes
    before weights are rounded. Nagel et al., "Data-Free Quantization Through Weight Equalization
    and Bias Correction", ICCV 2019, section 4.1, with activations over `batches` in the place of
    the first layer's weights, as in Xiao et al., "SmoothQuant", ICML 2023, equation 4 with alpha
    1/2. Convolutions have no such place here: SiLU lets no factor through, and the projections
    without it also go into sums.
    """
    for norm_name, linear_names in linears_after_norms(reference, batches).items():
        norm = reference.get_submodule(norm_name)
        if norm.weight is None:  # nothing that a factor could go into
            continue
        linears = [reference.get_submodule(name) for name in linear_names]  # weights [out, d]
        outputs = captured(reference, norm, batches, "output")
        range_out = torch.stack([y.abs().flatten(0, -2).amax(0) for y in outputs]).amax(0)  # [d]
        range_in = torch.stack([linear.weight.abs().amax(0) for linear in linears]).amax(0)
        factor = (range_out / range_in).sqrt()
        factor = torch.where((range_out > 0) & (range_in > 0), factor, 1.0)
        for tensor in filter(torch.is_tensor, (norm.weight, norm.bias)):
            tensor /= factor
        for linear in linears:
            linear.weight *= factor
        for name in (norm_name, *linear_names):
            module = model.get_submodule(name)
            if isinstance(module, nn.Sequential):  # behind a quantizer
                module = module[1]
            module = getattr(module, "layer", module)  # of a quantized layer
            module.load_state_dict(reference.get_submodule(name).state_dict())
