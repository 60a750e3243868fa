"""How much the quantization of each single tensor changes what a network puts out."""

import copy
from itertools import islice

import torch
from torch import nn

from ptq.layers import Quantizer
from ptq.pipeline import calibrate, check_batches, check_finite, with_quantized_layers
from ptq.recipes import Recipe
from ptq.rounding import layers_to_round, nearest


@torch.no_grad()
def sensitivities(model: nn.Module, recipe: Recipe, batches, n_batches: int) -> dict:
    """{"weights": {name: noise}, "inputs": {name: noise}} over all layers that `recipe` quantizes.

    The noise is what the outputs for the first `n_batches` of `batches` change by, mean square over
    variance, when that one weight or input alone takes the values of its format, rounded to
    nearest. All of `batches` calibrates. Raises ValueError as `ptq.quantize` does.
    """
    check_batches(model, recipe, batches)
    check_finite(model)
    network = copy.deepcopy(model).eval()
    reference = with_quantized_layers(network, recipe, batches)
    layers = layers_to_round(network)
    nearest(network, reference, batches, recipe)
    weights = {name: layer.layer.weight.clone() for name, layer in layers.items()}

    def outputs():
        return torch.cat([network(x) for x, *_ in islice(batches, n_batches)]).double()

    def restore(name):
        layers[name].layer.weight.copy_(reference.get_submodule(name).weight)

    for name in layers:
        restore(name)
    calibrate(network, batches)
    quantizers = {n: m for n, m in network.named_modules() if isinstance(m, Quantizer)}
    scales = {name: quantizer.scale for name, quantizer in quantizers.items()}
    for quantizer in quantizers.values():
        quantizer.scale = None  # passes on what comes
    expected = outputs()

    def noise() -> float:
        return ((outputs() - expected).square().mean() / expected.var()).item()

    noises = {"weights": {}, "inputs": {}}
    for name, layer in layers.items():
        layer.layer.weight.copy_(weights[name])
        noises["weights"][name] = noise()
        restore(name)
    for name, quantizer in quantizers.items():
        quantizer.scale = scales[name]
        noises["inputs"][name] = noise()
        quantizer.scale = None
    return noises
