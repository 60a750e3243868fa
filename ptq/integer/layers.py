"""What layers that compute in integers share: attention, layer norms, SiLU and GELU.

Each has a paper's arithmetic where its LayerSpec says `published`, and ours else. A method
(ptq.methods.fq_vit, ibert, ivit) adds to a base from here what it does in its own way.
"""

import math
from collections.abc import Callable
from functools import partial
from types import NoneType, UnionType

import torch
from torch import Tensor, nn

from mobilevit import AttentionCore
from ptq.formats import Uniform
from ptq.integer.activations import softmax
from ptq.integer.norm import LayerNormTable, layer_norm, layer_norm_table
from ptq.integer.rescale import OutOfRange, fits, look_up
from ptq.layers import IntegerLayer, Quantizer
from ptq.recipe import LayerSpec


class IntegerSoftmaxCore(IntegerLayer):
    """softmax(q k^T / sqrt(d/h)) v over [B*P, h, N, d/h], its softmax in integers.

    `coded`: the tensors with quantizers. The softmax puts out codes of `attention`, which has one
    of `formats_of_softmax`: here even levels of 1 / (a whole number).
    """

    coded = ("q", "k", "v", "scores")
    formats_of_softmax: type | UnionType = Uniform

    def __init__(self, core: AttentionCore, spec: LayerSpec):
        check_spec(core, spec, attention=self.formats_of_softmax)
        super().__init__()
        self.attention, self.published = spec.attention, spec.published
        formats = dict.fromkeys(self.coded, spec.input)
        if isinstance(self.attention, Uniform) and not self.published:
            formats["attention"] = self.attention
        observer = spec.input_observer
        self.inputs = nn.ModuleDict({k: Quantizer(fmt, observer) for k, fmt in formats.items()})
        self.softmax = nn.Softmax(-1)

    def simulate(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.products(q, k)
        if "scores" in self.inputs:
            scores = self.inputs["scores"](scores)
        attention = self.softmax(scores)
        if "attention" in self.inputs:
            attention = self.inputs["attention"](attention)
        return attention @ self.inputs["v"](v)

    def compute(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = self.weights(*self.scores(q, k))
        return weights.to(v.dtype) @ self.inputs["v"](v)

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the scores q k^T / sqrt(d/h) of rounded q and k, as values."""
        return self.inputs["q"](q) @ self.inputs["k"](k).mT * q.shape[-1] ** -0.5

    def scores(self, q: Tensor, k: Tensor) -> tuple[Tensor, float]:
        """Return the scores as integers, and their scale."""
        quantizer = self.inputs["scores"]
        return quantizer.integers(self.products(q, k)), float(quantizer.scale)

    def weights(self, scores: Tensor, scale: float) -> Tensor:
        """Return the softmax of integers in units of `scale`, as values."""
        softmax, one = self.integer_softmax()
        return softmax(scores, scale).double() / one

    def integer_softmax(self) -> tuple[Callable[[Tensor, float], Tensor], int]:
        """Return a function of scores and their scale to integers, and the integer that is 1."""
        return self.to_even_levels(softmax)

    def to_even_levels(self, softmax: Callable) -> tuple[Callable[[Tensor, float], Tensor], int]:
        """Return `softmax` in units of 1 / levels, and levels: nearest to its format's scale."""
        quantizer = self.inputs["attention"]
        levels = max(round(1 / float(quantizer.scale)), 1)
        return partial(softmax, levels=levels, qmax=quantizer.format.qmax), levels


class IntegerNorm(IntegerLayer):
    """A layer norm of [..., C] in integers, from the codes of its input to those of its output.

    Where it is published, `as_published`, a method's own, makes values of integers in units of the
    input's scale, and there may be no format of the output.
    """

    def __init__(self, layer: nn.LayerNorm, spec: LayerSpec, input: Quantizer):
        super().__init__()
        self.layer, self.published, self.input = layer, spec.published, input
        self.output = Quantizer(spec.output, spec.input_observer) if spec.output else nn.Identity()

    def simulate(self, x: Tensor) -> Tensor:
        return self.output(self.layer(self.input(x)))

    def compute(self, x: Tensor) -> Tensor:
        codes = self.input.integers(x)
        if self.published:
            return self.as_published(codes)
        return layer_norm(codes, *self.constants()) * self.output.scale

    def constants(self) -> tuple[LayerNormTable, int, int, int]:
        """Return what `ptq.integer.norm.layer_norm` takes besides codes."""
        scales = float(self.input.scale), float(self.output.scale)
        table = layer_norm_table(*self.weight_and_bias(), self.layer.eps, *scales)
        format, zero_point = self.output.format, int(self.output.zero_point)
        return table, format.qmin - zero_point, format.qmax - zero_point, self.input.format.width

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """Return the layer norm's weight and bias [C], 1 and 0 where it has none."""
        norm = self.layer
        ones = torch.ones(norm.normalized_shape, device=self.input.scale.device)
        weight = ones if norm.weight is None else norm.weight.detach()
        return weight, torch.zeros_like(weight) if norm.bias is None else norm.bias.detach()


def norm_with_channel_scales(normalised: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return what I-BERT's and I-ViT's code makes of normalised integers; float32 values.

    `normalised` [..., C] are in units of sqrt(C) / 2**30. The bias over the weight is held in 63
    bits: where it is beyond 2 sqrt(C), 32 do not hold it. OutOfRange for a weight of 0.
    """
    if (weight == 0).any():
        raise OutOfRange("the published layer norm divides by a weight, and one is 0")
    scale = math.sqrt(normalised.shape[-1]) / 2**30
    offset = (bias.double() / weight.double() / scale).floor().long()
    y = normalised + fits(offset, 62, "the bias over the weight")
    return (y * (scale * weight.double())).float()


class IntegerActivation(IntegerLayer):
    """SiLU or GELU in integers.

    `integers`, a method's own, takes integers and their scale, and gives what the layer makes of
    them in the same way.
    """

    def __init__(self, layer: nn.SiLU | nn.GELU, spec: LayerSpec):
        check_spec(layer, spec)
        super().__init__()
        self.layer, self.published = layer, spec.published
        self.input = Quantizer(spec.input, spec.input_observer)

    def simulate(self, x: Tensor) -> Tensor:
        return self.layer(self.input(x))

    def compute(self, x: Tensor) -> Tensor:
        quantizer, fmt = self.input, self.input.format
        # Of every code once: a feature map holds each many times.
        every = torch.arange(fmt.qmin, fmt.qmax + 1, device=x.device) - quantizer.zero_point
        y, scale = self.integers(every, float(quantizer.scale))
        values = (y.double() * scale).to(x.dtype)
        return look_up(values, quantizer.encode(x) - fmt.qmin)


def check_spec(
    layer: nn.Module,
    spec: LayerSpec,
    input: type = Uniform,
    attention: type | UnionType = NoneType,
    output: type = NoneType,
) -> None:
    """Raise ValueError unless `spec` has formats of these types for a layer's tensors, no others.

    Inputs have one scale, a softmax has no sign, and layer norms go over the last axis.
    """
    for tensor, types in (("input", input), ("attention", attention), ("output", output)):
        format = getattr(spec, tensor)
        if not isinstance(format, types):
            raise ValueError(f"{spec.kind} layers can't have {format} as format of their {tensor}")
    if isinstance(spec.input, Uniform) and spec.input.granularity != "tensor":
        raise ValueError(f"{spec.kind} layers need one scale for their input")
    if isinstance(spec.attention, Uniform) and spec.attention.symmetric:
        raise ValueError("a softmax takes a format without a sign")
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) != 1:
        raise ValueError("layer norms compute in integers only over the last axis")
