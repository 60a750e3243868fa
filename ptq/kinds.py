"""Kinds of layers by name: what a LayerSpec's `kind` may say, and what it puts into a network.

A method that brings layers of its own is a file in ptq/methods and its lines here.
"""

from torch import nn

from mobilevit import AttentionCore
from ptq.layers import computes_as, pointwise_layer, product_core, product_layer
from ptq.methods.fq_vit import LogSoftmaxCore, PowerOfTwoNorm
from ptq.methods.ibert import IBertActivation, IBertCore, IBertNorm
from ptq.methods.ivit import ShiftActivation, ShiftmaxCore, ShiftNorm
from ptq.recipe import LayerSpec

# {kind: {type of module: function of a module and its LayerSpec that gives what takes its place}}
LAYERS = {
    "product": {nn.Conv2d: product_layer, nn.Linear: product_layer, AttentionCore: product_core},
    "pointwise": {nn.LayerNorm: pointwise_layer, nn.SiLU: pointwise_layer},
    "fq-vit-norm": {nn.LayerNorm: PowerOfTwoNorm},
    "fq-vit-core": {AttentionCore: LogSoftmaxCore},
    "i-bert-norm": {nn.LayerNorm: IBertNorm},
    "i-bert-core": {AttentionCore: IBertCore},
    "i-bert-act": {nn.SiLU: IBertActivation, nn.GELU: IBertActivation},
    "i-vit-norm": {nn.LayerNorm: ShiftNorm},
    "i-vit-core": {AttentionCore: ShiftmaxCore},
    "i-vit-act": {nn.SiLU: ShiftActivation, nn.GELU: ShiftActivation},
}


def kinds_of(module: nn.Module) -> set[str]:
    """Return the kinds of LAYERS that a module belongs to."""
    return {kind for kind, types in LAYERS.items() if _entry(types, module)}


def quantized(module: nn.Module, spec: LayerSpec) -> nn.Module:
    """Return what takes the place of `module`, as `spec` asks; ValueError if its kind can't."""
    return _entry(LAYERS[spec.kind], module)(module, spec)


def _entry(types: dict, module: nn.Module):
    return next((entry for kind, entry in types.items() if computes_as(module, kind)), None)
