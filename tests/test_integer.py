"""Integer operators: worked examples, a second implementation in Python's integers, float64."""

import math
from fractions import Fraction

import pytest
import torch
from small import draw

from ptq.formats import Log2
from ptq.integer import published
from ptq.integer.activations import (
    Exp,
    exp,
    gelu,
    log2_softmax,
    row_exp,
    sigmoid,
    silu,
    softmax,
)
from ptq.integer.norm import layer_norm, layer_norm_table, normalised
from ptq.integer.rescale import dyadic, isqrt, requantize, rescale

TOKENS = 197  # in a row of ImageNet's ViT: for their sum, codes of 1/16 move by 6 bits
ROW = (40, 35, 20, 0, -10, -60)  # scores of scale 1/16
TOKEN = (3, -1, 4, 1, -5, 9, 2, -6)
SCALES = (1 / 256, 0.005, 1 / 64, 0.02, 0.04, 1 / 16, 0.1, 1 / 4)


def ints(*values):
    return torch.tensor(values)


def whole(*shape, largest=127, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest - 1, largest + 1, shape, generator=generator)


def codes_of(bits=8):
    return torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))


# Worked examples.


def test_exp_as_published():
    assert published.i_exp_constants(1 / 16) == (43, 714, -12)
    codes = ints(0, -1, -5, -11, -12, -22, -64, -128)
    polynomial, halvings = published.i_exp_parts(codes, 1 / 16)
    assert polynomial.tolist() == [714, 672, 524, 362, 714, 384, 558, 434]
    assert halvings.tolist() == [0, 0, 0, 0, 1, 1, 5, 10]
    assert published.i_exp(ints(0), 1 / 16).item() == 766651662336
    values = published.i_exp(codes, 1 / 16) * (0.35815147 / 256 / 2**30)
    expected = [0.998907, 0.940148, 0.733091, 0.506449, 0.499453, 0.268614, 0.024396, 0.000593]
    assert values.tolist() == pytest.approx(expected, abs=6e-7)


def test_exp_refined():
    table = Exp.of(1 / 16, TOKENS)
    assert (table.shift, table.b, table.c, table.ln2) == (6, 2772, 2927745, 710)
    codes = ints(0, -1, -11, -12, -64, -128)
    assert exp(codes, table).tolist() == [2927745, 2754433, 1471873, 1385166, 53510, 983]


def test_softmaxes():
    row, scale = ints(*ROW), 1 / 16
    assert published.i_softmax(row, scale).tolist() == [116, 85, 35, 11, 6, 0]
    e, total = row_exp(row, Exp.of(scale, TOKENS))
    assert e.tolist() == [2927745, 2143105, 836302, 240085, 128714, 5664] and total == 6281615
    assert softmax(row, scale).tolist() == [119, 87, 34, 10, 5, 0]
    e = published.shift_exp(row - 40, scale, 15)
    assert e.tolist() == [524288, 409600, 163840, 47104, 25600, 1088]
    assert published.shiftmax(row, scale).tolist() == [57, 44, 17, 5, 2, 0]
    assert published.log_int_softmax(row, scale, 4).tolist() == [1, 2, 3, 4, 5, 9]
    assert log2_softmax(row, scale, Log2(4)).tolist() == [1, 2, 3, 5, 6, 10]
    assert log2_softmax(row, scale, Log2(4, "3/2")).tolist() == [1, 1, 3, 5, 6, 10]


def test_products_by_shifts():
    values = ints([10, -3], [7, 100], [-128, 5], [127, -127], [3, 64], [-50, 1])
    codes = ints([1, 2, 3, 5, 6, 10])
    for format, n in ((Log2(4, zero_code=False), 15), (Log2(4), 14)):
        shifted = [
            sum(v << n - c for v, c in zip(of, codes[0].tolist())) for of in values.T.tolist()
        ]
        assert (format.integers(codes) @ values).tolist() == [shifted]
        every = torch.arange(format.zero + 1)
        assert format.integers(every).equal((format.decode(every) * 2**n).long())
    assert (Log2(4, zero_code=False).integers(codes) @ values).tolist() == [[-173120, 693280]]


def test_layer_norms():
    assert published.i_layer_norm(ints(*TOKEN)).tolist() == [
        178956970, -178956970, 268435455, 0, -536870910, 715827880, 89478485, -626349395,
    ]  # fmt: skip
    exact = torch.nn.functional.layer_norm(ints(*TOKEN).double(), (8,), eps=0)
    coarse = published.i_layer_norm(ints(*TOKEN)) * math.sqrt(8) / 2**30
    fine = published.i_layer_norm(1000 * ints(*TOKEN)) * math.sqrt(8) / 2**30
    assert (coarse - exact).abs().max() > 0.1 and (fine - exact).abs().max() < 2e-4
    u = normalised(ints(*TOKEN))
    assert u.tolist() == [1905, -1682, 2802, 112, -5270, 7287, 1009, -6167]


def test_square_roots():
    n = ints(0, 1, 15, 16, 1000, 4095, 4096, 172800, 2**31, 2**32 - 1)
    assert isqrt(n).tolist() == [0, 1, 3, 4, 31, 63, 64, 415, 46340, 65535]
    by_ten_steps = [64, 64, 64, 64, 68, 83, 83, 415, 46340, 65536]
    assert published.shift_isqrt(n).tolist() == by_ten_steps


def test_dyadic_numbers():
    pairs = {
        0.0123: (1690499128, 37),
        1.0: (1073741824, 30),
        0.5: (1073741824, 31),
        1 / 3: (1431655765, 32),
        5.5: (1476395008, 28),
        0.9999999999: (2**30, 30),  # 2**31 before it is brought back to 31 bits
        -0.5: (-1073741824, 31),
    }
    for ratio, (multiplier, shift) in pairs.items():
        number = dyadic(ratio)
        assert (number.multiplier, number.shift) == (multiplier, shift)
    both = dyadic([0.5, 5.5])
    assert both.multiplier.tolist() == [1073741824, 1476395008] and both.shift.tolist() == [31, 28]


def test_activations():
    codes = ints(-127, -50, -25, -10, 0, 10, 25, 50, 127)
    out, scale = published.i_gelu(codes, 0.04)
    assert scale == pytest.approx(-4.6208e-6, abs=1e-12)
    assert out.tolist() == [0, 8450, 36100, 28090, 0, -58490, -180350, -424450, -1099566]
    row = [0, -200, -525, -430, 0, 850, 2700, 6150, 16129]
    assert published.shift_gelu(codes, 0.04).tolist() == row
    assert published.shift_gelu(ints(-127, -120), 0.15).tolist() == [0, -240]
    row = [-254, -1500, -1725, -1030, 0, 1530, 4675, 11300, 32258]
    assert silu(codes, 0.04, bits=8).tolist() == row


# A second implementation in Python's integers.


def plain_exp(q, table):
    q = q << table.shift if table.shift >= 0 else (q + (1 << (-table.shift - 1))) >> -table.shift
    z = -q // table.ln2
    r = q + z * table.ln2
    return (r * (r + table.b) + table.c) >> z


def plain_nearest(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


@pytest.mark.parametrize("scale", [*SCALES, 1e-5])
def test_softmax_as_in_plain_integers(scale):
    for row in whole(20, 7, seed=3).tolist():
        table = Exp.of(scale, len(row))
        e = [plain_exp(q - max(row), table) for q in row]
        assert sum(e) < 2**31
        ratios = [Fraction(x, sum(e)) for x in e]
        codes = [min(plain_nearest(1000 * p), 255) for p in ratios]
        assert softmax(ints(*row), scale, 1000, 255).tolist() == codes
        for name, squared in (("sqrt2", 2), ("3/2", Fraction(9, 4)), ("4/3", Fraction(16, 9))):
            codes = []
            for p in ratios:
                k = 0  # up while 1 / p is at least the threshold times 2**k
                while k < 15 and (p == 0 or 1 / p**2 >= squared * 4**k):
                    k += 1
                codes.append(k)
            assert log2_softmax(ints(*row), scale, Log2(4, name)).tolist() == codes


def test_silu_and_rescaling_as_in_plain_integers():
    for scale in SCALES:
        table = Exp.of(scale, 2)
        for q, out in zip(codes_of().tolist(), silu(codes_of(), scale).tolist()):
            e = plain_exp(-abs(q), table)
            share = Fraction(table.c if q >= 0 else e, e + table.c)
            assert out == q * plain_nearest(4096 * share)
    for ratio in (0.0123, -0.7, 3.3e-9, 5.5):
        number = dyadic(ratio)
        exact = Fraction(number.multiplier, 2**number.shift)
        for q in (0, 1, -1, 12345, -(2**28)):
            assert rescale(ints(q), number).item() == plain_nearest(q * exact)


def test_layer_norm_as_in_plain_integers():
    weight, bias = draw(16, seed=4), draw(16, seed=5)
    table = layer_norm_table(weight, bias, 1e-5, 0.01, 0.02)
    assert 2**14 <= table.gain.abs().max() <= 2**15
    for token in whole(30, 16, largest=2000, seed=6).tolist():
        v = 16 * sum(x * x for x in token) - sum(token) ** 2
        deviation = math.isqrt((v << 16) + table.epsilon)
        u = [((16 * x - sum(token)) << 20) // deviation for x in token]
        parts = zip(u, table.gain.tolist(), table.offset.tolist())
        y = [plain_nearest(Fraction(a * m + b, 2**table.shift)) for a, m, b in parts]
        expected = [min(max(code, -7), 248) for code in y]
        assert layer_norm(ints(*token), table, -7, 248, 12).tolist() == expected


def test_square_roots_of_all_sizes():
    n = [k * k + d for k in (1, 2, 3, 181, 46340, 2**30, 2**31 - 1) for d in (-1, 0, 1)]
    n += [2**62 - 1, *range(200)]
    assert isqrt(ints(*n)).tolist() == [math.isqrt(value) for value in n]


# Against float64, for every code and many scales.


def test_exp_is_within_its_bound_for_every_code():
    for step in range(1, 65):
        scale = step / 256
        table = Exp.of(scale)
        values = exp(-torch.arange(256), table) / table.c
        error = (values - (-torch.arange(256) * scale).double().exp()).abs().max()
        assert error <= 0.002, scale


@pytest.mark.parametrize("scale", SCALES)
def test_softmax_refined_loses_far_less_than_published(scale):
    scores = whole(50, 197, seed=7)
    exact = (scores.double() * scale).softmax(-1)

    def loss_db(values):
        return 10 * (exact.square().sum() / (values - exact).square().sum()).log10().item()

    fine = loss_db(softmax(scores, scale, 2**24, 2**24) / 2**24)
    e = published.i_exp(scores - scores.amax(-1, keepdim=True), scale).double()
    coarse = loss_db(e / e.sum(-1, keepdim=True))
    # On a fine scale rounded constants cost nothing, and the polynomial's error is left.
    assert fine > 49 and fine > coarse + (10 if scale > 1 / 64 else -1)
    apart = softmax(scores, scale) / 255 - exact
    assert apart.abs().max() < 0.5 / 255 + 0.002
    small = exact < 250 / 5100
    apart = softmax(scores, scale, levels=5100) / 5100 - exact
    assert apart[small].abs().max() < 0.5 / 5100 + 0.005 * 250 / 5100


@pytest.mark.parametrize("scale", SCALES)
def test_activations_are_within_their_bounds_for_every_code(scale):
    codes = codes_of()
    x = codes.double() * scale
    assert (sigmoid(codes, scale) / 4096 - x.sigmoid()).abs().max() < 0.001
    # Of x: the sigmoid's rounding, and the polynomial of exp.
    error = (silu(codes, scale) * (scale / 4096) - torch.nn.functional.silu(x)).abs()
    assert (error <= 0.001 + x.abs() / 8192).all()
    exact = torch.nn.functional.gelu(x)
    error = (gelu(codes, scale) * (scale / 4096) - exact).abs()
    assert (error <= 0.002 + x.abs() / 8192).all()
    if scale <= 0.06:
        out, out_scale = published.i_gelu(codes, scale)
        assert 0.009 < (out * out_scale - exact).abs().max() < 0.021
    coarse, out_scale = published.i_gelu(codes, scale, shift=14)
    if scale > 0.01:
        assert (coarse * out_scale - exact).abs().max() > 0.2


@pytest.mark.parametrize("scale", [1e-6, 1e-5, 1e-4])
def test_softmaxes_of_products_sums(scale):
    """Scores of 32 bits on a fine scale, as products of 8-bit codes add up."""
    scores = whole(20, 64, largest=int(6 / scale), seed=13)
    exact = (scores.double() * scale).softmax(-1)
    assert (softmax(scores, scale) / 255 - exact).abs().max() < 0.5 / 255 + 0.001
    assert (published.i_softmax(scores, scale) / 256 - exact).abs().max() < 1.5 / 256


def test_gelu_and_silu_of_sixteen_bits():
    codes = codes_of(16)
    for scale in (1e-4, 3e-4):
        x = codes.double() * scale
        apart = gelu(codes, scale, width=16) * (scale / 4096) - torch.nn.functional.gelu(x)
        assert apart.abs().max() < 0.003
        apart = silu(codes, scale) * (scale / 4096) - torch.nn.functional.silu(x)
        assert apart.abs().max() < 0.003


@pytest.mark.parametrize("channels", [2, 96, 768])
@pytest.mark.parametrize(("largest", "bits"), [(3, 12), (2040, 12), (32767, 16)])
def test_layer_norm_is_exact_within_a_unit(channels, largest, bits):
    codes = whole(64, channels, largest=largest, seed=8)
    exact = torch.nn.functional.layer_norm(codes.double(), (channels,), eps=0).nan_to_num(0)
    u = normalised(codes, bits) / 4096
    assert ((u - exact).abs() <= 1.01 / 4096 + 2e-3 * exact.abs()).all()
    weight, bias = 1 + draw(channels, seed=9), draw(channels, seed=10)
    table = layer_norm_table(weight, bias, 1e-5, 0.003, 0.05)
    got = layer_norm(codes, table, -128, 127, bits)
    eps = 1e-5 / 0.003**2
    wanted = torch.nn.functional.layer_norm(
        codes.double(), (channels,), weight.double(), bias.double(), eps
    )
    apart = got * 0.05 - wanted.clamp(-128 * 0.05, 127 * 0.05)
    assert apart.abs().max() <= 0.05 * 0.5 + 0.01


def test_codes_have_ends():
    assert requantize(ints(-5, 3, 900), dyadic(0.5), -2, 253).tolist() == [-2, 2, 253]
