"""Post-training quantization: formats, recipes, and the pipeline that applies one to the other.

Knows modules, batches and its own files; nothing of data sets, checkpoints or the command line.

    >>> quantized = ptq.quantize(model, ptq.recipe("w8a8", model), batches)
"""

from ptq.analysis.compare import compare_models
from ptq.attention import open_attention
from ptq.formats import Uniform
from ptq.integer.network import integer_network
from ptq.methods.norms import adapted
from ptq.packing import load, save
from ptq.pipeline import quantize
from ptq.recipe import LayerSpec, Recipe
from ptq.recipes import RECIPES, recipe
from ptq.recipes.vit import vit_recipe

__all__ = [
    "RECIPES",
    "LayerSpec",
    "Recipe",
    "Uniform",
    "adapted",
    "compare_models",
    "integer_network",
    "load",
    "open_attention",
    "quantize",
    "recipe",
    "save",
    "vit_recipe",
]
