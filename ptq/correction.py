"""What repairs a quantized network at little cost: batch-norm statistics and biases."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ptq.layers import QuantizedAttentionCore, QuantizedLayer


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
        ours = isinstance(module, QuantizedLayer | QuantizedAttentionCore)
        return ours or super().is_leaf_module(module, name)


@torch.no_grad()
def make_norms_positive(model: nn.Module) -> None:
    """Turn each negative factor of a batch norm positive by turning the sign of the convolution's
    channel before it, so that folding the norm into quantized weights keeps their codes."""
    for norm_name, conv_name in norms_after(model).items():
        norm, conv = model.get_submodule(norm_name), model.get_submodule(conv_name)
        sign = torch.where(norm.weight < 0, -1.0, 1.0)
        conv.weight *= sign[:, None, None, None]
        if conv.bias is not None:
            conv.bias *= sign
        norm.running_mean *= sign
        norm.weight *= sign


def reestimate_norms(model: nn.Module, batches) -> None:
    """Replace the running statistics of every batch norm by those of `batches`, as the network's
    quantized weights make them. The mode that the network was in stays."""
    update_bn(batches, model)


@torch.no_grad()
def correct_biases(model: nn.Module, reference: nn.Module, batches) -> None:
    """Give each quantized layer, from input to output, the mean output per channel that it has in
    `reference`.

    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV
    2019, section 4.2, with the expectation taken over `batches` (its appendix D). A convolution
    without bias gets one.
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            wanted = mean_output(reference, reference.get_submodule(name), batches)
            layer = module.layer
            shift = wanted - mean_output(model, layer, batches)
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros_like(shift))
            layer.bias += shift


def mean_output(model: nn.Module, layer: nn.Module, batches) -> Tensor:
    """Mean output [C] per channel of a convolution or linear layer of `model` over `batches`."""
    total, n = 0.0, 0
    for output in captured(model, layer, batches, "output"):
        if isinstance(layer, nn.Conv2d):
            output = output.movedim(1, -1)
        output = output.flatten(0, -2)
        total, n = total + output.double().sum(0), n + len(output)
    return (total / n).float()


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
                raise ValueError("a layer of the network never ran during calibration")
    finally:
        handle.remove()
