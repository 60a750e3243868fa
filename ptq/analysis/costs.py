"""Three measures of what it costs to round the weight of one layer to so many bits.

Each is a function (model, recipes, batches) -> {name of a layer: {bits: cost}}. `recipes`: {bits:
a recipe that gives every weight so many}. Weights are rounded to nearest where the recipe does so,
and else by GPTQ, all on inputs in float; learned rounding would take too long. Inputs stay in
float. Costs of one measure compare and add up across layers, to first order. Costs of different
measures do not.
"""

import contextlib
import copy
import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ptq.analysis.compare import logits_of, noise
from ptq.analysis.sensitivity import set_tensor
from ptq.folding import make_norms_positive
from ptq.graph import hooked, never_ran, norms_after
from ptq.layers import copied
from ptq.methods.gptq import hessians, round_weights
from ptq.methods.nearest import layers_to_round, nearest_codes
from ptq.methods.norms import shifted
from ptq.pipeline import check_batches, float_twin
from ptq.recipe import Recipe

IMAGES = 32  # that costs are taken from: the first; GPTQ takes all
NOISE_IMAGES = 16  # for each layer and width one call of the network on all of them


@torch.no_grad()
def noise_costs(model: nn.Module, recipes: Mapping[int, Recipe], batches) -> dict:
    """Return the noise in the network's outputs over their variance, one weight rounded at a time.

    Where the recipes shift norms, the batch norm behind the layer is shifted with it: what rounding
    does to its statistics is most of the noise, and such recipes undo it.
    """
    network, rounded = _rounded(model, recipes, batches)
    x = joined(first_images(batches, NOISE_IMAGES))
    norms, before = {}, {}
    if any("shift_norms" in recipe.steps for recipe in recipes.values()):
        norms = {conv: norm for norm, conv in norms_after(network, [(x, None)]).items()}

    def see(norm, inputs, kwargs, output):
        before[norm] = moments(*inputs, *kwargs.values())

    with hooked(network, {norm: norm for norm in norms.values()}, see):
        expected = logits_of(network(x))
    costs = defaultdict(dict)
    for bits, values in rounded.items():
        for name, value in values.items():
            with contextlib.ExitStack() as stack:
                stack.enter_context(set_tensor(network.get_submodule(name).weight, value))
                if norm := norms.get(name):
                    stack.enter_context(following(network.get_submodule(norm), before[norm]))
                costs[name][bits] = noise(logits_of(network(x)), expected)
    return dict(costs)


@contextlib.contextmanager
def following(norm: nn.BatchNorm2d, before: tuple[Tensor, Tensor]):
    """Within this context, shift a norm by what the statistics of its input are off `before`.

    `before`: their mean and variance.
    """
    trained = copy.deepcopy(norm)

    def follow(norm, args, kwargs):
        after = moments(*args, *kwargs.values())
        norm.running_mean, norm.running_var = shifted(trained, after, before)

    with norm.register_forward_pre_hook(follow, with_kwargs=True):
        try:
            yield
        finally:
            norm.running_mean, norm.running_var = trained.running_mean, trained.running_var


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and variance [C] of a batch norm's input [B, C, H, W]."""
    variance, mean = torch.var_mean(x, (0, 2, 3))
    return mean, variance


def fisher_costs(model: nn.Module, recipes: Mapping[int, Recipe], batches) -> dict:
    """Return sum_i F_i (w_i - Q(w)_i)^2 / 2, the expected rise of the loss to second order.

    F_i is the mean of squared gradients of the cross-entropy at labels that are drawn from what the
    network itself predicts, so it is the diagonal of the Fisher information and not of its
    empirical stand-in at true labels. Outputs are logits [B, K, ...].
    """
    network, rounded = _rounded(model, recipes, batches)
    names = list(next(iter(rounded.values())))
    weights = [network.get_submodule(name).weight.requires_grad_() for name in names]
    totals = [torch.zeros_like(weight) for weight in weights]
    generator = torch.Generator(weights[0].device).manual_seed(0)
    images = joined(first_images(batches))
    with torch.enable_grad():
        for image in images:  # a batch's gradient has no squares of single images
            loss = sampled_loss(logits_of(network(image[None])), generator)
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for name, gradient in zip(names, gradients):
                if gradient is None:
                    raise never_ran(name)
            for total, gradient in zip(totals, gradients):
                total += gradient.square() / len(images)
    return {
        name: {
            bits: (total * (values[name] - weight.detach()).square()).sum().item() / 2
            for bits, values in rounded.items()
        }
        for name, weight, total in zip(names, weights, totals)
    }


@torch.no_grad()
def nuclear_costs(model: nn.Module, recipes: Mapping[int, Recipe], batches) -> dict:
    """Return the nuclear norm of a layer's output times the squared error that rounding makes.

    Liu et al., "Post-Training Quantization for Vision Transformer", NeurIPS 2021, section 3.4. The
    output of each sample is a matrix [places, channels]. A mean over images.
    """
    network, rounded = _rounded(model, recipes, batches)
    shown = first_images(batches)
    n_images = sum(len(x) for x, *_ in shown)
    names = list(next(iter(rounded.values())))
    costs = {name: dict.fromkeys(rounded, 0.0) for name in names}
    layers = {name: copy.deepcopy(network.get_submodule(name)) for name in names}  # not hooked

    def add(name, inputs, kwargs, output):
        layer = layers[name]
        norms = nuclear_norms(_matrices(layer, output))
        for bits, values in rounded.items():
            off = {"weight": values[name] - layer.weight}
            if layer.bias is not None:
                off["bias"] = torch.zeros_like(layer.bias)
            error = _matrices(layer, functional_call(layer, off, inputs, kwargs))
            costs[name][bits] += (norms * error.square().sum((1, 2))).sum().item() / n_images

    with hooked(network, {name: name for name in names}, add):
        for x, *_ in shown:
            network(x)
    return costs


COSTS = {"noise": noise_costs, "fisher": fisher_costs, "nuclear": nuclear_costs}


def sampled_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sum the cross-entropy of logits [B, K, ...] at labels drawn from what they predict.

    The mean square of its gradient is the diagonal of the Fisher information.
    """
    log_p = logits.movedim(1, -1).flatten(0, -2).log_softmax(1)  # [n, K]
    labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    return -log_p.gather(1, labels).sum()


def nuclear_norms(y: Tensor) -> Tensor:
    """Sum the singular values of each matrix, [B, n, c] -> [B].

    By the smaller of its two squares: singular values of a whole feature map would take long.
    """
    y = y.double()
    square = y.mT @ y if y.shape[2] <= y.shape[1] else y @ y.mT
    return torch.linalg.eigvalsh(square).clamp(min=0).sqrt().sum(1)


def _matrices(layer: nn.Module, output: Tensor) -> Tensor:
    """Return a layer's output as [samples, places, channels]."""
    if isinstance(layer, nn.Conv2d):
        return output.flatten(2).mT
    return output.flatten(1, -2) if output.dim() > 2 else output[:, None]


def _rounded(model: nn.Module, recipes, batches) -> tuple[nn.Module, dict]:
    """Return the network in float, and {bits: {name of a layer: its weight rounded}}."""
    check_batches(model, next(iter(recipes.values())), batches)
    network = copied(model).eval()
    make_norms_positive(network, batches)
    twins = [float_twin(network, _weights_only(recipe), batches) for recipe in recipes.values()]
    by_width = [layers_to_round(twin) for twin in twins]
    if "nearest" in next(iter(recipes.values())).steps:
        for layer in itertools.chain(*(layers.values() for layers in by_width)):
            layer.set_weight(*nearest_codes(layer))
    else:
        moments = hessians(twins[0], "", batches)  # in float, so of all widths
        for twin in twins:
            round_weights(twin, moments)
    return network, {
        bits: {name: layer.layer.weight for name, layer in layers.items()}
        for bits, layers in zip(recipes, by_width)
    }


def _weights_only(recipe: Recipe) -> Recipe:
    layers = tuple(
        replace(s, input=None, attention=None) for s in recipe.layers if s.kind == "product"
    )
    return replace(recipe, layers=layers, steps=(), units=None)


def joined(batches) -> Tensor:
    """Return the images of batches in one; ValueError if they differ in size."""
    if len({x.shape[1:] for x, *_ in batches}) > 1:
        raise ValueError("costs are taken from calibration images of one size")
    return torch.cat([x for x, *_ in batches])


def first_images(batches, left: int = IMAGES) -> list:
    """Return the first `left` images of the batches, as batches."""
    shown = []
    for x, *_ in batches:
        shown.append((x[:left], None))
        left -= len(shown[-1][0])
        if not left:
            break
    return shown
