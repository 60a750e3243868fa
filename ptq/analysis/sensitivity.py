"""How much the quantization of each single tensor changes what a network puts out."""

import contextlib
from functools import partial

import torch
from torch import Tensor, nn

from ptq.analysis.compare import noise
from ptq.layers import Quantizer
from ptq.methods.calibrate import calibrate
from ptq.methods.nearest import layers_to_round, nearest_codes
from ptq.pipeline import float_twin
from ptq.recipe import Recipe

LARGEST = 10  # tensors that a report shows one by one


@torch.no_grad()
def sensitivities(model: nn.Module, recipe: Recipe, batches, outputs) -> dict:
    """Return the noise in the logits from each single weight and input that `recipe` quantizes.

    The result is that of `noises` for the kinds "weights" and "inputs". Weights are rounded to
    nearest, inputs calibrated on `batches`. Raises ValueError as `ptq.quantize` does.
    """
    network = float_twin(model, recipe, batches)
    layers = layers_to_round(network)
    weights = {name: layer.format.decode(*nearest_codes(layer)) for name, layer in layers.items()}
    calibrate(network, None, batches, recipe)
    quantizers = {n: m for n, m in network.named_modules() if isinstance(m, Quantizer)}
    scales = {name: quantizer.scale for name, quantizer in quantizers.items()}
    for quantizer in quantizers.values():
        quantizer.scale = None  # passes on what comes
    alone = {
        "weights": {n: partial(set_tensor, m.layer.weight, weights[n]) for n, m in layers.items()},
        "inputs": {n: partial(set_attribute, m, "scale", scales[n]) for n, m in quantizers.items()},
    }
    return noises(network, outputs, alone)


def noises(network: nn.Module, outputs, alone: dict) -> dict:
    """Return how much `outputs(network)` changes when tensors take the values of their formats.

    The change is a mean square over the outputs' variance: {"noise": {kind: {name: of that tensor
    alone}}, "noise_of_rest": of all but the `largest` together, "noise_of_all": of all together,
    "largest": their number}. `alone`: {kind: {name: function}}. Each function gives a context in
    which that tensor alone takes the values of its format.
    """
    expected = outputs(network)

    def noise_of(contexts) -> float:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return noise(outputs(network), expected)

    flat = {(kind, name): c for kind, of_kind in alone.items() for name, c in of_kind.items()}
    each = {key: noise_of([context]) for key, context in flat.items()}
    by_noise = sorted(flat, key=each.get, reverse=True)
    return {
        "noise": {k: {name: each[k, name] for name in of_kind} for k, of_kind in alone.items()},
        "noise_of_rest": noise_of([flat[key] for key in by_noise[LARGEST:]]),
        "noise_of_all": noise_of(flat.values()),
        "largest": LARGEST,
    }


@contextlib.contextmanager
def set_tensor(tensor: Tensor, value: Tensor):
    """Within this context, let `tensor` hold `value`."""
    before = tensor.clone()
    tensor.copy_(value)
    try:
        yield
    finally:
        tensor.copy_(before)


@contextlib.contextmanager
def set_attribute(module: nn.Module, name: str, value):
    """Within this context, let the attribute `name` of `module` be `value`."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
