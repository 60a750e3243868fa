"""The way from a float network and a recipe to the quantized network."""

import copy
import inspect
from dataclasses import replace

import torch
from torch import Tensor, nn

from ptq.folding import make_norms_positive, untie
from ptq.kinds import LAYERS, kinds_of, quantized
from ptq.layers import (
    COMPUTED,
    IntegerLayer,
    QuantizedLayer,
    Quantizer,
    check_inputs,
    copied,
    located,
    own_buffers,
)
from ptq.methods import STEPS
from ptq.observers import OBSERVERS
from ptq.recipe import LayerSpec, Recipe

VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def quantize(model: nn.Module, recipe: Recipe, batches=None) -> nn.Module:
    """Return a copy of `model` that computes with the values of the recipe's formats.

    The copy is in evaluation mode. A recipe without layers, also one of a peer, leaves it in float.
    `batches`: (input [b, ...], anything) pairs that can be gone through more than once, such as a
    list or a DataLoader that does not shuffle; for recipes that calibrate. Raises ValueError if a
    pattern applies to no layer, if network and batches are on different devices, if batches are
    missing or no good, if a layer never ran during calibration, or if the network, the batches or
    what comes of them has values that are not finite.
    """
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{str(recipe)[:40]!r} is no recipe: ptq.recipe(name, model) gives one")
    if any(isinstance(m, QuantizedLayer | Quantizer | IntegerLayer) for m in model.modules()):
        raise ValueError("the network is quantized already: give the one in float")
    steps = [entry(STEPS, name, "step") for name in recipe.steps]  # now, not after an hour
    if recipe.calibrates:
        check_batches(model, recipe, batches)
    check_values(model)
    with torch.inference_mode(False), torch.no_grad():
        model = copied(model).eval()
        if recipe.calibrates:
            check_input_stays(model, batches)
        if recipe.layers:
            reference = with_quantized_layers(model, recipe, batches)
            for step in steps:
                step(model, reference, batches, recipe)
            check_complete(model, recipe)
    check_values(model)
    return model


def with_quantized_layers(model: nn.Module, recipe: Recipe, batches) -> nn.Module:
    """Put quantized layers into `model`, in place, and return the same network in float."""
    make_norms_positive(model, batches)
    reference = copy.deepcopy(model)
    attach(model, layer_specs(model, recipe))
    return reference


@torch.no_grad()
def float_twin(model: nn.Module, recipe: Recipe, batches) -> nn.Module:
    """Return a copy of the network with the recipe's layers, which still compute in float.

    No weight is rounded and no quantizer calibrated. ValueError as `quantize` raises it.
    """
    check_batches(model, recipe, batches)
    check_values(model)
    twin = copied(model).eval().requires_grad_(False)
    check_input_stays(twin, batches)
    reference = with_quantized_layers(twin, recipe, batches)
    if "equalize" in recipe.steps:
        STEPS["equalize"](twin, reference, batches, recipe)
    return twin


def check_values(model: nn.Module) -> None:
    """Raise ValueError for a tensor that is not finite, floats not of 32 bits, computed weights.

    Buffers of the network's own may be infinite, as masks of attention are.
    """
    own = own_buffers(model)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} of the network is no tensor, which no file holds")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"{name} of the network is {tensor.dtype}: call float() first")
        if name not in own and not tensor.isfinite().all():
            raise ValueError(f"{name} of the network is not finite")
    for name, module in model.named_modules():
        if isinstance(vars(module).get("weight"), Tensor):  # put there by a hook
            raise ValueError(f"{name}: {COMPUTED}")


def check_complete(model: nn.Module, recipe: Recipe) -> None:
    """Raise ValueError if the recipe's steps left a format without codes or a scale.

    Or if they put something before a quantized layer.
    """
    check_inputs(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and module.format:
            if module.codes is None:
                raise ValueError(f"no step of recipe {recipe.name} rounds the weight of {name}")
            if not module.layer.weight.equal(module.format.decode(module.codes, module.scale)):
                raise ValueError(f"the weight of {name} was changed without set_weight")
        if isinstance(module, Quantizer) and module.scale is None:
            raise ValueError(f"no step of recipe {recipe.name} calibrates the input of {name}")


def check_formats(model: nn.Module, recipe: Recipe) -> None:
    """Raise ValueError unless each layer of a quantized network has the recipe's formats.

    Observers may differ: they choose ranges, and are done.
    """
    outer = None  # the replaced layer whose parts come next
    for name, module in model.named_modules():
        if outer is not None and name.startswith(f"{outer}."):
            continue
        made = vars(module).get("spec")
        made = made if isinstance(made, LayerSpec) else None
        outer = name if made else None
        asked = recipe.layer_spec(name, {made.kind} if made else kinds_of(module))
        if _formats(asked) != _formats(made):
            raise ValueError(f"{name or 'the network'} is not as recipe {recipe.name} quantizes it")


def _formats(spec: LayerSpec | None) -> LayerSpec | None:
    return spec and replace(spec, pattern="", weight_observer="", input_observer="")


def check_batches(model: nn.Module, recipe: Recipe, batches) -> None:
    """Raise ValueError unless `batches` is what the recipe's steps need.

    That is, the network takes one tensor, and `batches` can be gone through more than once with
    the same result, is large enough, and has finite inputs, not all the same, on the network's
    device.
    """
    if batches is None or iter(batches) is batches:
        raise ValueError(f"recipe {recipe.name} needs a sequence of calibration batches")
    arguments = inspect.signature(model.forward).parameters.values()
    needed = [p for p in arguments if p.default is p.empty and p.kind not in VARIABLE]
    if len(needed) > 1:
        names = ", ".join(p.name for p in needed)
        raise ValueError(f"the network takes {names}, but networks are called with one tensor")
    floats = (p for p in model.parameters() if p.is_floating_point())
    parameter = next(floats, torch.empty(0))
    first, n, alike = None, 0, True
    for i, batch in enumerate(batches):
        x, *_ = batch if isinstance(batch, tuple | list) and batch else (None,)
        if not isinstance(x, Tensor) or x.dim() == 0:
            raise ValueError("a calibration batch is a pair of its input [b, ...] and anything")
        if x.dtype != parameter.dtype:
            raise ValueError(f"calibration images are {x.dtype}, the network {parameter.dtype}")
        if x.device != parameter.device:
            raise ValueError(
                f"the network is on {parameter.device}, the calibration images on {x.device}"
            )
        if len(x) == 0 or not x.isfinite().all():
            raise ValueError(f"batch {i} of the calibration images is empty or not finite")
        if recipe.norm_steps and len(x) < 2:
            raise ValueError(
                "norms take their statistics from calibration batches of two and more images, and "
                f"batch {i} has one: take more or fewer"
            )
        first, n = x if first is None else first, n + len(x)
        alike = alike and x.shape[1:] == first.shape[1:] and bool((x == first[:1]).all())
    if n == 0:
        raise ValueError(f"recipe {recipe.name} needs calibration images, and there are none")
    if n > 1 and alike:
        raise ValueError(f"all {n} calibration images are the same")
    if not torch.equal(next(iter(batches))[0], first):
        raise ValueError("calibration batches change from pass to pass: do not shuffle or augment")


def check_input_stays(model: nn.Module, batches) -> None:
    """Raise ValueError if the network writes on its input: the next pass would take in another."""
    first = next(iter(batches))[0]
    x = first.clone()
    model(x)
    if not x.equal(first):
        raise ValueError("the network writes on its input: give it a copy, as in x = x.clone()")


def entry(registry: dict, name: str, what: str):
    """Return the entry of this name; ValueError if there is none."""
    if name not in registry:
        raise ValueError(f"no {what} is called {name}: there are {', '.join(registry)}")
    return registry[name]


def layer_specs(model: nn.Module, recipe: Recipe) -> dict[str, LayerSpec]:
    """Return {name of a layer: how it is quantized}; ValueError for a pattern that none matches."""
    for spec in recipe.layers:
        entry(LAYERS, spec.kind, "kind of layers")
        for observer in (spec.weight_observer, spec.input_observer):
            entry(OBSERVERS, observer, "observer")
    named = {n: recipe.layer_spec(n, kinds_of(m)) for n, m in model.named_modules()}
    specs = {name: spec for name, spec in named.items() if spec}
    if "" in specs:
        raise ValueError("the network is a single layer: put it into an nn.Sequential")
    unused = sorted({spec.pattern for spec in recipe.layers} - {s.pattern for s in specs.values()})
    if unused:
        raise ValueError(f"no layer of the network is left that matches {', '.join(unused)}")
    return specs


def attach(model: nn.Module, specs: dict[str, LayerSpec]) -> None:
    """Put quantized layers in the place of the layers of these names, wherever they stand."""
    untie(model)
    for name, spec in specs.items():
        layer = model.get_submodule(name)
        places = [n for n, m in model.named_modules(remove_duplicate=False) if m is layer]
        with located(name):
            layer = quantized(layer, spec)
        layer.spec = spec  # by which a file is checked
        for place in places:
            model.set_submodule(place, layer)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # torch's fast path would go around the quantizers
