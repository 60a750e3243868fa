"""Integer networks of other shapes than those of the registry."""

import pytest
import torch
from small import draw, small_network
from torch import nn

import ptq
from ptq.analysis.compare import noise
from ptq.formats import Uniform
from ptq.integer.operators import ClippedReLU, Codes, Concatenation
from ptq.recipe import LayerSpec


class Ends(nn.Module):
    """Two linear layers after each other, and `of` their results and a third one's of the image."""

    def __init__(self, of):
        super().__init__()
        self.a, self.b, self.c, self.of = *(nn.Linear(8, 8) for _ in range(3)), of

    def forward(self, x):
        y = self.a(x)
        return self.of(self.b(y), self.c(x))


@pytest.mark.parametrize(
    "of",
    [
        lambda x, y: torch.cat([x, y], axis=1),
        lambda x, y: torch.cat(tensors=[x, y], dim=-1),
        lambda x, y: x + torch.mean(input=y, dim=1, keepdim=True),
        lambda x, y: (x + y.mean(1, keepdims=True)).relu(),
        lambda x, y: x + y.mean(axis=1, keepdim=True),
    ],
)
def test_integers_give_what_is_simulated_whatever_the_keywords_are_called(of):
    torch.manual_seed(0)
    network, images = Ends(of).eval(), [(draw(16, 8, seed=i), None) for i in range(2)]
    quantized = ptq.quantize(network, ptq.recipe("w8a8", network), images)
    integer, x = ptq.integer_network(quantized), draw(5, 8, seed=9)
    with torch.no_grad():
        wanted = quantized(x).double()
        got = integer.decode(integer(integer.encode(x)))
    assert got.shape == wanted.shape and noise(wanted, got) < 1e-10


@pytest.mark.parametrize("recipe", ["i-bert", "i-vit", "fq-vit"])
def test_a_norm_behind_a_layer_that_gives_almost_nothing(recipe):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 96), nn.LayerNorm(96), nn.Linear(96, 4)).eval()
    for parameter in network[0].parameters():
        parameter.data *= 1e-6
    nn.init.normal_(network[1].bias)
    images, x = [(draw(16, 8, seed=i), None) for i in range(2)], draw(5, 8, seed=9)
    quantized = ptq.quantize(network, ptq.recipe(recipe, network), images)
    integer = ptq.integer_network(quantized)
    with torch.no_grad():
        assert noise(network(x), quantized(x)) < 1e-3
        assert noise(quantized(x).double(), integer.decode(integer(integer.encode(x)))) < 1e-10


def test_a_fine_tensor_beside_a_coarse_one_stays_fine():
    known = Codes(1e-9, 2**20), Codes(0.1, 2**7)
    joined = Concatenation(known, 0)
    fine = torch.tensor([987_654])
    made = joined(fine, torch.tensor([99])).double() * joined.codes.scale
    assert made[0] == pytest.approx(987_654e-9, abs=joined.codes.scale)
    assert joined.codes.scale < 1e-7


class First(nn.Module):
    """A quantized layer behind what `of` does to the image."""

    def __init__(self, of):
        super().__init__()
        self.conv, self.of = nn.Conv2d(3, 4, 3), of

    def forward(self, x):
        return self.conv(self.of(x))


@pytest.mark.parametrize(
    "of, name",
    [(lambda x: x.relu(), "relu"), (nn.AvgPool2d(2), "of"), (lambda x: x + x, "add")],
)
def test_an_image_that_is_not_quantized_at_once_is_refused(of, name):
    network, images = First(of), [(draw(8, 3, 16, 16), None)]
    quantized = ptq.quantize(network, ptq.recipe("w8a8", network), images)
    with pytest.raises(ValueError, match=f"^{name} takes in the image in float: no recipe"):
        ptq.integer_network(quantized)


def test_padding_and_clipping_at_6_as_simulated():
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)),
        *(nn.ReLU6(), nn.ZeroPad2d(2), nn.Conv2d(8, 4, 3)),
    ).eval()
    network[1].weight.data *= 10
    images, x = [(draw(8, 3, 16, 16, seed=i), None) for i in range(2)], draw(4, 3, 16, 16, seed=9)
    quantized = ptq.quantize(network, ptq.recipe("i-bert", network), images)
    integer = ptq.integer_network(quantized)
    with torch.no_grad():
        assert quantized[:4](x).eq(6).any()
        assert noise(quantized(x).double(), integer.decode(integer(integer.encode(x)))) < 1e-10


def test_a_clipped_code_is_that_of_the_limit_whatever_the_scale():
    for scale in (1e-9, 0.7, 3.5, 20.0):
        clipped, codes = ClippedReLU(Codes(scale, 2**20), 6), torch.arange(-20, 2**20, 997)
        values = clipped(codes).double() * clipped.codes.scale
        torch.testing.assert_close(values, (codes.double() * scale).clamp(0, 6), rtol=0, atol=1e-8)


def test_an_image_that_is_quantized_in_two_ways_is_refused():
    network, images = Ends(lambda x, y: x + y).eval(), [(draw(16, 8), None)]
    quantized = ptq.quantize(network, ptq.recipe("w8a8", network), images)
    quantized.c.input.scale = 2 * quantized.c.input.scale
    with pytest.raises(ValueError, match="rounds images to other codes than another layer"):
        ptq.integer_network(quantized)


def test_weights_with_scales_of_input_channels_are_refused():
    format = Uniform(8, granularity="channel", axis=1)
    spec = LayerSpec(".*", format, Uniform(8, symmetric=False))
    network, images = nn.Sequential(nn.Linear(8, 8)), [(draw(16, 8), None)]
    quantized = ptq.quantize(network, ptq.Recipe("turned", layers=(spec,)), images)
    with pytest.raises(ValueError, match="several scales for one channel"):
        ptq.integer_network(quantized)


def test_weights_of_one_scale_get_a_batch_norm_all_the_same():
    network, images = small_network().stem, [(draw(8, 3, 16, 16, seed=i), None) for i in range(2)]
    network.act = nn.ReLU()
    spec = LayerSpec(".*", Uniform(8), Uniform(8, symmetric=False))
    quantized = ptq.quantize(network, ptq.Recipe("one", layers=(spec,)), images)
    integer, x = ptq.integer_network(quantized), draw(4, 3, 16, 16, seed=9)
    with torch.no_grad():
        assert noise(quantized(x).double(), integer.decode(integer(integer.encode(x)))) < 1e-10


class Attends(nn.Module):
    """Attention of torch behind a linear layer, called with settings beside its tensors."""

    def __init__(self):
        super().__init__()
        self.linear, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.linear(x)
        return self.attention(x, x, value=x, need_weights=False)[0]


def test_a_layer_that_is_called_with_settings_is_refused_by_name():
    network, images = Attends().eval(), [(draw(16, 5, 8), None)]
    quantized = ptq.quantize(network, ptq.recipe("w8a8", network), images)
    with pytest.raises(ValueError, match="^attention: a MultiheadAttention in float"):
        ptq.integer_network(quantized)
