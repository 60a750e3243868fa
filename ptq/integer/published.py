"""Integer operators as the papers and their code have them, to compare ours with.

I-BERT: Kim et al., "I-BERT: Integer-only BERT Quantization", ICML 2021, and its code. I-ViT: Li and
Gu, "I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference", ICCV 2023, and
its code. FQ-ViT: Lin et al., IJCAI 2022, and its code. What they compute in float32, which holds 24
bits, is computed in int64 here, and OutOfRange raised where that does not hold it.
"""

import math

import torch
from torch import Tensor

from ptq.integer.rescale import OutOfRange, bit_length, fits, isqrt, positive, round_divide

EXP_SHIFT = 30  # I-BERT's n


def i_exp_constants(scale: float) -> tuple[int, int, int]:
    """Return b, c and -ln 2 of I-BERT's polynomial, floored in units of the codes."""
    positive(scale, "the scale of what i-exp takes in")
    return (
        math.floor(0.96963238 / 0.35815147 / scale),
        math.floor(1 / 0.35815147 / scale**2),
        math.floor(-0.6931 / scale),
    )


def i_exp_parts(codes: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the polynomial L of codes <= 0 and its halvings z: exp is L / 2**z."""
    b, c, ln2 = i_exp_constants(scale)
    codes = fits(codes, 32, "what i-exp takes in").clamp(min=EXP_SHIFT * ln2)
    halvings = codes // ln2
    rest = codes - ln2 * halvings
    return fits(rest * (rest + b) + c, 62, "i-exp's polynomial"), halvings


def i_exp(codes: Tensor, scale: float) -> Tensor:
    """Return I-BERT's exp of codes <= 0, in units of 0.35815147 scale**2 / 2**30; section 3.5.

    Where scores have 8 bits, it has 40 and more, and never fits 32.
    """
    polynomial, halvings = i_exp_parts(codes, scale)
    return fits(polynomial, 33, "i-exp before its shift by 30") << (EXP_SHIFT - halvings)


def _i_exp_of_16_bits(codes: Tensor, scale: float) -> Tensor:
    """Return `i_exp` of codes <= 0 in 16 bits, scaled so that exp(0) is 32767.

    Every row holds exp(0), its largest. Where the polynomial has more than 31 bits, those beyond
    are dropped first. Float32, in which theirs is computed, holds 24.
    """
    polynomial, halvings = i_exp_parts(codes, scale)
    one = i_exp_constants(scale)[1]
    dropped = max(one.bit_length() - 31, 0)
    return round_divide((polynomial >> dropped) * 32767, one >> dropped << halvings)


def i_softmax(scores: Tensor, scale: float, bits: int = 8) -> Tensor:
    """Return I-BERT's softmax over the last axis, in units of 2**-bits.

    1 is 2**bits, one code too many. As in the code, exp is rounded to 16 bits, and the reciprocal
    of the sum is floored.
    """
    e = _i_exp_of_16_bits(scores - scores.amax(-1, keepdim=True), scale)
    return (e * (2**32 // e.sum(-1, keepdim=True))) >> (32 - bits)


def log_int_softmax(scores: Tensor, scale: float, bits: int) -> Tensor:
    """Return FQ-ViT's softmax over the last axis as codes k of 2**-k, and 2**bits for 0.

    Section 3.3. As in the code, the ratio of sum and exp is rounded to an integer, and its
    logarithm up from 1.5 times a power of 2. With that of 0 there are 2**bits + 1 codes.
    """
    codes = scores - scores.amax(-1, keepdim=True)
    e = i_exp(codes, scale)
    total = _row_sum(e, "i-exp")
    # Where exp is 0, theirs is infinite and ends as the code of 0.
    ratio = torch.where(e > 0, round_divide(total, e.clamp(min=1)), total)
    floor = bit_length(ratio) - 1
    code = floor + (2 * ratio >= 3 << floor)
    return torch.where(e > 0, code, 2**bits).clamp(max=2**bits)


def _row_sum(e: Tensor, what: str) -> Tensor:
    """Return sums [..., 1] of rows [..., N] of integers from 0 to 2**62, which fit 62 bits.

    A longer sum may wrap around to a small one, so what is checked is that of the upper bits.
    """
    lower = (e % 2**30).sum(-1, keepdim=True)
    upper = (e >> 30).sum(-1, keepdim=True) + (lower >> 30)
    fits(upper, 32, f"the sum of a row of {what}, less its last 30 bits,")
    return (upper << 30) + lower % 2**30


def i_gelu(codes: Tensor, scale: float, shift: int = 0) -> tuple[Tensor, float]:
    """Return I-BERT's GELU and its scale, which is negative; section 3.4.

    `shift`: 0 as in the paper; 14 in the code, which suits int32 accumulators with scales below
    0.001 or so, and leaves nothing of 8-bit codes.
    """
    positive(scale, "the scale of what i-GELU takes in")
    a, b, inner = -0.2888, -1.769, scale / math.sqrt(2)
    b_code, c_code = math.floor(b / inner), math.floor(1 / (a * inner**2))
    clipped = fits(codes, 32, "what i-GELU takes in").abs().clamp(max=-b_code) + b_code
    erf = codes.sign() * fits(clipped * clipped + c_code, 32, "i-GELU's polynomial") >> shift
    one_scale = a * inner**2 * 2**shift
    out = codes * (erf + math.floor(1 / one_scale))
    return fits(out, 32, "i-GELU"), scale * one_scale / 2


def i_silu(codes: Tensor, scale: float) -> Tensor:
    """Return SiLU with I-BERT's exp, in units of scale / 2**8.

    The paper has no SiLU. This is what its exp and its division give for x sigmoid(x).
    """
    e = _i_exp_of_16_bits(-codes.abs(), scale)
    numerator = torch.where(codes >= 0, 32767, e)
    return codes * ((numerator * (2**32 // (e + 32767))) >> 24)


def i_layer_norm(codes: Tensor, shift: int = 0) -> Tensor:
    """Normalise over the last axis as I-BERT does, in units of sqrt(C) / 2**30; section 3.6.

    `shift`: bits dropped before squares are summed, so that the sum fits 32 bits without a sign.
    The mean and the standard deviation are rounded to codes. OutOfRange for a token without
    variance, by which theirs divides.
    """
    n = fits(codes, 32, "what i-LayerNorm takes in").shape[-1]
    y = codes - round_divide(codes.sum(-1, keepdim=True), n)
    squares = fits(((y >> shift) ** 2).sum(-1, keepdim=True), 33, "i-LayerNorm's variance")
    deviation = isqrt(squares) << shift
    if (deviation == 0).any():
        raise OutOfRange("i-LayerNorm divides by 0: a token has no variance")
    return fits((y * (2**31 // deviation)) // 2, 32, "i-LayerNorm")


def shift_exp(codes: Tensor, scale: float, n: int) -> Tensor:
    """Return I-ViT's exp of codes <= 0, in units of scale / 2**n.

    log2(e) is 1.4375, and 2**x a line between powers of two.
    """
    positive(scale, "the scale of what ShiftExp takes in")
    one = -math.floor(-1 / scale)
    p = (codes + (codes >> 1) - (codes >> 4)).clamp(min=-n * one)
    halvings = -p // one
    line = p + one * halvings + 2 * one
    # Codes above 0, which Shiftmax never has, would leave 64 bits: what divides by this has 31.
    largest = int(line.max()) if line.numel() else 0
    shift = (n - halvings).clamp(max=62 - largest.bit_length())
    return fits((line << shift) >> 1, 62, "ShiftExp")


def shiftmax(scores: Tensor, scale: float, bits: int = 8) -> Tensor:
    """Return I-ViT's softmax over the last axis, in units of 2**-(bits - 1)."""
    e = shift_exp(scores - scores.amax(-1, keepdim=True), scale, n=15)
    return _shift_division(e, _row_sum(e, "ShiftExp"), bits)


def shift_gelu(codes: Tensor, scale: float, slope: float = 1.702) -> Tensor:
    """Return I-ViT's GELU of rows along the last axis, in units of scale / 2**7.

    A slope of 1 makes it SiLU, which the paper does not have.
    """
    largest = codes.amax(-1, keepdim=True)
    e = shift_exp(codes - largest, slope * scale, n=23)
    return codes * _shift_division(e, e + shift_exp(-largest, slope * scale, n=23), bits=8)


def _shift_division(e: Tensor, total: Tensor, bits: int) -> Tensor:
    factor = (2**31 - 1) // total.clamp(max=2**31 - 1)
    return (e * factor) >> (31 - bits + 1)


def shift_isqrt(n: Tensor) -> Tensor:
    """Return I-ViT's root: ten of Newton's steps from 2**16, too few for n below about 31,000."""
    x = torch.full_like(n, 2**16)
    for _ in range(10):
        x = (x + n // x) // 2
    return x


def shift_layer_norm(codes: Tensor) -> Tensor:
    """Normalise over the last axis as I-ViT does, in units of sqrt(C) / 2**30."""
    y = codes - round_divide(codes.sum(-1, keepdim=True), codes.shape[-1])
    squares = fits((y * y).sum(-1, keepdim=True), 62, "I-ViT's variance")
    return fits((y * ((2**31 - 1) // shift_isqrt(squares))) // 2, 32, "I-ViT's layer norm")
