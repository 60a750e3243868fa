"""Number formats: how a tensor is written in few bits.

A format is a frozen dataclass of pure functions. Its grid, scales and zero-points, is chosen by an
observer (ptq.observers) or by a method, and passed in.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Uniform:
    """2**bits evenly spaced levels through 0: value = (code - zero_point) * scale.

    `symmetric`: the zero-point is 0 and codes are signed, in [-2**(bits-1), 2**(bits-1) - 1].
    Otherwise the zero-point is a code and codes are unsigned, in [0, 2**bits - 1].

    `granularity` says which elements share a scale: all ("tensor"), those with the same index
    along `axis` ("channel"), or runs of that many elements of a channel of a weight (a number).
    A weight [C, c, k, k] with 8 output channels of 24 weights each has 1, 8 or, in groups of 12,
    16 scales.
    """

    bits: int
    symmetric: bool = True
    granularity: str | int = "tensor"
    axis: int = 0  # of the channels; 1 for activations [B, C, ...]

    def __post_init__(self):
        if type(self.bits) is not int or not 2 <= self.bits <= 16:
            raise ValueError(f"a uniform format has 2 to 16 bits, not {self.bits}")
        if not (self.granularity in ("tensor", "channel") or self.group_size > 0):
            raise ValueError(f"granularity is tensor, channel or a number, not {self.granularity}")

    @property
    def group_size(self) -> int:
        """Return how many elements share a scale; 0 where a channel or the tensor does."""
        return self.granularity if isinstance(self.granularity, int) else 0

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return self.qmin + 2**self.bits - 1

    def rows(self, x: Tensor) -> Tensor:
        """Return `x` as [G, n]: row g holds the n elements that share the g-th scale."""
        if self.granularity == "tensor":
            return x.reshape(1, -1)
        if not -x.dim() <= self.axis < x.dim():
            raise ValueError(f"a tensor of {x.dim()} dimensions has no channels along {self.axis}")
        x = x.movedim(self.axis, 0).flatten(1)
        if not self.group_size:
            return x
        if x.shape[1] % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide {x.shape[1]} weights")
        return x.reshape(-1, self.group_size)

    def spread(self, scale: Tensor, like: Tensor) -> Tensor:
        """Return the scales [G], or zero-points, in a shape that broadcasts with `like`."""
        if self.group_size:
            moved = like.movedim(self.axis, 0)
            each = scale.repeat_interleave(self.group_size)
            return each.view(moved.shape).movedim(0, self.axis)
        shape = [1] * like.dim()
        if self.granularity == "channel":
            shape[self.axis] = -1
        return scale.view(shape)

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales float32 [G] and zero-points int32 [G] that cover [low, high] and 0.

        A range that holds nothing but 0 gets scale 1.
        """
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            scale = torch.maximum(-low / -self.qmin, high / self.qmax)
        else:
            scale = (high - low) / self.qmax
        # Below the smallest normal number nothing is lost by calling a range empty.
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0).float()
        zero_point = torch.zeros_like(scale) if self.symmetric else (-low / scale).round()
        return scale, zero_point.int()

    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Return the codes of the nearest levels, halves to even: int32 of `x`'s shape, contiguous.

        A symmetric format does without a zero-point, here and in `decode`.
        """
        zero = 0 if zero_point is None else self.spread(zero_point, x)
        levels = (x.contiguous() / self.spread(scale, x)).round_()
        return (levels + zero).clamp_(self.qmin, self.qmax).int()

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Return the values of codes, floats of their shape."""
        zero = 0 if zero_point is None else self.spread(zero_point, codes)
        return (codes - zero) * self.spread(scale, codes)

    def nearest(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Return the values of the nearest levels, as `decode` of `encode` does, in fewer passes.

        On CPUs, torch's fake_quantize is not vectorised, nor is clamp_ between two tensors.
        """
        scale, zero = self.spread(scale, x), self.spread(zero_point, x).to(x.dtype)
        levels = (x / scale).round_()
        return levels.clamp_min_(self.qmin - zero).clamp_max_(self.qmax - zero).mul_(scale)

    def integers(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        """Return the values of codes in units of their scale: int64 of `width` bits."""
        return (codes - self.spread(zero_point, codes)).long()

    @property
    def width(self) -> int:
        """Return how many bits `integers` takes, with the sign."""
        return self.bits + (not self.symmetric)


@dataclass(frozen=True)
class PowerOfTwo:
    """A uniform format whose scale is doubled 0 to `most` times, channel by channel.

    value = (code - zero_point) * scale * 2**shift[c], with c along the last axis, unsigned codes,
    and one scale and zero-point for the tensor. Sums over channels, as for a layer norm, then take
    only shifts: (code - zero_point) << shift[c] are integers of a common scale.
    Lin et al., "FQ-ViT", IJCAI 2022, section 3.2, equations 9 and 10.
    """

    bits: int
    most: int = 3
    axis: ClassVar[int] = -1
    group_size: ClassVar[int] = 0

    def __post_init__(self):
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise ValueError(f"a format with power-of-two factors has 2 to 8 bits, not {self.bits}")
        if not 0 <= self.most <= 7:
            raise ValueError(f"a scale is doubled at most 0 to 7 times, not {self.most}")

    @property
    def whole(self) -> Uniform:
        """Return the format of the tensor without factors."""
        return Uniform(self.bits, symmetric=False)

    def rows(self, x: Tensor) -> Tensor:
        """Return `x` as [C, n], a row for each channel."""
        return x.movedim(-1, 0).flatten(1)

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale float32 [1] and zero-point int32 [1] for a range, low [1] and high [1].

        With the largest shift they cover the range and 0.
        """
        scale, zero_point = self.whole.grid(low, high)
        return scale / 2**self.most, zero_point

    def encode(self, x: Tensor, scale: Tensor, zero_point: Tensor, shifts: Tensor) -> Tensor:
        """Return the codes of the nearest levels, int32 of `x`'s shape [..., C]; `shifts` [C]."""
        codes = (x / (scale * 2**shifts)).round() + zero_point
        return codes.clamp(0, self.whole.qmax).int()

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor, shifts: Tensor) -> Tensor:
        """Return the values of codes, floats of their shape [..., C]."""
        return (codes - zero_point) * (scale * 2**shifts)

    def nearest(self, x: Tensor, scale: Tensor, zero_point: Tensor, shifts: Tensor) -> Tensor:
        """Return the values of the nearest levels."""
        grid = scale, zero_point, shifts
        return self.decode(self.encode(x, *grid), *grid)

    def integers(self, codes: Tensor, zero_point: Tensor, shifts: Tensor) -> Tensor:
        """Return the values of codes in units of the scale: int64 of `width` bits."""
        return (codes - zero_point).long() << shifts

    @property
    def width(self) -> int:
        return self.bits + 1 + self.most


# A value x lies between 2**-k and 2**-(k+1). Code k + 1 is chosen where 2**-k / x is at least this.
THRESHOLDS = {"sqrt2": 2**0.5, "3/2": 3 / 2, "4/3": 4 / 3}


@dataclass(frozen=True)
class Log2:
    """Powers of two for values in [0, 1], as of a softmax: value = 2**-code, and one code is 0.

    `threshold`: where rounding goes to the next code. "sqrt2" is nearest in the logarithm, as Lin
    et al., "FQ-ViT", IJCAI 2022, section 3.3, write it; "3/2" is what their code does; "4/3" is
    nearest in the value.
    `zero_code`: whether the last of the 2**bits codes means 0. If not, as published, every one of
    them is a power, and 0 has a further code, 2**bits, which `bits` bits do not hold.
    """

    bits: int
    threshold: str = "sqrt2"
    zero_code: bool = True

    def __post_init__(self):
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise ValueError(f"a logarithmic format has 2 to 8 bits, not {self.bits}")
        if self.threshold not in THRESHOLDS:
            raise ValueError(f"threshold is {', '.join(THRESHOLDS)}, not {self.threshold}")

    @property
    def zero(self) -> int:
        """Return the code of 0; those below it are powers of two."""
        return 2**self.bits - self.zero_code

    def encode(self, x: Tensor) -> Tensor:
        """Return the codes of values in [0, 1]: int32 of `x`'s shape."""
        mantissa, exponent = torch.frexp(x.double())  # mantissa in [1/2, 1), or 0
        codes = (mantissa * THRESHOLDS[self.threshold] <= 1).int() - exponent
        return torch.where(x > 0, codes, self.zero).clamp(0, self.zero).int()

    def integers(self, codes: Tensor) -> Tensor:
        """Return the values of codes in units of the smallest power: int64 of the codes' shape.

        A product with them is a sum of shifts. 64 bits hold them for formats of up to 5 bits.
        """
        powers = 1 << (self.zero - 1 - codes).clamp(min=0).long()
        return torch.where(codes == self.zero, 0, powers)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of codes: float32 of the codes' shape."""
        powers = torch.ldexp(torch.ones_like(codes, dtype=torch.float32), -codes)
        return torch.where(codes == self.zero, 0.0, powers)
