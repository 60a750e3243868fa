"""How much the quantization of each single tensor changes what a network puts out."""

import contextlib
import copy
from functools import partial

import torch
from torch import Tensor, nn

from ptq.layers import Quantizer
from ptq.pipeline import calibrate, check_batches, check_finite, with_quantized_layers
from ptq.recipes import Recipe
from ptq.rounding import layers_to_round, nearest


@torch.no_grad()
def sensitivities(model: nn.Module, recipe: Recipe, batches, shown) -> dict:
    """The noise, as `noises` gives it, of the "weights" and "inputs" of all layers that `recipe`
    quantizes: rounded to nearest, and calibrated on `batches`.

    Raises ValueError as `ptq.quantize` does.
    """
    check_batches(model, recipe, batches)
    check_finite(model)
    network = copy.deepcopy(model).eval()
    reference = with_quantized_layers(network, recipe, batches)
    layers = layers_to_round(network)
    nearest(network, reference, batches, recipe)
    weights = {name: layer.layer.weight.clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.layer.weight.copy_(reference.get_submodule(name).weight)
    calibrate(network, batches)
    quantizers = {n: m for n, m in network.named_modules() if isinstance(m, Quantizer)}
    scales = {name: quantizer.scale for name, quantizer in quantizers.items()}
    for quantizer in quantizers.values():
        quantizer.scale = None  # passes on what comes
    alone = {
        "weights": {n: partial(holding, m.layer.weight, weights[n]) for n, m in layers.items()},
        "inputs": {n: partial(having, m, "scale", scales[n]) for n, m in quantizers.items()},
    }
    return noises(network, shown, alone)


def noises(network: nn.Module, shown, alone: dict) -> dict:
    """{"noise": {kind: {name: noise}}, "noise_of_all": noise}: what the outputs for the batches
    `shown` change by, mean square over variance, when tensors take the values of their formats, one
    alone or all together.

    `alone`: {kind: {name: function}}, where each function gives the context in which that tensor of
    `network` does so.
    """

    def outputs():
        return torch.cat([network(x) for x, *_ in shown]).double()

    expected = outputs()

    def noise(*contexts) -> float:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return ((outputs() - expected).square().mean() / expected.var()).item()

    return {
        "noise": {
            kind: {name: noise(context) for name, context in of_kind.items()}
            for kind, of_kind in alone.items()
        },
        "noise_of_all": noise(*(c for of_kind in alone.values() for c in of_kind.values())),
    }


@contextlib.contextmanager
def holding(tensor: Tensor, value: Tensor):
    """Within this context `tensor` holds `value`."""
    before = tensor.clone()
    tensor.copy_(value)
    try:
        yield
    finally:
        tensor.copy_(before)


@contextlib.contextmanager
def having(module: nn.Module, name: str, value):
    """Within this context the attribute `name` of `module` is `value`."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
