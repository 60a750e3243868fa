"""I-ViT's operators, by shifts: Python's integers, float64, and what their published form loses."""

import math
from fractions import Fraction

import pytest
import torch
from small import draw

from ptq.integer import OutOfRange, published
from ptq.integer.activations import shift_silu, shift_softmax

CODES = torch.arange(-128, 128)
SCALES = (1 / 64, 0.02, 0.04, 1 / 16, 0.1, 1 / 4, 0.7, 1.0)


def plain_exp(q: int, one: int, n: int) -> int:
    p = max(q + (q >> 1) - (q >> 4), -n * one)
    z = -p // one
    return ((p + z * one + 2 * one) << (n - z)) // 2


def plain_nearest(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


def finer(scale: float) -> tuple[int, int]:
    """How many bits codes move, so that 1 is 64 units at least, and those units."""
    shift = next(k for k in range(10) if scale / 2**k <= 1 / 64)
    return shift, math.ceil(2**shift / scale)


def bits_left(one: int, terms: int) -> int:
    """The most that n terms of 2 * one can be shifted within 31 bits."""
    return max(n for n in range(32) if (2 * one * terms) << n < 2**31)


@pytest.mark.parametrize("scale", SCALES)
def test_as_in_plain_integers(scale):
    shift, one = finer(scale)
    for row in (40 * draw(20, 7, seed=1)).round().long().tolist():
        e = [plain_exp((q - max(row)) << shift, one, bits_left(one, 7)) for q in row]
        expected = [min(plain_nearest(Fraction(1000 * x, sum(e))), 255) for x in e]
        assert sum(e) < 2**31
        assert shift_softmax(torch.tensor(row), scale, 1000, 255).tolist() == expected
    for q, out in zip(CODES.tolist(), shift_silu(CODES, scale).tolist()):
        e = plain_exp(-abs(q) << shift, one, bits_left(one, 2))
        whole = plain_exp(0, one, bits_left(one, 2))
        share = Fraction(whole if q >= 0 else e, e + whole)
        assert out == q * plain_nearest(4096 * share)


@pytest.mark.parametrize("scale", SCALES)
def test_a_line_between_powers_of_two_is_off_by_a_twentieth(scale):
    shift, codes = finer(scale)[0], -torch.arange(128)
    e = published.shift_exp(codes << shift, scale / 2**shift, 15).double()
    error = (e / e[0] - (codes * scale).double().exp()).abs().max()
    assert error < 0.05 and (error > 0.04 or scale > 1 / 4)
    x = CODES.double() * scale
    for slope, exact in ((1.0, torch.nn.functional.silu(x)), (1.702, torch.nn.functional.gelu(x))):
        got = shift_silu(CODES, scale, slope) * (scale / 4096)
        assert (got - exact).abs().max() < 0.03


@pytest.mark.parametrize("scale", SCALES)
def test_softmax_is_as_close_for_coarse_scales_as_for_fine_ones(scale):
    for tokens in (16, 64, 256):
        scores = (30 * draw(50, tokens, seed=3)).round().long().clamp(-128, 127)
        exact = (scores.double() * scale).softmax(-1)
        error = shift_softmax(scores, scale, 2**16, 2**16) / 2**16 - exact
        assert error.square().sum() < 1.3e-3 * exact.square().sum()  # 29 dB


def test_the_published_division_keeps_nothing_where_sums_are_large():
    scale = 0.005
    exact = torch.nn.functional.gelu(CODES.double() * scale)
    errors = [
        (out * unit - exact).abs().max()
        for out, unit in (
            (published.shift_gelu(CODES, scale), scale / 128),
            (shift_silu(CODES, scale, 1.702), scale / 4096),
        )
    ]
    assert errors[0] > 0.15 and errors[1] < 0.02


def test_the_published_root_is_too_large_for_small_variances():
    for largest, close in ((2000, True), (3, False)):
        codes = (largest * draw(4, 64, seed=2)).round().long()
        exact = torch.nn.functional.layer_norm(codes.double(), (64,), eps=0)
        error = published.shift_layer_norm(codes) * math.sqrt(64) / 2**30 - exact
        assert bool(error.abs().max() < 0.01) is close
    assert published.shift_layer_norm(torch.full((1, 8), 5)).tolist() == [[0] * 8]


def test_a_scale_of_0_is_refused():
    with pytest.raises(OutOfRange, match="what ShiftExp takes in"):
        shift_silu(CODES, 0.0)
