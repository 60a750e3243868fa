"""FQ-ViT's layers: layer norm with power-of-two factors, and attention with log-int-softmax.

Lin et al., "FQ-ViT: Post-Training Quantization for Fully Quantized Vision Transformer", IJCAI 2022
(arXiv 2111.13824). Each comes as published, the code's arithmetic with its faults, and corrected.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mobilevit import AttentionCore
from ptq.formats import Log2, PowerOfTwo, Uniform
from ptq.integer import OutOfRange, published
from ptq.integer.activations import log2_powers, log2_softmax
from ptq.integer.layers import IntegerNorm, IntegerSoftmaxCore, check_spec
from ptq.layers import Quantizer
from ptq.observers import Histogram, MinMax
from ptq.recipe import LayerSpec


class Factors:
    """The observer of PowerOfTwo as published: `range()` gives low [1], high [1] and shifts [C].

    Ends are those of all tensors; shifts are those of least squared error on the last one.
    """

    def __init__(self, format: PowerOfTwo):
        self.format, self.seen, self.last = format, MinMax(format.whole), None

    def update(self, x: Tensor) -> None:
        self.seen.update(x)
        self.last = self.format.rows(x.detach().float()).clone()  # others may write on x

    def range(self) -> tuple[Tensor, Tensor, Tensor]:
        low, high = self.seen.range()
        return low, high, errors(self.format, low, high, self.last).argmin(0)


class HistogramFactors:
    """The observer of PowerOfTwo, corrected.

    Shifts are those of least squared error on all tensors, through a histogram for each channel.
    The zero-point is that of the range or one in the middle, whichever errs less.
    """

    def __init__(self, format: PowerOfTwo):
        self.format, self.seen, self.channels = format, MinMax(format.whole), Histogram(format)

    def update(self, x: Tensor) -> None:
        self.seen.update(x)
        self.channels.update(x)

    def range(self) -> tuple[Tensor, Tensor, Tensor]:
        low, high = self.seen.range()
        qmax = self.format.whole.qmax
        half = (qmax + 1) // 2  # so many levels below 0, and one less above
        widest = torch.maximum(-low, high * half / (qmax - half))
        ranges = (low, high), (-widest, widest * (qmax - half) / half)
        values, counts = self.channels.centres(), self.channels.counts
        costs = [errors(self.format, *ends, values, counts) for ends in ranges]  # [most + 1, C]
        best = min((0, 1), key=lambda i: float(costs[i].amin(0).sum()))
        return *ranges[best], costs[best].argmin(0)


def errors(format: PowerOfTwo, low: Tensor, high: Tensor, rows: Tensor, weights=None) -> Tensor:
    """Sum the squared errors of `rows` [C, n] for each shift: [most + 1, C]."""
    scale, zero_point = format.grid(low, high)
    whole, each = format.whole, []
    for shift in range(format.most + 1):
        levels = whole.nearest(rows, scale * 2**shift, zero_point)
        error = (rows - levels).square()
        each.append((error if weights is None else error * weights).sum(1))
    return torch.stack(each)


class PowerOfTwoQuantizer(Quantizer):
    """A quantizer of [..., C] whose scale is doubled `shifts[c]` times, int64 [C]."""

    def __init__(self, format: PowerOfTwo, channels: int, published: bool):
        super().__init__(format, "factors as published" if published else "factors")
        self.published = published
        self.register_buffer("shifts", torch.zeros(channels, dtype=torch.int64))

    def observe(self) -> None:
        self.observer = (Factors if self.published else HistogramFactors)(self.format)
        self.scale = self.zero_point = None

    def freeze(self) -> None:
        low, high, self.shifts = self.observer.range()
        self.scale, self.zero_point = self.format.grid(low, high)
        self.observer = None

    @property
    def grid(self) -> tuple[Tensor, ...]:
        return self.scale, self.zero_point, self.shifts


class PowerOfTwoNorm(IntegerNorm):
    """A layer norm of [..., C] in integers between a PowerOfTwo input and a uniform output."""

    def __init__(self, layer: nn.LayerNorm, spec: LayerSpec):
        check_spec(layer, spec, input=PowerOfTwo, output=Uniform)
        channels = layer.normalized_shape[-1]
        super().__init__(layer, spec, PowerOfTwoQuantizer(spec.input, channels, spec.published))

    def as_published(self, codes: Tensor) -> Tensor:
        scale, out_scale = float(self.input.scale), float(self.output.scale)
        return self.output(fq_vit_norm(codes, scale, *self.weight_and_bias(), out_scale).float())


def fq_vit_norm(
    codes: Tensor, scale: float, weight: Tensor, bias: Tensor, out_scale: float
) -> Tensor:
    """Normalise integers [..., C] in units of `scale` as FQ-ViT's code does; float64 values.

    Means and multipliers are floats, a pair for every token and channel. The multiplier is floored
    to 8 bits, eps left out. OutOfRange for a token without variance, by which theirs divides.
    """
    n = codes.shape[-1]
    total = codes.sum(-1, keepdim=True)
    variance = n * (codes * codes).sum(-1, keepdim=True) - total * total
    if (variance == 0).any():
        raise OutOfRange("FQ-ViT's layer norm divides by 0: a token has no variance")
    mean, deviation = scale / n * total.double(), scale / n * variance.double().sqrt()
    weight, bias = weight.double(), bias.double()
    factor = scale * weight / (deviation * out_scale)  # [..., C]
    shift = (7 - factor.abs().log2().floor()).clamp(0, 31)
    multiplier = (factor.abs() * 2**shift).floor().clamp(0, 255)
    offset = ((bias - mean * weight / deviation) / out_scale * 2**shift).round()
    return ((factor.sign() * multiplier * codes + offset) / 2**shift).round() * out_scale


class LogSoftmaxCore(IntegerSoftmaxCore):
    """An attention core whose softmax gives powers of two, or even levels.

    Powers of two make shifts of the product with v.
    """

    formats_of_softmax = Log2 | Uniform

    def __init__(self, core: AttentionCore, spec: LayerSpec):
        super().__init__(core, spec)
        theirs = Log2(spec.attention.bits, "3/2", zero_code=False)
        if spec.published and spec.attention != theirs:
            raise ValueError("FQ-ViT's code has powers of two, rounds at 3/2 and has no code of 0")

    def weights(self, scores: Tensor, scale: float) -> Tensor:
        if isinstance(self.attention, Uniform):
            return super().weights(scores, scale)
        if self.published:
            codes = published.log_int_softmax(scores, scale, self.attention.bits)
        else:
            codes = log2_softmax(scores, scale, self.attention)
        return self.attention.decode(codes)  # as 64 bits do not hold 2**127

    def integer_softmax(self) -> tuple[Callable[[Tensor, float], Tensor], int]:
        if isinstance(self.attention, Uniform):
            return super().integer_softmax()
        return partial(log2_powers, format=self.attention), 2 ** (self.attention.zero - 1)
