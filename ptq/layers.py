"""Layers with quantizers: what `ptq.quantize` puts in the place of a network's own layers.

Weights hold the values of their codes, so the float layer computes as it did. Inputs pass a
`Quantizer`. Batch norms stay where they are: with one scale per output channel, folding them
changes scales and biases, never codes.
"""

import contextlib
import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from mobilevit import AttentionCore
from ptq.formats import PowerOfTwo, Uniform
from ptq.observers import OBSERVERS, range_of
from ptq.recipe import LayerSpec

COMPUTED = (
    "the weight is computed at each call, so that codes would be lost: call "
    "remove_parametrizations, prune.remove, remove_weight_norm or remove_spectral_norm"
)


@contextlib.contextmanager
def located(what: str):
    """Within this context, say what a ValueError is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a network; ValueError if it keeps a tensor that a gradient goes through."""
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        if "deepcopy" not in str(error):
            raise
        raise ValueError(
            "the network keeps a tensor of its last call, which can't be copied with its gradient: "
            "call it under torch.no_grad() first"
        ) from error


class Quantizer(nn.Module):
    """Rounds activations to a format's levels, once calibrated; passes them on until then.

    While `observer` is set, it sees what passes.
    """

    def __init__(self, format: Uniform | PowerOfTwo, observer: str):
        super().__init__()
        if format.group_size:
            raise ValueError("activations have scales per tensor or per channel, not per group")
        self.format, self.observer_name = format, observer
        self.observer = None
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    def observe(self) -> None:
        self.observer = OBSERVERS[self.observer_name](self.format)
        self.scale = self.zero_point = None

    def freeze(self) -> None:
        """Turn what was seen since `observe` into scale and zero-point; ValueError for nothing."""
        self.scale, self.zero_point = self.format.grid(*range_of(self.observer))
        self.observer = None

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.update(x)
        return x if self.scale is None else self.format.nearest(x, *self.grid)

    @property
    def grid(self) -> tuple[Tensor, ...]:
        """Return what the format's functions take besides a tensor."""
        return self.scale, self.zero_point

    def encode(self, x: Tensor, what: str = "what a layer takes in") -> Tensor:
        """Return the codes of `x`, int32 of its shape; ValueError where a value is not finite."""
        # NaN has no code, and what it becomes as an integer depends on the machine.
        if x.numel() and not all(end.isfinite() for end in x.aminmax()):  # a fast pass
            raise ValueError(f"{what} is not finite")
        return self.format.encode(x, *self.grid)

    def integers(self, x: Tensor) -> Tensor:
        """Return `x` as int64 in units of the scale: codes less the zero-point."""
        return self.format.integers(self.encode(x), *self.grid[1:])

    def extra_repr(self) -> str:
        return f"{self.format}, {self.observer_name}"


class QuantizedLayer(nn.Module):
    """A convolution or linear layer behind a quantizer of its input.

    `codes`, int32 of the weight's shape, and `scale` [G] give its weight's values; both are None
    while the weight is in float.
    """

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        input: Quantizer | None,
        weight: Uniform | None,
        weight_observer: str,
    ):
        super().__init__()
        if weight is not None and not weight.symmetric:
            raise ValueError("weights take a symmetric format")
        self.layer, self.format, self.weight_observer = layer, weight, weight_observer
        self.input = input or nn.Identity()
        self.register_buffer("codes", None)
        self.register_buffer("scale", None)

    def forward(self, input: Tensor) -> Tensor:  # torch's name, by which some networks call
        return self.layer(self.input(input))

    def __getattr__(self, name: str):
        """Return the layer's own attribute, such as `in_features`, for networks that read it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer" or name.startswith("__"):  # while it is copied or unpickled
                raise
            return getattr(self.layer, name)

    @property
    def weight(self) -> Tensor:
        """Return what the layer multiplies by; transformers looks at its type."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """Return what the layer adds; networks that read weights read it as well."""
        return self.layer.bias

    @torch.no_grad()
    def set_weight(self, codes: Tensor, scale: Tensor) -> None:
        """Take the weight that integers `codes` of its shape and `scale` [G] stand for.

        ValueError for codes that the format does not have, for scales that are not above 0, and for
        another number of them.
        """
        qmin, qmax, scale = self.format.qmin, self.format.qmax, scale.float()
        if codes.is_floating_point() or codes.shape != self.layer.weight.shape:
            raise ValueError(f"codes of a weight are integers of its shape, not {codes.dtype}")
        if codes.numel() and not qmin <= int(codes.min()) <= int(codes.max()) <= qmax:
            raise ValueError(f"codes of a weight lie from {qmin} to {qmax}: clamp them")
        n = len(self.format.rows(codes))
        if scale.shape != (n,) or not ((scale > 0) & scale.isfinite()).all():
            raise ValueError(f"scales of a weight are positive numbers [G], here [{n}]")
        self.codes, self.scale = codes.int(), scale
        self.layer.weight.copy_(self.format.decode(self.codes, scale))


def check_inputs(model: nn.Module) -> None:
    """Raise ValueError if anything but its quantizer stands before a quantized layer."""
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLayer):
            continue
        if not isinstance(module.input, Quantizer | nn.Identity):
            what = f"{name}.input is a {type(module.input).__name__}, which no file holds"
            raise ValueError(f"{what}: steps leave the input of a layer as it is")


def own_buffers(model: nn.Module) -> set[str]:
    """Return names of buffers that are the network's own, such as masks: these may be infinite.

    Statistics of norms are not, nor is what layers of ours hold.
    """
    ours = Quantizer | QuantizedLayer | IntegerLayer
    return {
        f"{name}.{buffer}".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if not (isinstance(module, ours) or hasattr(module, "running_mean"))
        for buffer, _ in module.named_buffers(recurse=False)
    }


class IntegerLayer(nn.Module):
    """A layer that computes in integers (ptq.integer) once its quantizers are calibrated.

    `compute` does so: it rounds its float inputs to codes and returns values of codes. As long as a
    quantizer has no scale, `simulate` computes in float between those that have one.
    """

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        inputs = *inputs, *named.values()
        quantizers = [m for m in self.modules() if isinstance(m, Quantizer)]
        if all(quantizer.scale is not None for quantizer in quantizers):
            return self.compute(*inputs)
        return self.simulate(*inputs)


class QuantizedAttentionCore(nn.Module):
    """softmax(q k^T / sqrt(d/h)) v over [B*P, h, N, d/h] with quantizers before both products.

    q, k and v take `format`, and the softmax takes `attention`. It is never negative, so by
    default that is `format` without a sign.
    """

    def __init__(self, format: Uniform, observer: str, attention: Uniform | None = None):
        super().__init__()
        attention = attention or replace(format, symmetric=False)
        formats = dict.fromkeys("qkv", format) | {"attention": attention}
        self.inputs = nn.ModuleDict({k: Quantizer(fmt, observer) for k, fmt in formats.items()})

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.inputs["q"](q) @ self.inputs["k"](k).mT * q.shape[-1] ** -0.5
        return self.inputs["attention"](scores.softmax(-1)) @ self.inputs["v"](v)


def product_layer(layer: nn.Conv2d | nn.Linear, spec: LayerSpec) -> QuantizedLayer:
    """Return what computes as `spec` asks; ValueError for a layer that can't."""
    if isinstance(layer, nn.Conv2d):
        if layer.padding == "valid":
            layer.padding = (0, 0)
        if layer.padding == "same":
            both = [gap * (k - 1) for k, gap in zip(layer.kernel_size, layer.dilation)]
            if not any(n % 2 for n in both):  # else one side has a zero more
                layer.padding = tuple(n // 2 for n in both)
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise ValueError("convolutions are quantized only with a number of zeros around them")
    if not owns_weight(layer):
        raise ValueError(COMPUTED)
    if layer._forward_pre_hooks or layer._forward_hooks:
        raise ValueError("the layer has hooks, which no file holds: remove them")
    return QuantizedLayer(layer, _quantizer(spec), spec.weight, spec.weight_observer)


def owns_weight(layer: nn.Module) -> bool:
    """Say whether a layer's weight is its parameter; pruned and normed ones compute it."""
    return "weight" in layer._parameters


def computes_as(module: nn.Module, kind: type) -> bool:
    """Say whether a module is of `kind` and has no forward of its own, which may do anything."""
    plain = isinstance(module, kind) and type(module).forward is kind.forward
    return plain and "forward" not in vars(module)


def product_core(core: AttentionCore, spec: LayerSpec) -> nn.Module:
    """Return an attention core that rounds what its products take in, if `spec` asks for it."""
    if not spec.input:
        return core
    return QuantizedAttentionCore(spec.input, spec.input_observer, spec.attention)


def pointwise_layer(module: nn.Module, spec: LayerSpec) -> nn.Module:
    """Return a layer that computes in float on rounded inputs, if `spec` asks for it."""
    return nn.Sequential(_quantizer(spec), module) if spec.input else module


def _quantizer(spec: LayerSpec) -> Quantizer | None:
    return Quantizer(spec.input, spec.input_observer) if spec.input else None
