"""Integer operators at the ends of their registers: what is refused, and what is not."""

import math

import pytest
import torch
from torch import nn

from ptq.formats import Log2, Uniform
from ptq.integer import OutOfRange, published
from ptq.integer.activations import Exp, exp, gelu, log2_softmax, row_exp, silu, softmax
from ptq.integer.norm import layer_norm, layer_norm_table, normalised
from ptq.integer.operators import Codes, Concatenation, Product, Sum, integer_product
from ptq.integer.rescale import dyadic, isqrt, rescale
from ptq.layers import QuantizedLayer, Quantizer


def ints(*values):
    return torch.tensor(values)


def whole(*shape):
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rescale(ints(2**31), dyadic(0.5)), "to rescale reaches 2147483648"),
        (lambda: rescale(ints(2**30), dyadic(5.5)), "a rescaled tensor reaches 5905580032"),
        (lambda: dyadic(math.nan), "not nan"),
        (lambda: dyadic(2**30 * (1 - 2**-53)), "a ratio of scales lies"),
        (lambda: dyadic([0.5, 0.0]), "not 0.0"),
        (lambda: isqrt(ints(-1)), "square root is negative"),
        (lambda: softmax(ints(1, 2), 0.0), "scale of what exp takes in"),
        (lambda: silu(ints(1), -0.1), "above 0"),
        (lambda: gelu(ints(300), 0.1), "what GELU takes in reaches 300, which 9 bits"),
        (lambda: exp(ints(1), Exp.of(0.1)), "exp takes in is above 0"),
        (lambda: row_exp(torch.zeros(4, dtype=torch.int64), Exp(0, 1, 2**30, 1)), "sum of a row"),
        (lambda: normalised(ints(1, 5000)), "layer norm takes in reaches 5000"),
        (
            lambda: layer_norm_table(*torch.ones(2, 1), 0, 0.1, 0.0),
            "scale of what a layer norm puts",
        ),
        (lambda: published.i_layer_norm(ints(4, 4)), "a token has no variance"),
        (lambda: published.i_layer_norm(ints(2**20, -(2**20))), "i-LayerNorm's variance"),
        (lambda: published.i_gelu(ints(127), 1e-4), "i-GELU"),
        (lambda: published.log_int_softmax(whole(4, 256), 1e-4, 8), "sum of a row of i-exp"),
        (lambda: published.shiftmax(whole(4, 256), 1e-14), "sum of a row of ShiftExp"),
        (lambda: published.i_exp(ints(0, -1), 1e-5), "i-exp before its shift by 30"),
    ],
)
def test_what_leaves_its_register_is_refused_by_name(call, says):
    with pytest.raises(OutOfRange, match=says):
        call()


def test_floats_are_refused():
    for operator in (lambda x: softmax(x, 0.1), lambda x: silu(x, 0.1), normalised, isqrt):
        with pytest.raises(TypeError, match="is torch.float32, not torch.int64"):
            operator(torch.ones(3))


def test_rows_of_one_element_and_tokens_without_variance():
    assert softmax(ints([-7]), 0.1).tolist() == [[255]]
    assert log2_softmax(ints([-7]), 0.1, Log2(4)).tolist() == [[0]]
    assert published.i_softmax(ints([-7]), 0.1).tolist() == [[255]]
    assert published.log_int_softmax(ints([-7]), 0.1, 4).tolist() == [[0]]
    assert normalised(ints([4, 4, 4])).tolist() == [[0, 0, 0]]
    weight, bias = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.5, -0.5, 0.25])
    table = layer_norm_table(weight, bias, 1e-5, 0.1, 0.25)
    assert layer_norm(ints([4, 4, 4]), table, -128, 127, 12).tolist() == [[2, -2, 1]]
    assert softmax(torch.zeros(0, 3, dtype=torch.int64), 0.1).shape == (0, 3)
    far = softmax(ints(0, -(2**20)), 0.5)
    assert far.tolist() == [255, 0]


def test_a_row_of_i_exp_just_below_its_register_is_exact():
    scores = whole(4, 7)
    e = published.i_exp(scores - scores.amax(-1, keepdim=True), 1e-4)
    assert 2**60 < max(map(sum, e.tolist())) < 2**61  # as Python adds up
    ratios = [[sum(row) / x for x in row] for row in e.tolist()]
    wanted = [[math.floor(math.log2(round(r) / 1.5)) + 1 for r in row] for row in ratios]
    assert published.log_int_softmax(scores, 1e-4, 8).tolist() == wanted


@pytest.mark.parametrize("scale", [1e-7, 1e-11, 1e-38])
def test_a_layer_norm_of_a_fine_scale_gives_about_its_bias(scale):
    weight, bias = torch.ones(768), torch.linspace(-1, 1, 768)
    table = layer_norm_table(weight, bias, 1e-5, scale, 0.01)
    codes = torch.randint(-(2**15), 2**15, (4, 768), generator=torch.Generator().manual_seed(0))
    values = layer_norm(codes, table, -512, 511, 16) * 0.01
    exact = torch.nn.functional.layer_norm(codes * scale, (768,), weight, bias, eps=1e-5)
    assert (values - exact).abs().max() < 0.03


def test_sums_that_might_leave_32_bits_are_refused():
    row = torch.ones(1, 4, dtype=torch.int64)
    assert integer_product(row, row.mT, 2**29 - 1, torch.int64).item() == 4
    with pytest.raises(OutOfRange, match="sums of 4 products up to 536870912 do not fit 32 bits"):
        integer_product(row, row.mT, 2**29, torch.int64)


def test_nothing_goes_beyond_the_reach_that_is_told_of_it():
    known = Codes(0.5, 1000), Codes(0.25, 2000)
    total, joined = Sum(*known), Concatenation(known, 0)
    for sign in (1, -1):
        a, b = torch.tensor([sign * 1000]), torch.tensor([sign * 2000])
        assert 0.99 * total.codes.reach < total(a, b).abs().item() <= total.codes.reach
        assert 0.99 * joined.codes.reach < joined(a, b).abs().max() <= joined.codes.reach
    layer = nn.Linear(3, 1)
    quantizer = Quantizer(Uniform(8), "minmax")
    quantizer.scale, quantizer.zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    built = QuantizedLayer(layer, quantizer, Uniform(8), "minmax")
    built.set_weight(torch.tensor([[-127, 127, -127]]), torch.ones(1))
    layer.bias.data.fill_(30_000)
    product = Product(built, Codes(1.0, 128), torch.int64)
    found = product(torch.tensor([[-128, 127, -128]])).item()
    assert 0.99 * product.codes.reach < found <= product.codes.reach
