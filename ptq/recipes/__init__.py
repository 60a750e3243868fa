"""All recipes by name, and the one of a name that suits a network."""

from torch import nn

from ptq.pipeline import entry
from ptq.recipe import Recipe
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


def recipe(name: str, model: nn.Module) -> Recipe:
    """Return the recipe of this name for `model`.

    MobileViT gets it as it stands, any other network the same formats by kinds of layers.
    ValueError if there is no such recipe for it.
    """
    found = entry(RECIPES, name, "recipe")
    return found if not found.layers or mobilevit.claims(model) else generic(found, model)
