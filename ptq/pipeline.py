"""From a float network and a recipe to the quantized network."""

import copy

import torch
from torch import nn

from mobilevit import AttentionCore
from ptq.graph import norms_after
from ptq.layers import KINDS, QuantizedAttentionCore, QuantizedLayer, Quantizer
from ptq.methods import ROUNDINGS
from ptq.methods.equalize import correct_biases, equalize, make_norms_positive
from ptq.methods.norms import NORMS
from ptq.observers import OBSERVERS
from ptq.recipe import LayerSpec, Recipe


def quantize(model: nn.Module, recipe: Recipe, batches=None) -> nn.Module:
    """A copy of `model`, in evaluation mode, that computes with the values that the recipe's
    formats can write.

    `batches`: a sequence of (input [b, ...], anything), for recipes that calibrate. Raises
    ValueError if a rule or layer pattern applies to nothing, if network and batches are on
    different devices, if a recipe that calibrates gets no batches, if one for norms is a single
    image, if a layer never ran during calibration, or if the network, the batches or what comes of
    them has values that are not finite.
    """
    rounding = chosen(ROUNDINGS, recipe.rounding, "rounding")
    if recipe.norms:
        chosen(NORMS, recipe.norms, "norms")  # now, not after an hour of rounding
    if recipe.calibrates:
        check_batches(model, recipe, batches)
    check_finite(model)
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        write_tensors(model, recipe)
        if recipe.layers:
            reference = with_quantized_layers(model, recipe, batches)
            rounding(model, reference, batches, recipe)
            norms_follow(model, reference, batches, recipe)
            calibrate(model, batches)
            if recipe.quantizes_inputs:  # to round them moves statistics, too
                norms_follow(model, reference, batches, recipe)
            if recipe.correct_biases:
                done = norms_after(model).values() if recipe.norms else ()
                correct_biases(model, reference, batches, done)
    check_finite(model)
    return model


def with_quantized_layers(model: nn.Module, recipe: Recipe, batches) -> nn.Module:
    """Prepare `model` for rounding and calibration, in place; the same network in float."""
    make_norms_positive(model)
    if recipe.equalize:
        equalize(model, batches)
    reference = copy.deepcopy(model)
    attach(model, recipe)
    return reference


def norms_follow(model: nn.Module, reference: nn.Module, batches, recipe: Recipe) -> None:
    if recipe.norms:
        NORMS[recipe.norms](model, batches, reference, batches)


def check_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} of the network is not finite")


def check_batches(model: nn.Module, recipe: Recipe, batches) -> None:
    """Raise ValueError unless `batches` can be gone through more than once and has finite inputs,
    where the network is, and for norms two and more in each."""
    if not all(hasattr(batches, m) for m in ("__len__", "__getitem__")) or len(batches) == 0:
        raise ValueError("it needs a sequence of calibration batches, such as a list, not empty")
    device = next((p.device for p in model.parameters()), None)
    for i in range(len(batches)):
        batch = batches[i]
        if not isinstance(batch, tuple | list):
            raise ValueError("a calibration batch is a pair of its input and anything")
        x, *_ = batch
        if device not in (None, x.device):
            raise ValueError(f"the network is on {device}, the calibration images on {x.device}")
        if len(x) == 0 or not x.isfinite().all():
            raise ValueError(f"batch {i} of the calibration images is empty or not finite")
        if recipe.norms and len(x) < 2:
            raise ValueError(
                "norms take their statistics from calibration batches of two and more images, and "
                f"batch {i} has one: take more or fewer"
            )


def chosen(registry: dict, name: str, what: str):
    """The entry of this name; ValueError if there is none."""
    if name not in registry:
        raise ValueError(f"no {what} is called {name}: there are {', '.join(registry)}")
    return registry[name]


def write_tensors(model: nn.Module, recipe: Recipe) -> None:
    """Give the tensors that the recipe's rules name the values of their format."""
    unused = set(recipe.rules)
    for name, tensor in model.state_dict().items():
        rule = recipe.rule_for(name, tensor)
        if rule is not None:
            unused.discard(rule)
            tensor.copy_(rule.format.decode(*rule.format.encode(tensor)))
    if unused:
        patterns = ", ".join(sorted(rule.pattern for rule in unused))
        raise ValueError(f"no tensor of the network is left that matches {patterns}")


def attach(model: nn.Module, recipe: Recipe) -> None:
    """Put quantized layers in the place of those that the recipe names."""
    for spec in recipe.layers:
        for observer in (spec.weight_observer, spec.input_observer):
            chosen(OBSERVERS, observer, "observer")
    unused = set(recipe.layers)
    for name, module in list(model.named_modules()):
        kind = next((kind for kind, types in KINDS.items() if isinstance(module, types)), None)
        spec = recipe.layer_spec(name, kind)
        if spec is not None:
            unused.discard(spec)
            model.set_submodule(name, quantized(module, spec))
    if unused:
        patterns = ", ".join(sorted(spec.pattern for spec in unused))
        raise ValueError(f"no layer of the network is left that matches {patterns}")


def quantized(module: nn.Module, spec: LayerSpec) -> nn.Module:
    if isinstance(module, nn.Conv2d) and (
        module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        raise ValueError("convolutions are quantized only with a number of zeros around them")
    if isinstance(module, AttentionCore):
        wanted = spec.input and QuantizedAttentionCore(spec.input, spec.input_observer)
        return wanted or module
    quantizer = Quantizer(spec.input, spec.input_observer) if spec.input else None
    if spec.kind == "pointwise":
        return nn.Sequential(quantizer, module) if quantizer else module
    return QuantizedLayer(module, quantizer, spec.weight, spec.weight_observer)


def calibrate(model: nn.Module, batches) -> None:
    """Give every quantizer its scale and zero-point from one pass over `batches`."""
    quantizers = {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}
    if not quantizers:
        return
    for quantizer in quantizers.values():
        quantizer.observe()
    for x, *_ in batches:
        model(x)
    for name, quantizer in quantizers.items():
        try:
            quantizer.freeze()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
