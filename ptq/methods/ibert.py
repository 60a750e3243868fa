"""I-BERT's layers: softmax, GELU, SiLU and layer norm in integers.

Kim et al., "I-BERT: Integer-only BERT Quantization", ICML 2021 (arXiv 2101.01321). Each comes as
published (ptq.integer.published) and refined (ptq.integer).
"""

import math
from collections.abc import Callable
from functools import partial
from types import NoneType

import torch
from torch import Tensor, nn

from mobilevit import AttentionCore
from ptq.formats import Uniform
from ptq.integer import OutOfRange, published
from ptq.integer.activations import gelu, silu
from ptq.integer.rescale import fits, look_up
from ptq.layers import LAYERS, IntegerLayer, Quantizer
from ptq.methods.fq_vit import LogSoftmaxCore, check_spec, integer_norm, parameters
from ptq.recipe import LayerSpec

FRACTION = 12  # bits of a refined sigmoid


class IntegerCore(LogSoftmaxCore):
    """softmax(q k^T / sqrt(d/h)) v over [B*P, h, N, d/h], its softmax in integers to even levels.

    The softmax takes the sums of products of codes as they are, of 32 bits, without a format.
    """

    coded = ("q", "k", "v")
    formats_of_softmax = Uniform

    def scores(self, q: Tensor, k: Tensor) -> tuple[Tensor, float]:
        queries, keys = self.inputs["q"], self.inputs["k"]
        # Sums below 2**53 are exact in float64, which torch multiplies many times faster.
        sums = queries.integers(q).double() @ keys.integers(k).double().mT
        return sums.long(), float(queries.scale) * float(keys.scale) * q.shape[-1] ** -0.5

    def integer_softmax(self) -> tuple[Callable[[Tensor, float], Tensor], int]:
        if self.published:
            bits = self.attention.bits
            return partial(published.i_softmax, bits=bits), 2**bits
        return super().integer_softmax()


class IntegerNorm(IntegerLayer):
    """A layer norm of [..., C] in integers.

    Refined, its output has a format. As published, it has 32 bits and a scale per channel.
    """

    def __init__(self, layer: nn.LayerNorm, spec: LayerSpec):
        check_spec(layer, spec, output=NoneType if spec.published else Uniform)
        super().__init__()
        self.layer, self.published = layer, spec.published
        self.input, self.output = Quantizer(spec.input, spec.input_observer), nn.Identity()
        if not spec.published:
            self.output = Quantizer(spec.output, spec.input_observer)

    def simulate(self, x: Tensor) -> Tensor:
        return self.output(self.layer(self.input(x)))

    def compute(self, x: Tensor) -> Tensor:
        if not self.published:
            return integer_norm(x, self.layer, self.input, self.output)
        weights = parameters(self.layer, x.device)
        return published_norm(self.input.integers(x), *weights, self.normalised)

    def normalised(self, codes: Tensor) -> Tensor:
        """Normalise as I-BERT does, in units of sqrt(C) / 2**30.

        Deviation: the shift before squares are summed follows from C and the bits, not from data.
        """
        n, bits = codes.shape[-1], self.input.format.width
        shift = max(math.ceil((math.log2(n) + 2 * bits - 2 - 32) / 2), 0)
        return published.i_layer_norm(codes, shift)


def published_norm(codes: Tensor, weight: Tensor, bias: Tensor, normalised: Callable) -> Tensor:
    """Normalise integers [..., C] as I-BERT's and I-ViT's code does; float32 values.

    `normalised` gives integers in units of sqrt(C) / 2**30. Eps is left out. The bias over the
    weight is held in 63 bits: where it is beyond 2 sqrt(C), 32 do not hold it.
    OutOfRange for a token without variance, and for a weight of 0.
    """
    n = codes.shape[-1]
    if (weight == 0).any():
        raise OutOfRange("the published layer norm divides by a weight, and one is 0")
    scale = math.sqrt(n) / 2**30
    offset = (bias.double() / weight.double() / scale).floor().long()
    y = normalised(codes) + fits(offset, 62, "the bias over the weight")
    return (y * (scale * weight.double())).float()


class IntegerActivation(IntegerLayer):
    """SiLU or GELU in integers."""

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
        return look_up(values, fmt.encode(x, *quantizer.grid) - fmt.qmin)

    def integers(self, codes: Tensor, scale: float) -> tuple[Tensor, float]:
        """Return what the layer makes of integers in units of `scale`: integers and their scale."""
        if isinstance(self.layer, nn.GELU):
            if self.published:
                return published.i_gelu(codes, scale)
            return gelu(codes, scale, FRACTION, self.input.format.width), scale / 2**FRACTION
        if self.published:
            return published.i_silu(codes, scale, 8), scale / 2**8
        return silu(codes, scale, FRACTION), scale / 2**FRACTION


LAYERS["i-bert-norm"] = {nn.LayerNorm: IntegerNorm}
LAYERS["i-bert-core"] = {AttentionCore: IntegerCore}
LAYERS["i-bert-act"] = {nn.SiLU: IntegerActivation, nn.GELU: IntegerActivation}
