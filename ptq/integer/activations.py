"""exp, softmax, sigmoid, SiLU and GELU in integers: I-BERT's polynomial on finer codes.

I-BERT's exp loses most of its accuracy to constants that are rounded in units of the codes: with
8-bit scores of scale 1/16, ln 2 becomes 12 units instead of 11.09. Codes moved to a finer scale
first, by a shift that loses nothing, keep the polynomial's own error of 0.002.
`published` has the papers' forms.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.formats import Log2
from ptq.integer.published import shift_exp
from ptq.integer.rescale import OutOfRange, fits, positive, round_divide, round_shift

# exp(p) ~ A (p^2 + B p + C) on (-ln 2, 0]: Kim et al., "I-BERT: Integer-only BERT Quantization",
# ICML 2021, section 3.5, with the constants of the authors' code.
A = 0.35815147
B = 0.96963238 / A
C = 1 / A

# gelu(x) ~ x sigmoid(sqrt(8 / pi) (x + 0.044715 x^3)): Hendrycks and Gimpel, "Gaussian Error Linear
# Units", arXiv 1606.08415, section 2. It is within 0.0005 of the exact form, I-BERT's within 0.018.
LINEAR, CUBIC = math.sqrt(8 / math.pi), 0.044715 * math.sqrt(8 / math.pi)
GELU_UNIT = 2**-14  # of the sigmoid's argument
FRACTION = 12  # bits of the sigmoid


@dataclass(frozen=True)
class Exp:
    """The integer constants of exp for codes of one scale; `Exp.of` makes them.

    `shift`: how many bits codes move to the left first; below 0 to the right, with rounding. `b`
    and `ln2` are in units of the scale that this gives, `c` in units of its square.
    """

    shift: int
    b: int
    c: int
    ln2: int

    @staticmethod
    def of(scale: float, terms: int = 1) -> "Exp":
        """Return the constants for codes of `scale`; OutOfRange for one that is not above 0.

        The shift is the finest for which `terms` results add up to less than 2**31.
        """
        positive(scale, "the scale of what exp takes in")
        shift = math.floor(math.log2(scale / math.sqrt(C * terms / 2**31)))
        # The constants are rounded, and so may be one too large.
        shift -= round(C / (scale / 2**shift) ** 2) * terms >= 2**31
        fine = scale / 2.0**shift
        return Exp(shift, round(B / fine), round(C / fine**2), max(round(math.log(2) / fine), 1))


def exp(codes: Tensor, table: Exp) -> Tensor:
    """Return exp of codes <= 0: integers in units of 1 / `table.c`, so that 0 gives `table.c`.

    Within 0.0021 of exp for scales up to 1/4. OutOfRange for a code above 0.
    Kim et al., section 3.5 and algorithm 2. Deviations: codes are moved first, constants rounded
    where theirs are floored, and results are not multiplied by 2**30, which int32 does not hold.
    """
    if fits(codes, 32, "what exp takes in").numel() and int(codes.max()) > 0:
        raise OutOfRange("what exp takes in is above 0")
    fine = fits(round_shift(codes, -table.shift), 48, "what exp takes in, on its finer scale")
    halvings = -fine // table.ln2
    rest = fine + table.ln2 * halvings  # in (-ln2, 0]
    halvings = halvings.clamp(max=31)  # none is left of 31 bits
    return fits((rest * (rest + table.b) + table.c) >> halvings, 32, "exp")


def row_exp(scores: Tensor, table: Exp) -> tuple[Tensor, Tensor]:
    """Return exp of scores [..., N] less the row's largest, and sums [..., 1], which fit int32."""
    e = exp(scores - scores.amax(-1, keepdim=True), table)
    return e, fits(e.sum(-1, keepdim=True), 32, "the sum of a row of exp")


def softmax(scores: Tensor, scale: float, levels: int = 255, qmax: int = 255) -> Tensor:
    """Return the softmax over the last axis: codes in [0, qmax] in units of 1 / levels.

    `levels` above `qmax` resolve small values better, and cut off those above qmax / levels.
    Kim et al., section 3.5. Deviations: `exp`'s, and the division is exact.
    """
    e, total = row_exp(scores, Exp.of(scale, scores.shape[-1]))
    return round_divide(e * levels, total).clamp(max=qmax)


def log2_softmax(scores: Tensor, scale: float, format: Log2) -> Tensor:
    """Return the softmax over the last axis as codes of a logarithmic `format`.

    Lin et al., "FQ-ViT: Post-Training Quantization for Fully Quantized Vision Transformer", IJCAI
    2022, section 3.3 (log-int-softmax). Deviations: `exp`'s, and codes follow from the exact ratio
    of sum and exp, not from a rounded one.
    """
    e, total = row_exp(scores, Exp.of(scale, scores.shape[-1]))
    # The code rounded down: how often e doubles before it exceeds the sum.
    floor = torch.zeros_like(e)
    for code in range(1, min(format.zero, 31) + 1):  # the sum is below 2**31
        floor += (e << code) <= total
    doubled = e << floor  # at most the sum
    if format.threshold == "sqrt2":
        up = total * total >= 2 * doubled * doubled
    else:
        numerator, denominator = (3, 2) if format.threshold == "3/2" else (4, 3)
        up = denominator * total >= numerator * doubled
    return torch.where(e > 0, floor + up, format.zero).clamp(max=format.zero)


def log2_powers(scores: Tensor, scale: float, format: Log2) -> Tensor:
    """Return `log2_softmax` as integers in units of the format's smallest power."""
    return format.integers(log2_softmax(scores, scale, format))


def shift_softmax(scores: Tensor, scale: float, levels: int = 255, qmax: int = 255) -> Tensor:
    """Return `softmax` with an exp that takes shifts and sums alone.

    Li and Gu, "I-ViT", ICCV 2023, section 3.4 (Shiftmax). Deviations: codes are moved first, and
    the division is exact. As theirs, ShiftExp falls no lower than 2**-n of the largest: long rows
    keep a floor.
    """
    shift, fine, n, _ = _shift_units(scale, scores.shape[-1])
    rows = fits(scores - scores.amax(-1, keepdim=True), 33, "what ShiftExp takes in")
    e = shift_exp(rows << shift, fine, n)
    total = fits(e.sum(-1, keepdim=True), 32, "the sum of a row of ShiftExp")
    return round_divide(e * levels, total).clamp(max=qmax)


def _shift_units(scale: float, terms: int) -> tuple[int, float, int, int]:
    """Return by how many bits codes move to the left, their scale then, n of ShiftExp, its exp(0).

    ShiftExp rounds 1 up to a whole number of units, so it is made 64 of them at least; fewer in
    long rows, where their bits are missing in n. `terms` results fit 31 bits.
    """
    positive(scale, "the scale of what ShiftExp takes in")
    finest = min(6, 23 - 2 * terms.bit_length())
    shift = min(max(math.ceil(math.log2(scale) + finest), 0), 28)
    fine = scale / 2**shift
    one = math.ceil(1 / fine)
    n = max(31 - (2 * one * terms).bit_length(), 0)
    return shift, fine, n, one << n


def sigmoid(codes: Tensor, scale: float, bits: int = FRACTION) -> Tensor:
    """Return 1 / (1 + exp(-x)) in units of 2**-bits, element by element.

    I-ViT (Li and Gu, ICCV 2023) subtracts the largest element of a row first, and small elements
    lose their digits. exp(-|x|) needs no such thing.
    """
    table = Exp.of(scale, terms=2)
    return _sigmoid(codes, exp(-codes.abs(), table), table.c, bits)


def _sigmoid(codes: Tensor, e: Tensor, one: int, bits: int) -> Tensor:
    """Return the sigmoid from `e`, which is exp(-|x|) in units of 1 / `one`."""
    return round_divide(torch.where(codes >= 0, one, e) << bits, e + one)


def silu(codes: Tensor, scale: float, bits: int = FRACTION) -> Tensor:
    """Return x sigmoid(x) in units of scale / 2**bits, int32; 12 bits are a thousandth off."""
    return fits(codes * sigmoid(codes, scale, bits), 32, "SiLU")


def shift_silu(codes: Tensor, scale: float, slope: float = 1.0) -> Tensor:
    """Return x sigmoid(slope x) in units of scale / 2**FRACTION, int32, by shifts and sums.

    A slope of 1.702 gives GELU. Li and Gu, "I-ViT", ICCV 2023, section 3.5 (ShiftGELU). Deviations:
    codes are moved first, exp(-|x|) does not depend on the largest of a row, and the division is
    exact.
    """
    shift, fine, n, one = _shift_units(slope * scale, 2)
    e = shift_exp(-fits(codes, 32, "what ShiftExp takes in").abs() << shift, fine, n)
    return fits(codes * _sigmoid(codes, e, one, FRACTION), 32, "SiLU by shifts")


def gelu(codes: Tensor, scale: float, width: int = 9) -> Tensor:
    """Return GELU in units of scale / 2**FRACTION, int32, of signed codes of `width` bits.

    Our own: a sigmoid of a cubic polynomial, both in integers.
    """
    positive(scale, "the scale of what GELU takes in")
    fits(codes, width, "what GELU takes in")
    # The polynomial's factors as integers, as fine as its value at the largest code permits.
    largest = 2 ** (width - 1)
    first, third = LINEAR * scale / GELU_UNIT, CUBIC * scale**3 / GELU_UNIT
    fraction = min(61 - math.ceil(math.log2(largest * (first + third * largest**2) + 1)), 40)
    if fraction < 1:
        raise OutOfRange(f"GELU of {width} bits in units of {scale} leaves 63 bits")
    first, third = round(first * 2**fraction), round(third * 2**fraction)
    argument = round_shift(codes * (first + third * codes * codes), fraction)
    argument = argument.clamp(-(2**20), 2**20)  # beyond 64 the sigmoid is 0 or 1
    return fits(codes * sigmoid(argument, GELU_UNIT), 32, "GELU")
