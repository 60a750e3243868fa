"""I-BERT's layers: softmax, GELU, SiLU and layer norm in integers.

Kim et al., "I-BERT: Integer-only BERT Quantization", ICML 2021 (arXiv 2101.01321). Each comes as
published (ptq.integer.published) and refined (ptq.integer).
"""

import math
from collections.abc import Callable
from functools import partial
from types import NoneType

from torch import Tensor, nn

from ptq.formats import Uniform
from ptq.integer import published
from ptq.integer.activations import FRACTION, gelu, silu
from ptq.integer.layers import (
    IntegerActivation,
    IntegerNorm,
    IntegerSoftmaxCore,
    check_spec,
    norm_with_channel_scales,
)
from ptq.layers import Quantizer
from ptq.recipe import LayerSpec


class IBertCore(IntegerSoftmaxCore):
    """An attention core whose softmax takes the sums of products of codes as they are.

    These have 32 bits and no format.
    """

    coded = ("q", "k", "v")

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


class IBertNorm(IntegerNorm):
    """A layer norm of [..., C]; as published, its output has 32 bits and a scale per channel."""

    def __init__(self, layer: nn.LayerNorm, spec: LayerSpec):
        check_spec(layer, spec, output=NoneType if spec.published else Uniform)
        super().__init__(layer, spec, Quantizer(spec.input, spec.input_observer))

    def as_published(self, codes: Tensor) -> Tensor:
        """Normalise as I-BERT's code does, without eps.

        Deviation: the shift before squares are summed follows from C and the bits, not from data.
        """
        n, bits = codes.shape[-1], self.input.format.width
        shift = max(math.ceil((math.log2(n) + 2 * bits - 2 - 32) / 2), 0)
        normalised = published.i_layer_norm(codes, shift)
        return norm_with_channel_scales(normalised, *self.weight_and_bias())


class IBertActivation(IntegerActivation):
    """SiLU or GELU by I-BERT's exp; as published, GELU by its polynomial."""

    def integers(self, codes: Tensor, scale: float) -> tuple[Tensor, float]:
        if isinstance(self.layer, nn.GELU):
            if self.published:
                return published.i_gelu(codes, scale)
            return gelu(codes, scale, self.input.format.width), scale / 2**FRACTION
        if self.published:
            return published.i_silu(codes, scale), scale / 2**8
        return silu(codes, scale), scale / 2**FRACTION
