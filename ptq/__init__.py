"""Post-training quantization: formats, recipes, and the pipeline that applies one to the other.
Knows modules, batches and its own files; nothing of data sets, checkpoints or the command line."""

from ptq.methods.norms import adapted
from ptq.pipeline import quantize
from ptq.recipe import LayerSpec, Recipe, Rule
from ptq.recipes import RECIPES

__all__ = ["RECIPES", "LayerSpec", "Recipe", "Rule", "adapted", "quantize"]
