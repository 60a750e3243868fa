"""Rounding to nearest, and what all ways of rounding share."""

import re

from torch import Tensor, nn

from ptq.layers import QuantizedLayer, located
from ptq.observers import OBSERVERS, range_of
from ptq.recipe import Recipe


def layers_to_round(module: nn.Module, path: str = "") -> dict[str, QuantizedLayer]:
    """Return {name: layer with weights to round} of `module`; names begin with its own `path`."""
    return {
        name: layer
        for name, layer in module.named_modules(prefix=path)
        if isinstance(layer, QuantizedLayer) and layer.format is not None
    }


def weight_scale(layer: QuantizedLayer) -> Tensor:
    """Return the scale [G] that the layer's observer chooses for its float weight."""
    observer = OBSERVERS[layer.weight_observer](layer.format)
    observer.update(layer.layer.weight)
    scale, _ = layer.format.grid(*range_of(observer))
    return scale


def nearest_codes(layer: QuantizedLayer) -> tuple[Tensor, Tensor]:
    """Return the codes of the levels nearest to the layer's float weight, and the scale [G]."""
    scale = weight_scale(layer)
    return layer.format.encode(layer.layer.weight, scale), scale


def nearest(model: nn.Module, reference: nn.Module, batches, recipe: Recipe) -> None:
    """Give each weight the code of its nearest level."""
    for name, layer in layers_to_round(model).items():
        with located(name):
            layer.set_weight(*nearest_codes(layer))


def units(model: nn.Module, pattern: str | None) -> list[str]:
    """Return the names of the modules whose weights are rounded together, as registered.

    These are the outermost modules that `pattern` matches, and each layer to round outside of
    them. ValueError if the pattern matches nothing.
    """
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
