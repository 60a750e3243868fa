"""Our recipes for networks whose layers have other names: the same formats by kinds of layers."""

import warnings
from collections import Counter
from dataclasses import replace

from torch import nn

from mobilevit import AttentionCore
from ptq.kinds import kinds_of
from ptq.recipe import LayerSpec, Recipe, by_names
from ptq.recipes.fq_vit import INTEGER
from ptq.recipes.mobilevit import CORES, DEPTHWISE
from ptq.recipes.ranking import RANKING
from ptq.recipes.tensorrt import TENSORRT
from ptq.recipes.uniform import UNIFORM

# Recipes that name no layer but by its kind.
GENERIC = ("w8a8", "w8a8-nearest", "w7a8", "w6a6", "w6a6-nearest", "w4a8", "w4a8-nearest")
GENERIC += ("w5a8", "w6a8", "w8a8-minmax", "w8a8-percentile", "w8a8-kl", "w8a8-tensor")
GENERIC += ("w4", "w4-nearest", "w4-gptq", "w4-adaround", "w4-shift", "w4-minmax")
GENERIC += tuple(recipe.name for recipe in UNIFORM + INTEGER + RANKING + TENSORRT)


def generic(recipe: Recipe, model: nn.Module) -> Recipe:
    """Return the recipe with its formats, observers and steps for the layers that `model` has.

    Depthwise convolutions and attention cores get the formats that the recipe has for those of
    MobileViT, all other layers those of its last entry. What computes in integers takes all layers
    of its kinds. Inputs of the first layers are quantized, too. Weights are rounded layer by layer.
    Layers of torch's own multi-head attention stay in float: it reads their weights and never calls
    them. ValueError for a recipe that names layers of MobileViT.
    """
    if recipe.name not in GENERIC and any(spec.pattern != ".*" for spec in recipe.layers):
        raise ValueError(
            f"recipe {recipe.name} names layers of MobileViT: for other networks there are "
            f"{', '.join(GENERIC)}"
        )
    products = {spec.pattern: spec for spec in recipe.layers if spec.kind == "product"}
    last = recipe.layers[-1]  # of all layers without a special format

    def spec_of(name: str, module: nn.Module) -> LayerSpec | None:
        kinds = kinds_of(module)
        computed = [spec for spec in recipe.layers if spec.kind in kinds - {"product"}]
        if computed:
            return computed[0]
        if "product" not in kinds or in_torch_attention(name, model):
            return None
        if isinstance(module, AttentionCore):
            spec = products.get(CORES, last)
            return spec if spec.input else None  # it has no weights
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
        return products.get(DEPTHWISE, last) if depthwise else last

    specs = {name: spec_of(name, module) for name, module in model.named_modules()}
    specs = {name: spec for name, spec in specs.items() if spec}
    if not specs:
        raise ValueError("the network has no nn.Conv2d and no nn.Linear to quantize")
    _warn_of_floats(recipe.name, specs, model)
    return replace(recipe, layers=by_names(specs), units=None)


def _warn_of_floats(recipe: str, specs: dict, model: nn.Module) -> None:
    """Warn where more than half of the elements of weights are of layers that stay in float."""
    total, left = 0, Counter()
    for name, module in model.named_modules():
        n = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
        total += n
        if not any(f"{name}.".startswith(f"{layer}.") for layer in specs):
            left[type(module).__name__] += n
    if 2 * left.total() > total:
        types = " and ".join(kind for kind, _ in left.most_common(2))
        share = 100 * left.total() / total
        warnings.warn(
            f"{recipe} leaves {share:.0f} % of the weights in float, those of {types} first: it is "
            "for nn.Conv2d, nn.Linear and what open_attention takes apart",
            stacklevel=4,
        )


def in_torch_attention(name: str, model: nn.Module) -> bool:
    parent = name.rpartition(".")[0]
    return isinstance(model.get_submodule(parent), nn.MultiheadAttention)
