"""Operators of an integer network as modules: int64 tensors in and out, all constants integers.

Between two operators a tensor has one scale and fits int32; a layer with quantized inputs rescales
what it takes in to their codes, less the zero-point. Matrix products are computed in int64 or, to
the same bits and many times faster, in float64: integers below 2**53 are exact there, and no sum
here reaches 2**31.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptq.formats import PowerOfTwo, Uniform
from ptq.integer.norm import LayerNormTable, layer_norm
from ptq.integer.rescale import (
    Dyadic,
    OutOfRange,
    dyadic,
    look_up,
    requantize,
    rescale,
    round_divide,
)


@dataclass(frozen=True)
class Codes:
    """What is known of a tensor of integers beforehand.

    Values are `scale` times the integers, and none of these is larger than `reach` in size.
    """

    scale: float
    reach: int

    @property
    def largest(self) -> float:
        return self.scale * self.reach


def finest_codes(largest: float) -> Codes:
    """Return the finest codes of 32 bits for values up to `largest` in size.

    A bit is left for rounding. What a layer can give at most follows from its weights, so nothing
    has to be calibrated, and nothing is cut off.
    """
    return Codes(largest / 2**30 if largest > 0 else 1.0, 2**30 + 1)


def dyadic_ratios(numbers: Iterable[float]) -> Dyadic:
    """Return ratios of scales, cut off to what `dyadic` takes.

    Codes times a smaller one are 0 in any case, and a larger one belongs to codes that are all 0.
    """
    return dyadic([min(max(number, 2.0**-32), 2.0**29) for number in numbers])


def integer_product(a: Tensor, b: Tensor, largest: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix product of integers, computed in `dtype`: int64 or float64, which agree.

    `largest`: what a product of two elements is at most, in size. OutOfRange if a sum of so many
    might leave int32.
    """
    if a.shape[-1] * largest >= 2**31:
        raise OutOfRange(f"sums of {a.shape[-1]} products up to {largest} do not fit 32 bits")
    return (a.to(dtype) @ b.to(dtype)).long()


class Rescale(nn.Module):
    """The way from codes of one scale, or of many along an axis, to those of another.

    `trailing`: how many axes follow that axis.
    """

    def __init__(self, scales: Sequence[float], to: float, trailing: int = 0):
        super().__init__()
        number = dyadic_ratios(scale / to for scale in scales)
        for name in ("multiplier", "shift"):
            self.register_buffer(name, getattr(number, name).view(-1, *[1] * trailing))

    def forward(self, x: Tensor) -> Tensor:
        return rescale(x, Dyadic(self.multiplier, self.shift))


class Requantize(nn.Module):
    """The way from codes of one scale to those of a quantizer, less its zero-point.

    `scales` are the quantizer's, and `reach` bounds the result.
    """

    def __init__(self, x: Codes, quantizer: nn.Module):
        super().__init__()
        fmt = quantizer.format
        self.scales, zero_point = quantizer.scale.tolist(), quantizer.zero_point.long()
        factors, trailing, most = [1], 0, 0
        self.register_buffer("doublings", None)
        if isinstance(fmt, PowerOfTwo):
            self.doublings, most, fmt = quantizer.shifts, fmt.most, fmt.whole
            factors = (1 << self.doublings).tolist()
        elif fmt.granularity == "channel":
            if fmt.axis != 1:
                raise ValueError("its input has scales along another axis than that of channels")
            trailing = 2
        grid = [scale * factor for scale in self.scales for factor in factors]
        number = dyadic_ratios(x.scale / scale for scale in grid)
        limits = fmt.qmin - zero_point, fmt.qmax - zero_point
        parts = number.multiplier, number.shift, *limits
        for name, part in zip(("multiplier", "shift", "low", "high"), parts):
            self.register_buffer(name, part.view(-1, *[1] * trailing))
        self.reach = int(torch.maximum(-self.low, self.high).max()) << most

    def forward(self, x: Tensor) -> Tensor:
        x = requantize(x, Dyadic(self.multiplier, self.shift), self.low, self.high)
        return x if self.doublings is None else x << self.doublings


def patches(x: Tensor, groups: int, padding, kernel, stride, dilation) -> Tensor:
    """Return what each filter of a convolution multiplies, its settings pairs along H and W.

    [B, C, H, W] -> [B, groups, C/groups * k * k, H', W']. F.unfold is for floats alone.
    """
    top, left = padding
    x = F.pad(x, (left, left, top, top))
    for axis, k, step, gap in zip((2, 3), kernel, stride, dilation):
        x = x.unfold(axis, gap * (k - 1) + 1, step)[..., ::gap]
    x = x.permute(0, 1, 4, 5, 2, 3)  # [B, C, H', W', k, k] -> [B, C, k, k, H', W']
    each = math.prod(x.shape[1:4]) // groups  # not -1, which an empty batch leaves open
    return x.reshape(len(x), groups, each, *x.shape[-2:])


class Product(nn.Module):
    """A convolution [B, C, H, W] or linear layer [..., C] with its bias, to int32 of one scale.

    `layer` is a QuantizedLayer. Convolutions multiply matrices of unfolded patches.
    """

    def __init__(self, layer: nn.Module, x: Codes, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.input = dtype, Requantize(x, layer.input)
        conv, self.window = layer.layer, None  # or what `patches` takes besides its input
        n, trailing, groups = len(layer.codes), 0, 1
        if isinstance(conv, nn.Conv2d):
            trailing, groups = 2, conv.groups
            self.window = groups, conv.padding, conv.kernel_size, conv.stride, conv.dilation
        inputs = self.input.scales
        if len(inputs) > 1:  # output channel o takes in the input channel of its group alone
            if groups != len(inputs):
                raise ValueError("its input has a scale per channel and it adds channels up")
            inputs = [scale for scale in inputs for _ in range(n // groups)]
        scales = [a * b for a, b in zip(itertools.cycle(inputs), layer.scale.expand(n).tolist())]
        weight = layer.codes.long().flatten(1)
        bias = torch.zeros(n) if layer.layer.bias is None else layer.layer.bias.detach()
        sums = (weight.abs().sum(1) * self.input.reach).tolist()
        reaches = [s * most + abs(b) for s, most, b in zip(scales, sums, bias.tolist())]
        self.codes = finest_codes(max(reaches))
        self.output = Rescale(scales, self.codes.scale, trailing)
        self.largest = int(weight.abs().max()) * self.input.reach
        bias = (bias.double() / self.codes.scale).round().long()
        self.register_buffer("bias", bias.view(-1, *[1] * trailing))
        weight = weight.view(groups, n // groups, -1) if self.window else weight.T
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        if self.window is None:
            sums = integer_product(x, self.weight, self.largest, self.dtype)
        else:
            x = patches(x.to(self.dtype), *self.window)
            sums = integer_product(self.weight, x.flatten(3), self.largest, self.dtype)
            sums = sums.view(len(x), len(self.bias), *x.shape[3:])
        return self.output(sums) + self.bias


class Table(nn.Module):
    """SiLU or GELU, as a table of what its integer arithmetic makes of every code."""

    def __init__(self, layer: nn.Module, x: Codes):
        super().__init__()
        self.input = Requantize(x, layer.input)
        low, high = int(self.input.low), int(self.input.high)
        values, scale = layer.integers(torch.arange(low, high + 1), self.input.scales[0])
        self.register_buffer("values", values)
        self.codes = Codes(scale, int(values.abs().max()))

    def forward(self, x: Tensor) -> Tensor:
        return look_up(self.values, self.input(x) - self.input.low)


class Norm(nn.Module):
    """A layer norm [..., C] from the codes of its input's format to those of its output's."""

    def __init__(self, layer: nn.Module, x: Codes):
        super().__init__()
        self.input = Requantize(x, layer.input)
        table, *self.limits, self.bits = layer.constants()
        self.register_buffer("gain", table.gain)
        self.register_buffer("offset", table.offset)
        self.shift, self.epsilon = table.shift, table.epsilon
        self.codes = Codes(float(layer.output.scale), max(-self.limits[0], self.limits[1]))

    def forward(self, x: Tensor) -> Tensor:
        table = LayerNormTable(self.gain, self.offset, self.shift, self.epsilon)
        return layer_norm(self.input(x), table, *self.limits, self.bits)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d/h)) v over [B*P, h, N, d/h].

    `core` is one of ours that gives its integer softmax. That takes in the sums of products or,
    where the core has a quantizer of scores, codes. A softmax of powers of two is multiplied as
    such; a processor would shift.
    """

    def __init__(self, core: nn.Module, q: Codes, k: Codes, v: Codes, dtype: torch.dtype):
        super().__init__()
        self.dtype, quantizers = dtype, core.inputs
        self.q, self.k, self.v = (
            Requantize(x, quantizers[name]) for x, name in ((q, "q"), (k, "k"), (v, "v"))
        )
        self.scale = self.q.scales[0] * self.k.scales[0]  # of scores, but for the width of a head
        self.grid = None  # of the scores' codes: scale, lowest and highest less the zero-point
        if "scores" in quantizers:
            scores = quantizers["scores"]
            zero_point, fmt = int(scores.zero_point), scores.format
            self.grid = float(scores.scale), fmt.qmin - zero_point, fmt.qmax - zero_point
        self.softmax, one = core.integer_softmax()
        self.codes = Codes(self.v.scales[0] / one, 2**31 - 1)
        # Even levels may be so fine that their codes end below 1.
        fmt = core.attention
        self.largest = (min(one, fmt.qmax) if isinstance(fmt, Uniform) else one) * self.v.reach

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.q(q), self.k(k), self.v(v)
        scores = integer_product(q, k.mT, self.q.reach * self.k.reach, self.dtype)
        scale = self.scale * q.shape[-1] ** -0.5
        if self.grid is not None:
            fine, (scale, low, high) = scale, self.grid
            scores = requantize(scores, dyadic(fine / scale), low, high)
        return integer_product(self.softmax(scores, scale), v, self.largest, self.dtype)


class ClippedReLU(nn.Module):
    """Values cut off below 0 and above `most`, which gets a code of its own."""

    def __init__(self, x: Codes, most: float):
        super().__init__()
        self.codes = Codes(most / 2**30, 2**30)
        self.ratio = dyadic_ratios([x.scale / self.codes.scale])

    def forward(self, x: Tensor) -> Tensor:
        return requantize(x, self.ratio, 0, self.codes.reach)


class Sum(nn.Module):
    """The sum of two tensors, each brought to the sum's scale first.

    Kim et al., "I-BERT", ICML 2021, section 3 (residual connections).
    """

    def __init__(self, a: Codes, b: Codes):
        super().__init__()
        self.codes = finest_codes(a.largest + b.largest)
        self.a, self.b = (Rescale([x.scale], self.codes.scale) for x in (a, b))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.a(a) + self.b(b)


class Concatenation(nn.Module):
    """Tensors side by side along an axis, brought to one scale that is fine enough for all."""

    def __init__(self, parts: Sequence[Codes], axis: int):
        super().__init__()
        self.codes = finest_codes(max(part.largest for part in parts))
        self.parts = nn.ModuleList(Rescale([part.scale], self.codes.scale) for part in parts)
        self.axis = axis

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat([scale(x) for scale, x in zip(self.parts, parts)], self.axis)


class Mean(nn.Module):
    """The mean over axes, rounded to a code."""

    def __init__(self, axes: Sequence[int], keep: bool):
        super().__init__()
        self.axes, self.keep = axes, keep

    def forward(self, x: Tensor) -> Tensor:
        count = math.prod(x.shape[axis] for axis in self.axes)
        return round_divide(x.sum(self.axes, keepdim=self.keep), count)


class Constant(nn.Module):
    """A parameter that no layer has, such as the positions of a vision transformer."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.codes = finest_codes(float(values.abs().max()))
        self.register_buffer("values", (values.double() / self.codes.scale).round().long())

    def forward(self) -> Tensor:
        return self.values


class Unresized(nn.Module):
    """A function that resizes feature maps where they do not fit; ValueError where it would."""

    def __init__(self, resize, name: str, settings: Sequence):
        super().__init__()
        self.resize, self.name, self.settings = resize, name, settings

    def forward(self, *inputs: Tensor) -> Tensor:
        try:
            return self.resize(*inputs, *self.settings)
        except NotImplementedError as error:  # torch interpolates no integers
            raise ValueError(
                f"{self.name} interpolates a feature map here, which has no integer form: choose "
                "an image size that leaves it even sides, such as 256"
            ) from error
