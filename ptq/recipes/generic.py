"""Our recipes for networks whose layers have other names: the same formats by kinds of layers."""

import re
from dataclasses import replace

from torch import nn

from ptq.layers import kinds_of
from ptq.recipe import Recipe
from ptq.recipes.fq_vit import INTEGER
from ptq.recipes.mobilevit import CORES, DEPTHWISE
from ptq.recipes.ranking import RANKING
from ptq.recipes.tensorrt import TENSORRT
from ptq.recipes.uniform import UNIFORM

# Recipes that name no layer but by its kind.
GENERIC = ("w8a8", "w8a8-nearest", "w7a8", "w6a6", "w6a6-nearest", "w4a8", "w4a8-nearest")
GENERIC += ("w5a8", "w6a8")
GENERIC += ("w4", "w4-nearest", "w4-gptq", "w4-adaround", "w4-shift", "w4-minmax")
GENERIC += tuple(recipe.name for recipe in UNIFORM + INTEGER + RANKING + TENSORRT)


def generic(recipe: Recipe, model: nn.Module) -> Recipe:
    """The recipe with its formats, observers and steps for the layers that `model` has.

    Depthwise convolutions and attention cores get the formats that the recipe has for those of
    MobileViT, all other layers those of its last entry. What computes in integers takes all layers
    of its kinds. Inputs of the first layers are quantized, too. Weights are rounded layer by layer.
    Layers of torch's own multi-head attention stay in float: it reads their weights and never calls
    them. ValueError for a recipe that names layers of MobileViT.
    """
    if recipe.name not in GENERIC:
        raise ValueError(
            f"recipe {recipe.name} names layers of MobileViT: for other networks there are "
            f"{', '.join(GENERIC)}"
        )
    integer = {spec.kind: spec for spec in recipe.layers if spec.kind != "product"}
    names = {kind: [] for kind in (*integer, "depthwise", "attention", "others")}
    for name, module in model.named_modules():
        computed = next((kind for kind in integer if kind in kinds_of(module)), None)
        if computed:
            names[computed].append(name)
        elif "product" in kinds_of(module) and not in_torch_attention(name, model):
            names[_group(module)].append(name)
    by_pattern = {spec.pattern: spec for spec in recipe.layers if spec.kind == "product"}
    last = recipe.layers[-1]  # of all layers without a special format
    formats = integer | {
        "depthwise": by_pattern.get(DEPTHWISE, last),
        "attention": by_pattern.get(CORES, last),
        "others": last,
    }
    if formats["attention"].input is None:  # it has no weights
        del names["attention"]
    specs = tuple(
        replace(formats[group], pattern="|".join(map(re.escape, of_group)))
        for group, of_group in names.items()
        if of_group
    )
    if not specs:
        raise ValueError("the network has no convolution and no linear layer to quantize")
    return replace(recipe, layers=specs, units=None)


def _group(module: nn.Module) -> str:
    if not isinstance(module, nn.Conv2d | nn.Linear):
        return "attention"
    depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
    return "depthwise" if depthwise else "others"


def in_torch_attention(name: str, model: nn.Module) -> bool:
    parent = name.rpartition(".")[0]
    return isinstance(model.get_submodule(parent), nn.MultiheadAttention)
