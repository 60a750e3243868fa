"""Layer norm in integers, on codes with shifts per channel."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.integer.rescale import fits, isqrt, positive, round_shift

UNIT = 12  # bits after the point of a normalised value
LARGEST_EPSILON = 2.0 ** (61 + 16)  # the variance is below 2**61


@dataclass(frozen=True)
class LayerNormTable:
    """Integer constants of a layer norm: y = (u * gain + offset) / 2**shift in output codes.

    `gain`, `offset`: int64 [C]; `epsilon`: eps in units of 2**-16 of `C * sum x^2 - (sum x)^2`.
    """

    gain: Tensor
    offset: Tensor
    shift: int
    epsilon: int


def layer_norm_table(
    weight: Tensor, bias: Tensor, eps: float, scale: float, out_scale: float
) -> LayerNormTable:
    """Return the table for inputs of `scale` and outputs of `out_scale`; OutOfRange unless above 0.

    `weight`, `bias`: [C]. The gain takes 15 bits and a sign, or fewer if the offset would leave 46.
    Epsilon is cut off where, with the variance, it would leave 62 bits. Of 768 channels of 16 bits
    less than 0.02 then remains beside the bias.
    """
    positive(scale, "the scale of what a layer norm takes in")
    positive(out_scale, "the scale of what a layer norm puts out")
    weight, bias = weight.double() / out_scale, bias.double() / out_scale
    largest = max(float(weight.abs().max()), 2.0**-20)
    reach = max(float(bias.abs().max()), 1.0)
    shift = UNIT + 14 - math.floor(math.log2(largest))
    shift = max(min(shift, 45 - math.ceil(math.log2(reach)), 62), 1)
    return LayerNormTable(
        (weight * 2.0 ** (shift - UNIT)).round().long(),
        (bias * 2.0**shift).round().long(),
        shift,
        round(min(eps * len(weight) ** 2 / scale**2 * 2**16, LARGEST_EPSILON)),
    )


def normalised(codes: Tensor, bits: int = 12, epsilon: int = 0) -> Tensor:
    """Return (x - mean) / standard deviation over the last axis, in units of 2**-12.

    It is 0 where all are equal. `codes` [..., C] are signed integers of `bits` bits.
    V = C sum x^2 - (sum x)^2, which is C^2 times the variance, is exact: the mean is never rounded.
    Everything fits int64. Kim et al., section 3.6, round the mean and the standard deviation to
    codes.
    """
    n = codes.shape[-1]
    codes = fits(codes, bits, "what a layer norm takes in")
    total = codes.sum(-1, keepdim=True)
    variance = n * (codes * codes).sum(-1, keepdim=True) - total * total
    variance = fits(variance, 62, "the variance of a layer norm")
    # Bits after the point of the root: 8, or fewer where C and the codes are large.
    largest = (n << (bits - 1)) ** 2 + (epsilon >> 16)
    extra = min(max(62 - largest.bit_length(), 0) // 2, 8)
    deviation = isqrt((variance << 2 * extra) + (epsilon >> (16 - 2 * extra)))
    centred = (n * codes - total) << (UNIT + extra)
    return torch.where(deviation > 0, centred // deviation.clamp(min=1), 0)


def layer_norm(codes: Tensor, table: LayerNormTable, low: int, high: int, bits: int) -> Tensor:
    """Normalise codes [..., C] of `bits` bits over the last axis, to codes in [low, high].

    Lin et al., "FQ-ViT", IJCAI 2022, section 3.2, and our own arithmetic: eps is kept, a token
    without variance gives its bias, and multipliers are rounded, of 15 bits, and the same for every
    token (`ptq.methods.fq_vit` has their form).
    """
    u = normalised(codes, bits, table.epsilon)
    return round_shift(u * table.gain + table.offset, table.shift).clamp(low, high)
