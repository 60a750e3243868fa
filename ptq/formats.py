"""Number formats: how a tensor is written in few bits.

A format is a frozen dataclass of pure functions. Its grid, scales and zero-points, is chosen by an
observer (ptq.observers) or by a method, and passed in.
"""

from dataclasses import dataclass

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
        if not 2 <= self.bits <= 16:
            raise ValueError(f"a uniform format has 2 to 16 bits, not {self.bits}")
        if not (self.granularity in ("tensor", "channel") or self.group_size > 0):
            raise ValueError(f"granularity is tensor, channel or a number, not {self.granularity}")

    @property
    def group_size(self) -> int:
        """Elements that share a scale; 0 for scales a channel or a tensor."""
        return self.granularity if isinstance(self.granularity, int) else 0

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return self.qmin + 2**self.bits - 1

    def rows(self, x: Tensor) -> Tensor:
        """`x` as [G, n]: the n elements that share the g-th scale in row g."""
        if self.granularity == "tensor":
            return x.reshape(1, -1)
        x = x.movedim(self.axis, 0).flatten(1)
        if not self.group_size:
            return x
        if x.shape[1] % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide {x.shape[1]} weights")
        return x.reshape(-1, self.group_size)

    def unrows(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `rows` for a tensor of `like`'s shape."""
        if self.granularity == "tensor":
            return rows.reshape(like.shape)
        moved = like.movedim(self.axis, 0)
        return rows.reshape(moved.shape).movedim(0, self.axis)

    def spread(self, scale: Tensor, like: Tensor) -> Tensor:
        """The scale [G] of every single element of a tensor of `like`'s shape."""
        return self.unrows(scale[:, None].expand_as(self.rows(like)), like)

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale float32 [G] and zero-point int32 [G] of levels that cover [low, high] and 0.

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
        """Codes, int32 of `x`'s shape, of the nearest levels (halves to even).

        A symmetric format does without a zero-point, here and in `decode`.
        """
        return self.unrows(self.encode_rows(self.rows(x), scale, zero_point), x)

    def decode(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        return self.unrows(self.decode_rows(self.rows(codes), scale, zero_point), codes)

    def encode_rows(self, rows: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """`encode` of what `rows` gives."""
        zero = 0 if zero_point is None else zero_point[:, None]
        return ((rows / scale[:, None]).round() + zero).clamp(self.qmin, self.qmax).int()

    def decode_rows(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        zero = 0 if zero_point is None else zero_point[:, None]
        return (codes - zero) * scale[:, None]

    def nearest(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The values of the nearest levels, `decode` of `encode` without codes, in few passes.
        `scale` and `zero_point` broadcast with `x`."""
        zero = zero_point.to(x.dtype)
        return (x / scale).round_().clamp_(self.qmin - zero, self.qmax - zero).mul_(scale)
