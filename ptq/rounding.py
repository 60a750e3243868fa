"""How the codes of weights are chosen: to nearest, by GPTQ, by AdaRound, by block reconstruction.

A method is a function (model, reference, batches, recipe) -> None that gives every
`QuantizedLayer` of `model` with a weight format its codes, from input to output; `reference` is
the float network.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ptq.correction import NEVER_RAN, captured
from ptq.layers import QuantizedLayer
from ptq.observers import OBSERVERS
from ptq.recipes import Recipe


def layers_to_round(module: nn.Module) -> dict[str, QuantizedLayer]:
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, QuantizedLayer) and layer.format is not None
    }


def weight_scale(layer: QuantizedLayer) -> Tensor:
    """Scale [G] that the layer's observer chooses for its float weight."""
    observer = OBSERVERS[layer.weight_observer](layer.format)
    observer.update(layer.layer.weight)
    scale, _ = layer.format.grid(*observer.range())
    return scale


def nearest(model: nn.Module, reference: nn.Module, batches, recipe: Recipe) -> None:
    """Each weight to its nearest level."""
    for layer in layers_to_round(model).values():
        scale = weight_scale(layer)
        layer.set_weight(layer.format.encode(layer.layer.weight, scale), scale)


GPTQ_DAMPING = 0.01  # of the mean of the Hessian's diagonal, added to it


def gptq(model: nn.Module, reference: nn.Module, batches, recipe: Recipe) -> None:
    """Column by column, each rounding error made good by the columns still to come.

    Frantar et al., "GPTQ", ICLR 2023, algorithm 1, with columns in descending order of the
    Hessian's diagonal (the authors' act-order) and scales fixed beforehand. Beyond the paper, the
    groups of a convolution are solved side by side, each with its own Hessian: a depthwise
    convolution is as many problems of nine weights as it has channels. The layers of a unit see
    inputs from before any of them is rounded.
    """
    for name in units(model, recipe.units):
        for layer, hessian in hessians(model, model.get_submodule(name), batches).items():
            scale = weight_scale(layer)
            layer.set_weight(gptq_codes(layer, scale, hessian), scale)


def hessians(model: nn.Module, unit: nn.Module, batches) -> dict[QuantizedLayer, Tensor]:
    """For each layer to round in `unit`, [groups, n, n], the sum over `batches` of its input's
    moments."""
    sums = {}

    def add(layer, inputs):
        sums[layer] = sums.get(layer, 0.0) + input_moments(layer.layer, layer.input(*inputs))

    handles = [layer.register_forward_pre_hook(add) for layer in layers_to_round(unit).values()]
    try:
        for _ in captured(model, unit, batches, "output"):
            pass
    finally:
        for handle in handles:
            handle.remove()
    if len(sums) < len(handles):
        raise ValueError(NEVER_RAN)
    return sums


def input_moments(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """Sum over all places of u u^T, [groups, n, n], where u [n] is what a filter of the group is
    multiplied with."""
    if isinstance(layer, nn.Linear):
        u = x.flatten(0, -2).T[None]  # [1, n, places]
        return u @ u.mT
    total = 0.0
    for image in x:  # one by one: unfolding multiplies memory by the kernel's size
        u = F.unfold(
            image[None], layer.kernel_size, layer.dilation, layer.padding, layer.stride
        ).unflatten(1, (layer.groups, -1))[0]
        total = total + u @ u.mT
    return total


def gptq_codes(layer: QuantizedLayer, scale: Tensor, hessian: Tensor) -> Tensor:
    """Codes int32 of the weight's shape; `hessian` [groups, n, n] up to a factor."""
    weight, fmt = layer.layer.weight, layer.format
    groups, n = hessian.shape[:2]
    # Both [groups, filters, n].
    w, s = (t.reshape(groups, -1, n).clone() for t in (weight, fmt.spread(scale, weight)))
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


# Fewer, smaller and larger steps than in Nagel et al., section 5 (10,000 of 32 images at a rate of
# 1e-3), for the sake of time.
STEPS = 1000  # a unit
STEP_IMAGES = 8  # drawn anew each step
LEARNING_RATE = 1e-2
# As in BRECQ's code.
WARM_UP = 0.2  # share of the steps without regularisation
BETAS = (20.0, 2.0)  # exponent of the regularisation, from after the warm-up to the end
ROUNDING_WEIGHT = 0.01  # of the regularisation


class SoftRounding(nn.Module):
    """A weight as floor(w / s) + h(v), h between 0 and 1, with v to be learnt (eq. 23 there)."""

    def __init__(self, layer: QuantizedLayer, scale: Tensor):
        super().__init__()
        fmt, weight = layer.format, layer.layer.weight.detach()
        self.fmt = fmt
        self.scale = fmt.spread(scale, weight)
        self.floor = (weight / self.scale).floor()
        rest = (weight / self.scale - self.floor).clamp(0.01, 0.99)
        self.v = nn.Parameter(((rest + 0.1) / (1.2 - rest - 0.1)).log())  # h(v) = rest

    def h(self) -> Tensor:
        return (1.2 * self.v.sigmoid() - 0.1).clamp(0, 1)

    def codes(self) -> Tensor:
        return (self.floor + (self.h() >= 0.5)).clamp(self.fmt.qmin, self.fmt.qmax).int()

    def forward(self, weight: Tensor) -> Tensor:
        return (self.floor + self.h()).clamp(self.fmt.qmin, self.fmt.qmax) * self.scale


def adaround(model: nn.Module, reference: nn.Module, batches, recipe: Recipe) -> None:
    """Learn for each weight whether to round up or down, unit by unit, so that the unit's output
    on what the quantized network feeds it comes close to the float network's.

    Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, where
    units are single layers; with larger units, Li et al., "BRECQ: Pushing the Limit of
    Post-Training Quantization by Block Reconstruction", ICLR 2021, without its weighting of
    outputs by Fisher information.
    """
    for name in units(model, recipe.units):
        unit, wanted = model.get_submodule(name), reference.get_submodule(name)
        inputs = torch.cat([x for (x,) in captured(model, unit, batches, "input")])
        outputs = torch.cat(list(captured(reference, wanted, batches, "output")))
        n_images = sum(len(x) for x, *_ in batches)
        reconstruct(unit, inputs, outputs, STEP_IMAGES * len(inputs) // n_images)


def units(model: nn.Module, pattern: str | None) -> list[str]:
    """Names of modules that `pattern` matches, the outermost of each, and of the layers to round
    outside of them, from input to output. ValueError if a pattern matches nothing."""
    to_round = layers_to_round(model)
    chosen = []
    for name, _ in model.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in chosen)
        matches = pattern is not None and re.fullmatch(pattern, name) is not None
        holds = any(layer == name or layer.startswith(f"{name}.") for layer in to_round)
        if not within and (name in to_round or (matches and holds)):
            chosen.append(name)
    if pattern is not None and not any(re.fullmatch(pattern, name) for name in chosen):
        raise ValueError(f"no module with layers to round is called {pattern}")
    return chosen


def reconstruct(unit: nn.Module, inputs: Tensor, outputs: Tensor, n: int) -> None:
    """Choose the codes of all layers to round in `unit` so that it maps `inputs` to `outputs`,
    looking at `n` of them a step."""
    channels = 1 if outputs.dim() == 4 else -1
    rounded = layers_to_round(unit)
    soft = {}
    scales = {name: weight_scale(layer) for name, layer in rounded.items()}
    for name, layer in rounded.items():
        soft[name] = SoftRounding(layer, scales[name])
        parametrize.register_parametrization(layer.layer, "weight", soft[name], unsafe=True)
    learnt = [rounding.v for rounding in soft.values()]
    optimizer = torch.optim.Adam(learnt, LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    began = WARM_UP * STEPS
    with torch.enable_grad():
        for step in range(STEPS):
            drawn = torch.randint(len(inputs), (n,), generator=generator)
            error = (unit(inputs[drawn]) - outputs[drawn]).square().sum(channels).mean()
            if step >= began:
                # A cosine between the two exponents, as the authors anneal it.
                way = 0.5 * (1 + math.cos(math.pi * (step - began) / (STEPS - began)))
                beta = BETAS[1] + (BETAS[0] - BETAS[1]) * way
                open_ = sum((1 - (2 * r.h() - 1).abs() ** beta).sum() for r in soft.values())
                error = error + ROUNDING_WEIGHT * open_
            optimizer.zero_grad()
            error.backward(inputs=learnt)
            if any(v.grad is None for v in learnt):
                raise ValueError(NEVER_RAN)
            optimizer.step()
    for name, layer in rounded.items():
        parametrize.remove_parametrizations(layer.layer, "weight", leave_parametrized=False)
        layer.set_weight(soft[name].codes(), scales[name])


ROUNDINGS = {"nearest": nearest, "gptq": gptq, "adaround": adaround}
