"""What the layers of I-BERT and I-ViT hand to their arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from small import draw
from torch import nn

from mobilevit import AttentionCore
from ptq.formats import Uniform
from ptq.integer import published
from ptq.integer.activations import gelu, shift_silu
from ptq.methods.ibert import IBertCore, IBertNorm
from ptq.methods.ivit import ShiftActivation
from ptq.recipe import LayerSpec


@pytest.mark.parametrize("channels, bits, shift", [(96, 16, 3), (768, 16, 4), (16, 8, 0)])
def test_no_more_bits_are_dropped_than_a_sum_of_squares_needs(channels, bits, shift, monkeypatch):
    norm = IBertNorm(
        nn.LayerNorm(channels),
        LayerSpec("", input=Uniform(bits), kind="i-bert-norm", published=True),
    )
    norm.input.scale, seen = torch.ones(1), []
    monkeypatch.setattr(published, "i_layer_norm", lambda codes, n: seen.append(n) or codes)
    norm.as_published(torch.zeros(1, channels, dtype=torch.int64))
    assert seen == [shift]
    largest = 2 ** (bits - 1)
    assert channels * (largest >> shift) ** 2 <= 2**32
    assert shift == 0 or channels * (largest >> shift - 1) ** 2 > 2**32


@pytest.mark.parametrize("kind, slope", [(nn.GELU, 1.702), (nn.SiLU, 1.0)])
def test_i_vits_gelu_is_a_sigmoid_of_1702_thousandths(kind, slope):
    spec = LayerSpec("", input=Uniform(8), input_observer="absmax", kind="i-vit-act")
    ours, theirs = ShiftActivation(kind(), spec), ShiftActivation(kind(), spec)
    theirs.published = True
    x = 2 * draw(5, 40)
    for layer in (ours, theirs):
        layer.input.observe()
        layer(x)
        layer.input.freeze()
    scale = x.abs().max() / 127
    codes = (x / scale).round().long()
    y = shift_silu(codes, float(scale), slope) * (float(scale) / 2**12)
    torch.testing.assert_close(ours(x), y.float())
    y = published.shift_gelu(codes, float(scale), slope) * (float(scale) / 2**7)
    torch.testing.assert_close(theirs(x), y.float())


@pytest.mark.parametrize("levels, scale", [(255, 1 / 254.6), (254, 1 / 254.4), (1, 3.0)])
def test_even_levels_of_a_softmax_are_the_nearest_whole_number(levels, scale):
    spec = LayerSpec("", input=Uniform(8), attention=Uniform(8, False), kind="i-bert-core")
    core = IBertCore(AttentionCore(), spec)
    core.inputs["attention"].scale = torch.tensor([scale])
    softmax, one = core.integer_softmax()
    assert one == levels and softmax(torch.zeros(1, 1, dtype=torch.int64), 0.1).item() == levels


def test_gelu_of_fine_codes_is_the_form_with_a_tanh():
    codes = torch.arange(-(2**14), 2**14)
    found = gelu(codes, 2**-12, 16).double() * 2**-12 / 2**12
    expected = F.gelu(codes.double() * 2**-12, approximate="tanh")
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-4)
    assert (found - expected).mean().abs() < 6e-5


def test_a_layer_norm_keeps_its_own_epsilon():
    spec = LayerSpec("", input=Uniform(16), output=Uniform(8, False), kind="i-bert-norm")
    norm, x = IBertNorm(nn.LayerNorm(8, eps=0.5), spec), draw(6, 8)
    for quantizer in (norm.input, norm.output):
        quantizer.observe()
    norm(x)
    for quantizer in (norm.input, norm.output):
        quantizer.freeze()
    assert (norm(x) - F.layer_norm(x, (8,), eps=0.5)).abs().max() < 0.6 * norm.output.scale
