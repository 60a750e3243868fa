"""Post-training quantization of any nn.Module: formats, recipes, and the pipeline that applies one
to the other. Knows nothing of data sets, files or the command line."""

from ptq.correction import adapted
from ptq.pipeline import quantize
from ptq.recipes import RECIPES, LayerSpec, Recipe, Rule

__all__ = ["RECIPES", "LayerSpec", "Recipe", "Rule", "adapted", "quantize"]
