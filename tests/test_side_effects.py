"""Networks whose calls do more than layer after layer: they write, read weights, hook, and name."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from small import Idle, draw
from torch import nn
from torch.nn.utils import parametrizations

import ptq
from ptq.analysis.compare import noise
from ptq.analysis.costs import COSTS
from ptq.analysis.mixed import energies, layer_costs, uniform_recipes
from ptq.methods.fq_vit import Factors
from ptq.recipe import LayerSpec, Recipe

FINE = ptq.Uniform(16, granularity="channel")  # all but lossless, and so is the next
FINE_INPUT = ptq.Uniform(16, symmetric=False)
X, TOKENS = draw(8, 3, 10, 10), draw(8, 6)
W4 = ptq.Uniform(4, granularity="channel")


def pairs(x):
    return [(part, None) for part in x.split(4)]


class Network(nn.Module):
    """A convolution, a norm with factors of both signs and a linear layer, called in some way."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)
        self.norm.weight.data[::2] = -0.5

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


class Looking(Network):
    """torch.fx can't trace it, because it looks at values."""

    def forward(self, x):
        return super().forward(x / 2 if x.sum() > 1e9 else x)


class ConvolutionRead(Looking):
    def forward(self, x):
        return super().forward(x) + F.conv2d(x, self.conv.weight).mean()


class NormRead(Looking):
    def forward(self, x):
        return super().forward(x) * (1 + self.norm.weight[0])


@pytest.mark.parametrize("kind", [Looking, ConvolutionRead, NormRead])
def test_weights_that_are_read_beside_calls_keep_their_signs(kind):
    torch.manual_seed(0)
    network = kind().eval()
    recipe = Recipe("r", layers=(LayerSpec("fc", FINE, FINE_INPUT),))
    quantized = ptq.quantize(network, recipe, pairs(X))
    assert noise(quantized(X), network(X)) < 1e-7
    turned = bool((quantized.norm.weight >= 0).all())
    assert turned == (kind is Looking)  # where nothing reads them, they do turn


class LinearRead(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.norm.weight.data = torch.linspace(0.1, 5, 8)

    def forward(self, x):
        y = self.first(x / 2 if x.sum() > 1e9 else x)
        return self.last(self.norm(y)) + F.linear(y, self.last.weight)


def normed_norm():
    norm = nn.LayerNorm(8)
    norm.weight.data = torch.linspace(0.1, 5, 8)
    normed = parametrizations.weight_norm(norm, dim=None)
    layers = {"first": nn.Linear(6, 8), "norm": normed, "last": nn.Linear(8, 4)}
    return nn.Sequential(OrderedDict(layers))


@pytest.mark.parametrize("make", [LinearRead, normed_norm])
def test_equalization_leaves_weights_that_are_read_or_computed(make):
    torch.manual_seed(0)
    network = make().eval()
    steps = ("equalize", "nearest", "calibrate")
    recipe = Recipe("r", layers=(LayerSpec("first", FINE, FINE_INPUT),), steps=steps)
    quantized = ptq.quantize(network, recipe, pairs(TOKENS))
    assert noise(quantized(TOKENS), network(TOKENS)) < 1e-7


class Writing(Network):
    def forward(self, x):
        return super().forward(x.sub_(0.5))


def test_a_network_that_writes_on_its_input_is_refused():
    network = Writing().eval()
    batches = [(X.clone(), None)]
    with pytest.raises(ValueError, match="writes on its input"):
        ptq.quantize(network, ptq.recipe("w8a8", network), batches)


def test_hooks_are_refused_by_name_and_a_forward_of_an_instance_stays_in_float():
    network = Network().eval()
    hook = network.fc.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="fc: the layer has hooks"):
        ptq.quantize(network, ptq.recipe("w8a8", network), pairs(X))
    hook.remove()
    network.conv.forward = lambda x: 2 * F.conv2d(x, network.conv.weight)
    quantized = ptq.quantize(network, ptq.recipe("w8a8", network), pairs(X))
    assert type(quantized.conv) is nn.Conv2d and type(quantized.fc) is not nn.Linear


def test_shifts_are_taken_from_a_tensor_as_it_passed():
    layers = ptq.recipe("fq-vit-published", vit()).layers
    format = next(spec.input for spec in layers if spec.kind == "fq-vit-norm")
    observer, x = Factors(format), 0.02 * draw(2, 5, 8) * 2.0 ** torch.arange(8)
    observer.update(x)
    *_, expected = (t.clone() for t in observer.range())
    x *= 0.01
    assert observer.range()[2].equal(expected) and expected.unique().numel() > 1


def vit():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).eval()


class Named(Network):
    """Its layers are called with their input's name."""

    def __init__(self):
        super().__init__()
        self.layer_norm, self.act = nn.LayerNorm(8), nn.SiLU()

    def forward(self, x):
        y = self.norm(input=self.conv(input=x)).relu().mean((2, 3))
        return self.fc(input=self.act(input=self.layer_norm(input=y)))


class ByPosition(Named):
    def forward(self, x):
        y = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.fc(self.act(self.layer_norm(y)))


@pytest.mark.parametrize("recipe", ["w8a8", "w4-gptq", "i-bert"])
def test_layers_may_be_called_with_the_name_of_their_input(recipe):
    torch.manual_seed(0)
    named = Named().eval()
    other = ByPosition().eval()
    other.load_state_dict(named.state_dict())
    made = [ptq.quantize(m, ptq.recipe(recipe, m), pairs(X)) for m in (named, other)]
    assert made[0](X).equal(made[1](X))


@pytest.mark.parametrize("cost", COSTS)
def test_costs_of_layers_called_by_name(cost):
    torch.manual_seed(0)
    named, other = Named().eval(), ByPosition().eval()
    other.load_state_dict(named.state_dict())
    assert layer_costs(named, pairs(X), cost) == layer_costs(other, pairs(X), cost)
    with pytest.raises(ValueError, match="no cost of bits is called speed"):
        layer_costs(named, pairs(X), "speed")


def test_the_price_of_a_layer_that_never_runs_names_it():
    network, x = Idle().eval(), draw(2, 4)
    recipes = uniform_recipes(network, "w4-nearest")
    with pytest.raises(ValueError, match="idle never ran"):
        energies(network, recipes, x, ["used", "idle"])


def test_quantizing_in_inference_mode_gives_the_same():
    torch.manual_seed(0)
    network = vit()
    recipe = Recipe("r", layers=(LayerSpec(".*", W4),), steps=("adaround",))
    expected = ptq.quantize(network, recipe, pairs(TOKENS))
    with torch.inference_mode():
        quantized = ptq.quantize(network, recipe, pairs(TOKENS))
    assert quantized(TOKENS).equal(expected(TOKENS))


def test_parameters_that_are_no_floats_and_states_that_are_no_tensors():
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"version": 1}

    network = nn.Sequential(nn.Linear(6, 4)).eval()
    mask = nn.Parameter(torch.ones(2, dtype=torch.bool), requires_grad=False)
    network.register_parameter("mask", mask)  # the first, as a module's own come before its parts'
    ptq.quantize(network, ptq.recipe("w8a8", network), pairs(TOKENS))
    with pytest.raises(ValueError, match="0._extra_state of the network is no tensor"):
        ptq.quantize(nn.Sequential(Odd(6, 4)), ptq.recipe("w8a8", network), pairs(TOKENS))


def test_an_argument_that_must_be_named_is_one_too_many():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x, *, scale):
            return self.fc(x) * scale

    with pytest.raises(ValueError, match="takes x, scale"):
        ptq.quantize(Asking(), ptq.recipe("w8a8", Asking()), pairs(TOKENS))


def test_adaround_of_a_block_with_calibrated_quantizers_is_refused():
    block = nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6))
    network = nn.Sequential(block, nn.Linear(6, 4)).eval()
    layers = (LayerSpec(".*", W4, ptq.Uniform(8, symmetric=False)),)
    recipe = Recipe("r", layers=layers, steps=("calibrate", "adaround"), units="0")
    with pytest.raises(ValueError, match="the quantizers in 0 are calibrated"):
        ptq.quantize(network, recipe, pairs(TOKENS))


def test_an_error_of_gptq_names_the_layer():
    layers = (LayerSpec("0", ptq.Uniform(4, granularity="channel", axis=2)),)
    with pytest.raises(ValueError, match="^0: "):
        ptq.quantize(vit(), Recipe("r", layers=layers, steps=("gptq",)), pairs(TOKENS))


class Attending(nn.Module):
    """Attention by torch's function, with some arguments by name or fewer heads of keys."""

    def __init__(self, named: bool, keys: int = 2):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(6, 8), nn.Linear(6, 8 * keys), nn.Linear(8, 4)
        self.named, self.keys = named, keys

    def forward(self, x):
        q = self.q(x).unflatten(-1, (2, 4)).mT.movedim(-1, 1)
        k, v = self.kv(x).unflatten(-1, (2, self.keys, 4)).permute(2, 0, 3, 1, 4)
        attend = F.scaled_dot_product_attention
        gqa = self.keys != 2
        y = attend(q, key=k, value=v, enable_gqa=gqa) if self.named else attend(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2)).mean(1)


def test_ranking_takes_keys_by_name_and_refuses_heads_that_share_them():
    torch.manual_seed(0)
    x = draw(8, 5, 6)
    named, other = Attending(True).eval(), Attending(False).eval()
    other.load_state_dict(named.state_dict())
    made = [ptq.quantize(m, ptq.recipe("w8a8-ranking", m), pairs(x)) for m in (named, other)]
    assert made[0](x).equal(made[1](x))
    shared = Attending(True, keys=1).eval()
    with pytest.raises(ValueError, match="each head of q has one of k"):
        ptq.quantize(shared, ptq.recipe("w8a8-ranking", shared), pairs(x))


class Decoding(nn.Module):
    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(draw(1, 3, 8))
        layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1)
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.both = nn.ModuleDict({"a": attention, "b": attention})

    def forward(self, x):
        for attention in self.both.values():
            x = attention(x, x, x)[0]
        return self.decoder(self.queries.expand(len(x), -1, -1), x)


def test_decoders_stay_as_they_are_and_an_attention_at_two_places_is_opened_at_both():
    torch.manual_seed(0)
    network, x = Decoding().eval(), draw(2, 5, 8)
    opened = ptq.open_attention(copy.deepcopy(network))
    torch.testing.assert_close(opened(x), network(x))
    assert opened.both["a"] is opened.both["b"]
    assert type(opened.both["a"]) is not nn.MultiheadAttention
    with pytest.raises(ValueError, match=r"tokens \[B, N, d\] alone"):
        opened.both["a"](x[0], x[0], x[0])


@pytest.mark.parametrize("step", ["correct_biases", "adaround"])
def test_what_a_layer_puts_out_is_taken_before_others_write_on_it(step):
    def made(inplace):
        torch.manual_seed(0)
        layers = nn.Linear(6, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 4)
        network = nn.Sequential(*layers).eval()
        steps = ("nearest", step) if step == "correct_biases" else (step,)
        return ptq.quantize(
            network, Recipe("r", layers=(LayerSpec(".*", W4),), steps=steps), pairs(TOKENS)
        )

    assert made(True)(TOKENS).equal(made(False)(TOKENS))
