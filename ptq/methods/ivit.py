"""I-ViT's layers: softmax, GELU and SiLU by shifts and sums, layer norm by ten steps of Newton's.

Li and Gu, "I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference", ICCV 2023
(arXiv 2207.01405). Each comes as published (ptq.integer.published) and corrected. A layer norm is
only published: corrected, it would be I-BERT's (ptq.methods.ibert).
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from mobilevit import AttentionCore
from ptq.formats import Uniform
from ptq.integer import published
from ptq.integer.activations import shift_silu, shift_softmax
from ptq.layers import LAYERS
from ptq.methods.fq_vit import LogSoftmaxCore, even_softmax
from ptq.methods.ibert import FRACTION, IntegerActivation, IntegerNorm
from ptq.recipe import LayerSpec


class ShiftmaxCore(LogSoftmaxCore):
    """softmax(q k^T / sqrt(d/h)) v over [B*P, h, N, d/h], its softmax by shifts, to even levels."""

    formats_of_softmax = Uniform

    def integer_softmax(self) -> tuple[Callable[[Tensor, float], Tensor], int]:
        if self.published:
            bits = self.attention.bits
            return partial(published.shiftmax, bits=bits), 2 ** (bits - 1)
        return even_softmax(shift_softmax, self.inputs["attention"])


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
        return shift_silu(codes, scale, self.slope, FRACTION), scale / 2**FRACTION

    @property
    def slope(self) -> float:
        return 1.702 if isinstance(self.layer, nn.GELU) else 1.0


class ShiftNorm(IntegerNorm):
    """A layer norm of [..., C] as published: 32 bits and a scale per channel."""

    def __init__(self, layer: nn.LayerNorm, spec: LayerSpec):
        if not spec.published:
            raise ValueError(f"{spec.kind} layers are as published: refined, they are i-bert-norm")
        super().__init__(layer, spec)

    def normalised(self, codes: Tensor) -> Tensor:
        return published.shift_layer_norm(codes)


LAYERS["i-vit-norm"] = {nn.LayerNorm: ShiftNorm}
LAYERS["i-vit-core"] = {AttentionCore: ShiftmaxCore}
LAYERS["i-vit-act"] = {nn.SiLU: ShiftActivation, nn.GELU: ShiftActivation}
