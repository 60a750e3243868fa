"""Post-training quantization: formats, recipes, and the pipeline that applies one to the other.
Knows modules, batches and its own files; nothing of data sets, checkpoints or the command line."""

from ptq.correction import adapted
from ptq.pipeline import quantize
from ptq.recipes import RECIPES, LayerSpec, Recipe, Rule

__all__ = ["RECIPES", "LayerSpec", "Recipe", "Rule", "adapted", "quantize"]
