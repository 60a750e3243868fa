"""What feeds what in a network: inputs and outputs of layers, norms after convolutions."""

import torch
from torch import nn

from ptq.layers import QuantizedAttentionCore, QuantizedLayer, Quantizer


def norms_after(model: nn.Module) -> dict[str, str]:
    """{name of a batch norm: name of the convolution that alone feeds it and nothing else}."""
    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        return {}  # and perhaps not to be traced
    tracer = _Tracer()
    tracer.trace(model)
    pairs = {}
    for node in tracer.graph.nodes:
        if node.op == "call_module" and isinstance(
            model.get_submodule(node.target), nn.BatchNorm2d
        ):
            before = node.args[0]
            layer = model.get_submodule(before.target) if before.op == "call_module" else None
            if isinstance(layer, nn.Conv2d | QuantizedLayer) and len(before.users) == 1:
                pairs[node.target] = before.target
    return pairs


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        ours = isinstance(module, QuantizedLayer | QuantizedAttentionCore | Quantizer)
        return ours or super().is_leaf_module(module, name)


def linears_after_norms(model: nn.Module) -> dict[str, list[str]]:
    """{name of a layer norm: names of the linear layers that take in its output}, where nothing
    else does."""
    modules, after = dict(model.named_modules()), {}
    for node in _Tracer().trace(model).nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.LayerNorm):
            if all(
                user.op == "call_module" and isinstance(modules[user.target], nn.Linear)
                for user in node.users
            ):
                after[node.target] = [user.target for user in node.users]
    return after


NEVER_RAN = "a layer of the network never ran during calibration"


class _Reached(Exception):
    pass


def captured(model: nn.Module, layer: nn.Module, batches, what: str):
    """Yield for each batch the tuple of positional inputs ("input") or the output ("output") of
    `layer`, running no more of `model` than it takes.

    Raises ValueError if `layer` does not run.
    """
    seen = []

    def keep(_, inputs, output=None):
        seen.append(inputs if what == "input" else output)
        raise _Reached

    register = layer.register_forward_pre_hook if what == "input" else layer.register_forward_hook
    handle = register(keep)
    try:
        for x, *_ in batches:
            try:
                model(x)
            except _Reached:
                yield seen.pop()
            else:
                raise ValueError(NEVER_RAN)
    finally:
        handle.remove()
