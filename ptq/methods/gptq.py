"""GPTQ: rounding whose errors the weights still to be rounded make up for."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.graph import captured, hooked, never_ran
from ptq.layers import QuantizedLayer, located
from ptq.methods.nearest import layers_to_round, units, weight_scale
from ptq.recipe import Recipe

GPTQ_DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it


def gptq(model: nn.Module, reference: nn.Module, batches, recipe: Recipe) -> None:
    """Round column by column; the columns still to come make up for each rounding error.

    Frantar et al., "GPTQ", ICLR 2023, algorithm 1. Columns are taken in descending order of the
    Hessian's diagonal, the authors' act-order, and scales are fixed beforehand. Beyond the paper,
    the groups of a convolution are solved side by side, each with its own Hessian. A depthwise
    convolution is as many problems of nine weights as it has channels. The layers of a unit see
    inputs from before any of them is rounded.
    """
    for name in units(model, recipe.units):
        round_weights(model, hessians(model, name, batches))


def round_weights(model: nn.Module, hessians: Mapping[str, Tensor]) -> None:
    """Give each layer named the codes that go with the moments of its inputs, [groups, n, n]."""
    for name, hessian in hessians.items():
        layer = model.get_submodule(name)
        with located(name):
            scale = weight_scale(layer)
            layer.set_weight(gptq_codes(layer, scale, hessian), scale)


def hessians(model: nn.Module, unit: str, batches) -> dict[str, Tensor]:
    """Return the moments [groups, n, n] of what each layer to round in `unit` takes in, by name.

    They are summed over `batches`. ValueError for a layer that never runs, and for moments that are
    not finite.
    """
    sums = {}
    layers = layers_to_round(model.get_submodule(unit), unit)

    def add(name, inputs, kwargs, output):
        (x,) = *inputs, *kwargs.values()
        sums[name] = sums.get(name, 0.0) + input_moments(layers[name].layer, layers[name].input(x))

    with hooked(model, {name: name for name in layers}, add):
        for _ in captured(model, model.get_submodule(unit), batches, "output"):
            pass
    for name in layers.keys() - sums.keys():
        raise never_ran(name)
    for name, hessian in sums.items():
        if not hessian.isfinite().all():
            raise ValueError(f"the calibration data or what {name} makes of it is not finite")
    return sums


def input_moments(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """Sum u u^T over all places, [groups, n, n]; u [n] is what a filter of the group multiplies."""
    if isinstance(layer, nn.Linear):
        u = x.reshape(-1, x.shape[-1]).T[None]  # [1, n, places]
        return u @ u.mT
    total = 0.0
    for image in x:  # one by one: unfolding multiplies memory by the kernel's size
        u = F.unfold(
            image[None], layer.kernel_size, layer.dilation, layer.padding, layer.stride
        ).unflatten(1, (layer.groups, -1))[0]
        total = total + u @ u.mT
    return total


def gptq_codes(layer: QuantizedLayer, scale: Tensor, hessian: Tensor) -> Tensor:
    """Return codes, int32 of the weight's shape; `hessian` [groups, n, n] up to a factor."""
    weight, fmt = layer.layer.weight, layer.format
    groups, n = hessian.shape[:2]
    # Both [groups, filters, n].
    scales = fmt.spread(scale, weight).expand_as(weight)
    w, s = (t.reshape(groups, -1, n).clone() for t in (weight, scales))
    diagonal = hessian.diagonal(dim1=1, dim2=2)  # [groups, n]
    order = diagonal.argsort(dim=1, descending=True)
    back = order.argsort(dim=1)
    w, s = (t.gather(2, order[:, None].expand_as(t)) for t in (w, s))
    h = hessian.gather(1, order[:, :, None].expand_as(hessian))
    h = h.gather(2, order[:, None].expand_as(h))
    mean = diagonal.mean(1)
    damping = torch.where(mean > 0, GPTQ_DAMPING * mean, 1.0)  # inputs that are always 0
    h = h + damping[:, None, None] * torch.eye(n, device=h.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h.double()))
    upper = torch.linalg.cholesky(inverse, upper=True).float()  # [groups, n, n]
    codes = torch.empty_like(w)
    for j in range(n):
        codes[:, :, j] = (w[:, :, j] / s[:, :, j]).round().clamp(fmt.qmin, fmt.qmax)
        error = (w[:, :, j] - codes[:, :, j] * s[:, :, j]) / upper[:, j, j, None]
        w[:, :, j:] -= error[:, :, None] * upper[:, None, j, j:]
    codes = codes.gather(2, back[:, None].expand_as(codes))
    return codes.reshape(weight.shape).int()
