"""Changes of scale in integers, with rounding, and square roots."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class OutOfRange(ValueError):
    """A value does not fit its register in an integer operator, or a scale is not above 0."""


def fits(values: Tensor, bits: int, what: str) -> Tensor:
    """Return `values`, or raise OutOfRange unless they are signed integers of `bits` bits.

    TypeError for a tensor that is not int64: it would be rounded or wrap around unseen.
    """
    if values.dtype != torch.int64:
        raise TypeError(f"{what} is {values.dtype}, not torch.int64")
    if values.numel():
        low, high = (int(end) for end in values.aminmax())
        if low < -(2 ** (bits - 1)) or high >= 2 ** (bits - 1):
            extreme = high if high >= 2 ** (bits - 1) else low
            raise OutOfRange(f"{what} reaches {extreme}, which {bits} bits do not hold")
    return values


def positive(scale: float, what: str) -> None:
    """Raise OutOfRange unless `scale` is a number above 0."""
    if not (math.isfinite(scale) and scale > 0):
        raise OutOfRange(f"{what} has to be a number above 0, not {scale}")


@dataclass(frozen=True)
class Dyadic:
    """The number multiplier / 2**shift, or with int64 tensors [C] a number for each channel.

    |multiplier| lies in [2**30, 2**31).
    """

    multiplier: int | Tensor
    shift: int | Tensor


def dyadic(ratio: float | Sequence[float]) -> Dyadic:
    """Return the dyadic number nearest to a ratio of scales, or to each of several.

    Its relative error is at most 2**-31. OutOfRange for a ratio of 0, or beyond 2**-32 to 2**30 in
    size. Kim et al., "I-BERT: Integer-only BERT Quantization", ICML 2021, after Jacob et al., CVPR
    2018. Theirs does without the last line of `_dyadic`: just below a power of 2, its multiplier
    leaves 31 bits.
    """
    if isinstance(ratio, Sequence):
        pairs = [_dyadic(r) for r in ratio]
        return Dyadic(*(torch.tensor(column, dtype=torch.int64) for column in zip(*pairs)))
    return Dyadic(*_dyadic(ratio))


def _dyadic(ratio: float) -> tuple[int, int]:
    if not 2**-32 <= abs(ratio) <= 2**30 - 1:  # false for NaN, too
        raise OutOfRange(f"a ratio of scales lies between 2**-32 and 2**30 in size, not {ratio}")
    fraction, exponent = math.frexp(ratio)
    multiplier, shift = math.floor(fraction * 2**31 + 0.5), 31 - exponent
    return (multiplier, shift) if abs(multiplier) < 2**31 else (multiplier >> 1, shift - 1)


def rescale(codes: Tensor, ratio: Dyadic, bits: int = 32) -> Tensor:
    """Return codes times `ratio`, rounded to nearest, halves up.

    `codes` fit int32, products int64. OutOfRange if the result does not fit `bits`.
    Deviation: I-BERT's code rounds halves to even, in float64, exactly for |codes| < 2**22.
    """
    product = fits(codes, 32, "a tensor to rescale") * ratio.multiplier
    return fits((product + (1 << (ratio.shift - 1))) >> ratio.shift, bits, "a rescaled tensor")


def requantize(codes: Tensor, ratio: Dyadic, low: int | Tensor, high: int | Tensor) -> Tensor:
    """Rescale to the codes of a format, less its zero-point, which lie in [low, high]."""
    return rescale(codes, ratio, 63).clamp(low, high)


def round_shift(values: Tensor, shift: int) -> Tensor:
    """Return values / 2**shift to nearest, halves up; a negative shift multiplies."""
    if shift <= 0:
        return values << -shift
    return (values + (1 << (shift - 1))) >> shift


def round_divide(numerator: Tensor, denominator: Tensor | int) -> Tensor:
    """Return numerator / denominator to nearest, halves up; the denominator is above 0."""
    return (2 * numerator + denominator) // (2 * denominator)


def bit_length(n: Tensor) -> Tensor:
    """Return how many bits each n >= 0 takes: 0 for 0, 3 for 4 to 7."""
    rest, length = n, torch.zeros_like(n)
    for step in (32, 16, 8, 4, 2, 1):
        more = rest >= 1 << step
        length = torch.where(more, length + step, length)
        rest = torch.where(more, rest >> step, rest)
    return length + (rest > 0)


def isqrt(n: Tensor) -> Tensor:
    """Return floor(sqrt(n)) of 0 <= n < 2**62, by Newton's steps from above until none falls.

    Kim et al., section 3.6, algorithm 4, without a fixed number of steps: I-ViT's ten from 2**16
    give 64 for 0 (`published.shift_isqrt`).
    """
    if fits(n, 63, "the radicand of a square root").numel() and int(n.min()) < 0:
        raise OutOfRange("the radicand of a square root is negative")
    x = 1 << ((bit_length(n) + 1) // 2)
    while True:
        lower = (x + n // x.clamp(min=1)) // 2
        if not (lower < x).any():
            return x
        x = torch.minimum(x, lower)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Return table[index] for a table [n], in less time than indexing takes on a CPU."""
    return table.index_select(0, index.flatten()).view(index.shape)
