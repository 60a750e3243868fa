"""All recipes by name."""

from ptq.recipes.ablation import ABLATION
from ptq.recipes.baselines import PEERS, PROTOCOL
from ptq.recipes.mobilevit import OURS

RECIPES = {recipe.name: recipe for recipe in PROTOCOL + OURS + ABLATION + PEERS}
