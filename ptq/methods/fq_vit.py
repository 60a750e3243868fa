"""FQ-ViT's layers: layer norm with power-of-two factors, and attention with log-int-softmax.

Lin et al., "FQ-ViT: Post-Training Quantization for Fully Quantized Vision Transformer", IJCAI 2022
(arXiv 2111.13824). Each comes as published, the code's arithmetic with its faults, and corrected.
"""

from collections.abc import Callable
from functools import partial
from types import NoneType, UnionType

import torch
from torch import Tensor, nn

from mobilevit import AttentionCore
from ptq.formats import Log2, PowerOfTwo, Uniform
from ptq.integer import OutOfRange, published
from ptq.integer.activations import log2_powers, log2_softmax, softmax
from ptq.integer.norm import layer_norm, layer_norm_table
from ptq.layers import LAYERS, IntegerLayer, Quantizer
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
        self.last = self.format.rows(x.detach().float())

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


def parameters(norm: nn.LayerNorm, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a layer norm's weight and bias [C], 1 and 0 where it has none."""
    ones = torch.ones(norm.normalized_shape, device=device)
    weight = ones if norm.weight is None else norm.weight.detach()
    return weight, torch.zeros_like(weight) if norm.bias is None else norm.bias.detach()


class PowerOfTwoNorm(IntegerLayer):
    """A layer norm of [..., C] in integers between a PowerOfTwo input and a uniform output."""

    def __init__(self, layer: nn.LayerNorm, spec: LayerSpec):
        check_spec(layer, spec, input=PowerOfTwo, output=Uniform)
        super().__init__()
        self.layer, self.published = layer, spec.published
        channels = layer.normalized_shape[-1]
        self.input = PowerOfTwoQuantizer(spec.input, channels, spec.published)
        self.output = Quantizer(spec.output, spec.input_observer)

    def simulate(self, x: Tensor) -> Tensor:
        return self.output(self.layer(self.input(x)))

    def compute(self, x: Tensor) -> Tensor:
        if not self.published:
            return integer_norm(x, self.layer, self.input, self.output)
        scale, out_scale = float(self.input.scale), float(self.output.scale)
        weights = parameters(self.layer, x.device)
        y = published_norm(self.input.integers(x), scale, *weights, out_scale)
        return self.output(y.float())


def integer_norm(x: Tensor, norm: nn.LayerNorm, input: Quantizer, output: Quantizer) -> Tensor:
    """Normalise [..., C] by `ptq.integer.norm`, from the codes of `input` to those of `output`."""
    scales = float(input.scale), float(output.scale)
    table = layer_norm_table(*parameters(norm, x.device), norm.eps, *scales)
    limits = (end - int(output.zero_point) for end in (output.format.qmin, output.format.qmax))
    y = layer_norm(input.integers(x), table, *limits, input.format.width)
    return y * output.scale


def published_norm(
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


class LogSoftmaxCore(IntegerLayer):
    """softmax(q k^T / sqrt(d/h)) v over [B*P, h, N, d/h], its softmax in integers.

    `coded`: the tensors with quantizers. The softmax puts out codes of `attention`: powers of two,
    which make shifts of the product with v, or even levels of 1 / (a whole number).
    """

    coded = ("q", "k", "v", "scores")
    formats_of_softmax = Log2 | Uniform

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
        if isinstance(self.attention, Log2):  # decoded, as 64 bits do not hold 2**127
            if self.published:
                codes = published.log_int_softmax(scores, scale, self.attention.bits)
            else:
                codes = log2_softmax(scores, scale, self.attention)
            return self.attention.decode(codes)
        softmax, one = self.integer_softmax()
        return softmax(scores, scale).double() / one

    def integer_softmax(self) -> tuple[Callable[[Tensor, float], Tensor], int]:
        """Return a function of scores and their scale to integers, and the integer that is 1."""
        if isinstance(self.attention, Log2):
            return partial(log2_powers, format=self.attention), 2 ** (self.attention.zero - 1)
        return even_softmax(softmax, self.inputs["attention"])


def even_softmax(softmax: Callable, attention: Quantizer) -> tuple[Callable, int]:
    """Return `softmax` in units of 1 / levels, and levels: the nearest to the quantizer's scale."""
    levels = max(round(1 / float(attention.scale)), 1)
    return partial(softmax, levels=levels, qmax=attention.format.qmax), levels


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


def _core(core: AttentionCore, spec: LayerSpec) -> LogSoftmaxCore:
    layer = LogSoftmaxCore(core, spec)
    theirs = Log2(spec.attention.bits, "3/2", zero_code=False)
    if spec.published and spec.attention != theirs:
        raise ValueError("FQ-ViT's code has powers of two, rounds at 3/2 and has no code of 0")
    return layer


LAYERS["fq-vit-norm"] = {nn.LayerNorm: PowerOfTwoNorm}
LAYERS["fq-vit-core"] = {AttentionCore: _core}
