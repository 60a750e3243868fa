"""All recipes by name, and the one of a name that suits a network."""

from dataclasses import replace

from torch import nn

from ptq.observers import OBSERVERS
from ptq.pipeline import entry
from ptq.recipe import LayerSpec, Recipe
from ptq.recipes import mobilevit
from ptq.recipes.ablation import ABLATION
from ptq.recipes.baselines import PEERS, PROTOCOL
from ptq.recipes.fq_vit import INTEGER
from ptq.recipes.generic import generic
from ptq.recipes.ranking import RANKING
from ptq.recipes.tensorrt import TENSORRT
from ptq.recipes.uniform import UNIFORM

ALL = PROTOCOL + mobilevit.OURS + UNIFORM + ABLATION + RANKING + PEERS + INTEGER + TENSORRT
RECIPES = {recipe.name: recipe for recipe in ALL}


def recipe(name: str, model: nn.Module | None = None) -> Recipe:
    """Return the recipe of this name for `model`, or for MobileViT if that is None.

    MobileViT gets it as it stands, any other network the same formats by kinds of layers. Behind a
    name in RECIPES may stand an observer, which then chooses the ranges of all inputs, and
    "tensor", for one scale a weight: fq-vit-kl, i-bert-tensor, i-vit-percentile-tensor. ValueError
    if there is no such recipe for the network, and where what stands there changes nothing.
    """
    base, observer = name, None
    if name not in RECIPES:
        base = name.removesuffix("-tensor")
        head, _, last = base.rpartition("-")
        if last in OBSERVERS:
            base, observer = head, last
    found = entry(RECIPES, base, "recipe")
    if found.layers and not (model is None or mobilevit.claims(model)):
        found = generic(found, model)
    if base == name:
        return found

    def changed(spec: LayerSpec) -> LayerSpec:
        if spec.input and observer:
            spec = replace(spec, input_observer=observer)
        if spec.weight and name.endswith("-tensor"):
            spec = replace(spec, weight=replace(spec.weight, granularity="tensor"))
        return spec

    layers = tuple(map(changed, found.layers))
    if layers == found.layers:
        raise ValueError(f"recipe {name} would be {base}: it has no such inputs or weights")
    return replace(found, name=name, title=f"{found.title}, {name[len(base) + 1 :]}", layers=layers)
