"""I-ViT's layers: softmax, GELU and SiLU by shifts and sums, layer norm by ten steps of Newton's.

Li and Gu, "I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference", ICCV 2023
(arXiv 2207.01405). Each comes as published (ptq.integer.published) and corrected. A layer norm is
only published: corrected, it would be I-BERT's (ptq.methods.ibert).
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ptq.integer import published
from ptq.integer.activations import FRACTION, shift_silu, shift_softmax
from ptq.integer.layers import (
    IntegerActivation,
    IntegerNorm,
    IntegerSoftmaxCore,
    check_spec,
    norm_with_channel_scales,
)
from ptq.layers import Quantizer
from ptq.recipe import LayerSpec


class ShiftmaxCore(IntegerSoftmaxCore):
    """An attention core whose softmax is one by shifts."""

    def integer_softmax(self) -> tuple[Callable[[Tensor, float], Tensor], int]:
        if self.published:
            bits = self.attention.bits
            return partial(published.shiftmax, bits=bits), 2 ** (bits - 1)
        return self.to_even_levels(shift_softmax)


class ShiftActivation(IntegerActivation):
    """SiLU, or GELU as x sigmoid(1.702 x), by shifts.

    As published, what becomes of an element depends on the largest of its row, the last axis.
    """

    def compute(self, x: Tensor) -> Tensor:
        if not self.published:
            return super().compute(x)
        scale = float(self.input.scale)
        y = published.shift_gelu(self.input.integers(x), scale, self.slope)
        return (y.double() * scale / 2**7).float()

    def integers(self, codes: Tensor, scale: float) -> tuple[Tensor, float]:
        return shift_silu(codes, scale, self.slope), scale / 2**FRACTION

    @property
    def slope(self) -> float:
        return 1.702 if isinstance(self.layer, nn.GELU) else 1.0


class ShiftNorm(IntegerNorm):
    """A layer norm of [..., C] as published: 32 bits and a scale per channel."""

    def __init__(self, layer: nn.LayerNorm, spec: LayerSpec):
        if not spec.published:
            raise ValueError(f"{spec.kind} layers are as published: refined, they are i-bert-norm")
        check_spec(layer, spec)
        super().__init__(layer, spec, Quantizer(spec.input, spec.input_observer))

    def as_published(self, codes: Tensor) -> Tensor:
        normalised = published.shift_layer_norm(codes)
        return norm_with_channel_scales(normalised, *self.weight_and_bias())
