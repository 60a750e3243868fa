"""Number formats: how a tensor is written in few bits.

A format is a frozen dataclass. `encode(x)` gives codes and what is needed to read them,
`decode(*encode(x))` the float32 tensor that they stand for; both are pure. `size_bits` counts what
a packed file would hold.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Float16:
    """IEEE 754 half precision."""

    def encode(self, x: Tensor) -> tuple[Tensor]:
        return (x.half(),)

    def decode(self, half: Tensor) -> Tensor:
        return half.float()

    def size_bits(self, x: Tensor) -> int:
        return 16 * x.numel()


@dataclass(frozen=True)
class PercentileUniform:
    """2**bits evenly spaced levels between two percentiles of each output channel.

    The grid starts at the lower percentile and need not contain 0. With 4 bits and the 1st and 99th
    percentile this is the INT4 of the CIFAR-10 re-implementation whose protocol we reproduce. A
    channel whose percentiles coincide is written as that one value.
    """

    bits: int = 4
    low_pct: float = 1.0
    high_pct: float = 99.0

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[C, ...] -> codes uint8 [C, ...], scale and offset float32 [C, 1, ...]."""
        flat = x.flatten(1)
        shape = (-1, *[1] * (x.dim() - 1))
        low = flat.quantile(self.low_pct / 100, dim=1).view(shape)
        high = flat.quantile(self.high_pct / 100, dim=1).view(shape)
        scale = (high - low) / (2**self.bits - 1)
        scale = torch.where(scale > 0, scale, 1.0)  # constant channel: every code is 0
        codes = ((x.clamp(low, high) - low) / scale).round()
        return codes.to(torch.uint8), scale, low

    def decode(self, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        return codes * scale + offset

    def size_bits(self, x: Tensor) -> int:
        """Codes, and per channel a float32 scale and a zero-point as wide as a code."""
        return self.bits * x.numel() + (32 + self.bits) * x.shape[0]


Format = Float16 | PercentileUniform
