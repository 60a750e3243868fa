"""What repairs a quantized network at little cost: batch-norm statistics and biases."""

import copy

import torch
from torch import Tensor, nn

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


@torch.no_grad()
def equalize(model: nn.Module, batches) -> None:
    """Shrink the channels that a layer norm puts out with the widest range, and multiply the
    weights that take them in instead: the float network computes as before, and a scale per tensor
    loses less.

    Nagel et al., ICCV 2019 (see `correct_biases`), section 4.1, with activations over `batches` in
    the place of the first layer's weights, as in Xiao et al., "SmoothQuant", ICML 2023, equation 4
    with alpha 1/2. Convolutions have no such place here: SiLU lets no factor through, and the
    projections without it also go into sums.
    """
    for norm_name, linear_names in linears_after_norms(model).items():
        norm = model.get_submodule(norm_name)
        weights = [model.get_submodule(name).weight for name in linear_names]  # each [out, d]
        outputs = captured(model, norm, batches, "output")
        range_out = torch.stack([y.abs().flatten(0, -2).amax(0) for y in outputs]).amax(0)  # [d]
        range_in = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
        factor = (range_out / range_in).sqrt()
        factor = torch.where((range_out > 0) & (range_in > 0), factor, 1.0)
        for tensor in (norm.weight, norm.bias):
            tensor /= factor
        for weight in weights:
            weight *= factor


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


@torch.no_grad()
def shift_norms(model: nn.Module, batches, reference: nn.Module, reference_batches) -> None:
    """Give every batch norm the running statistics of its twin in `reference`, means moved by the
    difference and variances by the ratio between what `model` makes of `batches` and `reference` of
    `reference_batches`.

    Where both make the same, they stay the same. To replace the statistics from training by those
    of calibration images costs accuracy even in float: there are few of them, and they are not
    augmented as those were that the network learnt on. The shift is free of both.
    """
    before, after = statistics(reference, reference_batches), statistics(model, batches)
    for name, (mean, variance) in after.items():
        norm, trained = model.get_submodule(name), reference.get_submodule(name)
        ratio = (variance + norm.eps) / (before[name][1] + norm.eps)
        norm.running_mean.copy_(trained.running_mean + mean - before[name][0])
        norm.running_var.copy_(trained.running_var * ratio)


@torch.no_grad()
def replace_norms(model: nn.Module, batches, reference: nn.Module, reference_batches) -> None:
    """Replace the running statistics of every batch norm by those of `batches`; the usual way."""
    for name, (mean, variance) in statistics(model, batches).items():
        norm = model.get_submodule(name)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


NORMS = {"shift": shift_norms, "replace": replace_norms}


def statistics(model: nn.Module, batches) -> dict[str, tuple[Tensor, Tensor]]:
    """{name of a batch norm: mean and variance [C] of its inputs, as training takes them in each of
    `batches`, averaged over images}. The network stays as it is."""
    model = copy.deepcopy(model).eval()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for norm in norms.values():
        norm.train()
    seen = 0
    for x, *_ in batches:
        seen += len(x)
        for norm in norms.values():
            norm.momentum = len(x) / seen  # 1 at first, which forgets what was there
        model(x)
    return {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}


def adapted(model: nn.Module, batches, trained_batches) -> nn.Module:
    """A copy of a float network with batch norms for `batches`: the images of `trained_batches`, at
    another size than that which it was trained at."""
    copied = copy.deepcopy(model)
    shift_norms(copied, batches, model, trained_batches)
    return copied


@torch.no_grad()
def correct_biases(model: nn.Module, reference: nn.Module, batches, done=()) -> None:
    """Give each quantized layer but those named in `done`, from input to output, the mean output
    per channel that it has in `reference`. A layer is done whose mean a norm has taken in.

    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV
    2019, section 4.2, with the expectation taken over `batches` (its appendix D). A convolution
    without bias gets one.
    """
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and name not in done:
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
