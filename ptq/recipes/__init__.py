"""All recipes by name, and the one of a name that suits a network."""

from collections.abc import Callable
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
    if there is no such recipe for the network, and where one of both changes nothing.
    """
    base, observer = name, None
    if base not in RECIPES:
        base = name.removesuffix("-tensor")
    tensor = base != name
    head, _, last = base.rpartition("-")
    if base not in RECIPES and last in OBSERVERS:
        base, observer = head, last
    found = entry(RECIPES, base, "recipe")
    if found.layers and not (model is None or mobilevit.claims(model)):
        found = generic(found, model)
    if base == name:
        return found
    title = f"{found.title}, {name[len(base) + 1 :]}"
    if observer:
        found = _with(found, "input", lambda spec: replace(spec, input_observer=observer))
    if tensor:
        found = _with(found, "weight", _of_one_scale)
    return replace(found, name=name, title=title)


def _of_one_scale(spec: LayerSpec) -> LayerSpec:
    return replace(spec, weight=replace(spec.weight, granularity="tensor"))


def _with(recipe: Recipe, tensor: str, change: Callable[[LayerSpec], LayerSpec]) -> Recipe:
    """Return a recipe with its entries that quantize `tensor` changed; ValueError if none is."""
    layers = tuple(change(spec) if getattr(spec, tensor) else spec for spec in recipe.layers)
    if layers == recipe.layers:
        raise ValueError(f"a name behind {recipe.name} would be in vain: it changes no {tensor}")
    return replace(recipe, layers=layers)
