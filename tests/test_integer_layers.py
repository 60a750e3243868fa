"""Formats, layers and recipes of FQ-ViT and I-BERT: integers within a float network."""

import math
from dataclasses import replace

import pytest
import torch
import torchvision
from small import draw, small_network
from torch import nn

import ptq
from mobilevit import AttentionCore
from ptq import packing
from ptq.formats import Log2, PowerOfTwo, Uniform
from ptq.integer import OutOfRange
from ptq.kinds import quantized
from ptq.layers import IntegerLayer, QuantizedAttentionCore, Quantizer
from ptq.methods import fq_vit, ibert
from ptq.methods.norms import replace_norms
from ptq.recipe import LayerSpec, Recipe
from ptq.recipes.fq_vit import INTEGER

UNSIGNED = Uniform(8, symmetric=False)
IMAGES = [(draw(8, 3, 64, 64, seed=i), None) for i in range(2)]


class TinyViT(nn.Module):
    """A vision transformer of one layer, with the layers that ViTs have: images [B, 3, 64, 64]."""

    def __init__(self, dim=32, heads=2):
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(3, dim, 16, 16)
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(dim) for _ in range(3))
        self.qkv, self.core, self.proj = (
            nn.Linear(dim, 3 * dim),
            AttentionCore(),
            nn.Linear(dim, dim),
        )
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.classifier = nn.Linear(dim, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(self.core(*qkv.unbind()).transpose(1, 2).flatten(2))
        return self.classifier(self.norm(x + self.ffn(self.norm2(x))).mean(1))


def vit():
    torch.manual_seed(0)
    network = TinyViT().eval()
    network.qkv.weight.data *= 3  # scores of trained networks are further apart
    for norm in (network.norm1, network.norm2):
        norm.weight.data = 1 + 0.5 * draw(32, seed=1)
        norm.bias.data = 0.2 * draw(32, seed=2)
    return network


def mobile():
    network = small_network()
    replace_norms(network, None, IMAGES, None)
    return network


NETWORKS = {"mobilevit": mobile, "vit": vit}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return NETWORKS[request.param]()


def noise(network, recipe):
    """Mean square of what a recipe changes in the logits, over their variance."""
    quantized = ptq.quantize(network, recipe, IMAGES)
    x = draw(32, 3, 64, 64, seed=9)
    with torch.no_grad():
        exact = network(x)
        return ((quantized(x) - exact).square().mean() / exact.var()).item()


# Layers.


def calibrated(layer, *inputs):
    """The layer with the scales of one call on `inputs`."""
    quantizers = [m for m in layer.modules() if isinstance(m, Quantizer)]
    for quantizer in quantizers:
        quantizer.observe()
    layer(*inputs)
    for quantizer in quantizers:
        quantizer.freeze()
    return layer


def norm_of(channels=32):
    norm = nn.LayerNorm(channels)
    norm.weight.data, norm.bias.data = 1 + 0.3 * draw(channels, seed=3), draw(channels, seed=4)
    return norm


def spread_tokens(channels=32):
    return draw(4, 16, channels, seed=5) * 2.0 ** (torch.arange(channels) % 5)


NORM = LayerSpec(".*", input=PowerOfTwo(8), output=UNSIGNED, kind="fq-vit-norm")


@torch.no_grad()
@pytest.mark.parametrize("most", [3, 6])
def test_fq_vit_norm_puts_out_codes_within_a_level_of_float(most):
    norm, x, spec = norm_of(), spread_tokens(), replace(NORM, input=PowerOfTwo(8, most))
    layer = calibrated(fq_vit.PowerOfTwoNorm(norm, spec), x)
    exact, simulated = norm(layer.input(x)), layer(x)
    step = layer.output.scale
    low, high = (step * (end - layer.output.zero_point) for end in (0, 255))
    assert (simulated - exact.clamp(low, high)).abs().max() <= 0.56 * step
    codes = simulated / step + layer.output.zero_point
    assert (
        torch.allclose(codes, codes.round(), atol=1e-3) and 0 <= codes.min() and codes.max() < 256
    )
    published = calibrated(fq_vit.PowerOfTwoNorm(norm, replace(spec, published=True)), x)
    worse = (published(x) - norm(x)).square().mean()
    assert (simulated - norm(x)).square().mean() < worse


@torch.no_grad()
def test_tokens_without_variance_get_the_bias_or_a_named_error():
    norm, x = norm_of(), spread_tokens()
    constant = torch.full((1, 1, 32), 0.5)
    layer = calibrated(fq_vit.PowerOfTwoNorm(norm, replace(NORM, input=PowerOfTwo(8, 0))), x)
    assert (layer(constant) - layer.output(norm.bias)).abs().max() < 1e-5
    layer = calibrated(fq_vit.PowerOfTwoNorm(norm, replace(NORM, published=True)), x)
    with pytest.raises(OutOfRange, match="a token has no variance"):
        layer(torch.zeros(1, 1, 32))
    spec = LayerSpec(".*", input=Uniform(16), kind="i-bert-norm", published=True)
    layer = calibrated(ibert.IBertNorm(norm, spec), x)
    with pytest.raises(OutOfRange, match="a token has no variance"):
        layer(torch.zeros(1, 1, 32))
    norm.weight[3] = 0
    with pytest.raises(OutOfRange, match="divides by a weight"):
        layer(x)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_fq_vit_core_corrected_is_closer_than_published(bits):
    q, k, v = (2 * draw(4, 2, 64, 16, seed=i) for i in range(3))
    core = AttentionCore()
    exact = core(q, k, v)
    ours = UNSIGNED if bits == 8 else Log2(4)
    errors = {}
    for published, format in ((False, ours), (True, Log2(bits, "3/2", zero_code=False))):
        spec = LayerSpec(
            "", input=UNSIGNED, attention=format, kind="fq-vit-core", published=published
        )
        layer = calibrated(quantized(core, spec), q, k, v)
        errors[published] = (layer(q, k, v) - exact).square().mean().item()
    assert errors[False] < errors[True] < exact.square().mean()


@torch.no_grad()
@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_a_softmax_of_more_powers_of_two_is_no_worse(bits):
    q, k, v = (2 * draw(4, 2, 64, 16, seed=i) for i in range(3))
    core = AttentionCore()
    exact, errors = core(q, k, v), []
    for format in (Log2(4), Log2(bits)):
        spec = LayerSpec("", input=UNSIGNED, attention=format, kind="fq-vit-core")
        layer = calibrated(quantized(core, spec), q, k, v)
        errors.append((layer(q, k, v) - exact).square().mean().item())
    assert errors[1] <= 1.05 * errors[0]


@torch.no_grad()
def test_i_bert_layers_are_close_to_float_and_closer_than_published():
    q, k, v = (2 * draw(4, 2, 64, 16, seed=i) for i in range(3))
    core, norm, x = AttentionCore(), norm_of(), spread_tokens()
    signed = {"input": Uniform(8)}
    of_core = signed | {"attention": UNSIGNED, "kind": "i-bert-core"}
    # On 16-bit codes either form errs by less than 1e-7.
    of_norm = {"input": Uniform(8), "kind": "i-bert-norm"}
    of_act = signed | {"kind": "i-bert-act"}
    cases = [
        (core, (q, k, v), of_core, {}),
        (norm, (x,), of_norm, {"output": Uniform(16, symmetric=False)}),
        (nn.GELU(), (2 * x / 16,), of_act, {}),
        (nn.SiLU(), (x,), of_act, {}),
    ]
    for layer, inputs, spec, refined in cases:
        exact, errors = layer(*inputs), {}
        for published in (False, True):
            more = {} if published else refined
            built = quantized(layer, LayerSpec("", **spec, **more, published=published))
            built = calibrated(built, *inputs)
            errors[published] = (built(*inputs) - exact).square().mean() / exact.square().mean()
        assert errors[False] < errors[True] < 0.01, type(layer)
        assert errors[False] < 1e-3, type(layer)


@torch.no_grad()
def test_activations_from_a_table_of_codes_are_those_of_each_code():
    for layer in (nn.SiLU(), nn.GELU()):
        for format in (Uniform(8), UNSIGNED):
            spec = LayerSpec("", input=format, kind="i-bert-act")
            built = calibrated(ibert.IBertActivation(layer, spec), draw(50, 7))
            x = 2 * draw(50, 7, seed=1)
            codes = built.input.integers(x)
            y, scale = built.integers(codes, float(built.input.scale))
            assert built(x).equal((y.double() * scale).float())


def test_specs_that_do_not_suit_a_layer_are_refused():
    norm, core = nn.LayerNorm(4), AttentionCore()
    spec = LayerSpec("", input=UNSIGNED, kind="fq-vit-core", published=True, attention=Log2(4))
    for make in (
        lambda: quantized(norm, replace(NORM, weight=Uniform(8))),
        lambda: quantized(nn.LayerNorm((2, 4)), NORM),
        lambda: quantized(norm, replace(NORM, output=None)),
        lambda: quantized(norm, replace(NORM, input=UNSIGNED)),
        lambda: quantized(core, spec),  # the code of 0 is not theirs
        lambda: quantized(core, replace(spec, published=False, output=UNSIGNED)),
        lambda: quantized(core, replace(spec, kind="i-bert-core")),
        lambda: quantized(norm, LayerSpec("", input=Uniform(16), kind="i-bert-norm")),
        lambda: quantized(nn.SiLU(), LayerSpec("", kind="i-bert-act")),
    ):
        with pytest.raises(ValueError):
            make()


# Recipes.


@pytest.mark.parametrize("recipe", INTEGER, ids=lambda recipe: recipe.name)
def test_recipes_compute_in_integers_and_come_back_from_a_file(recipe, network, tmp_path):
    recipe = ptq.recipe(recipe.name, network)
    assert Recipe.fromdict(recipe.asdict()) == recipe and not recipe.exportable
    quantized = ptq.quantize(network, recipe, IMAGES)
    layers = [m for m in quantized.modules() if isinstance(m, IntegerLayer)]
    kinds = [type(m) for m in network.modules()]
    expected = kinds.count(nn.LayerNorm) + kinds.count(AttentionCore)
    if any(spec.kind.endswith("-act") for spec in recipe.layers):
        expected += kinds.count(nn.SiLU) + kinds.count(nn.GELU)
    assert len(layers) == expected
    assert not any(isinstance(m, QuantizedAttentionCore) for m in quantized.modules())
    packing.save(quantized, recipe, tmp_path / "a.safetensors")
    loaded, again = packing.load(tmp_path / "a.safetensors", network)
    x = draw(4, 3, 64, 64, seed=9)
    with torch.no_grad():
        assert again == recipe and loaded(x).equal(quantized(x))
        single = torch.cat([quantized(x[i : i + 1]) for i in range(4)])
        assert torch.allclose(single, quantized(x), atol=2e-2 * float(quantized(x).std()))
    x[0, 1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="what a layer takes in is not finite"):
        quantized(x)


@pytest.mark.parametrize(
    ("name", "whole"),
    [("fq-vit", True), ("fq-vit-a4", True), ("i-bert", False), ("i-vit", False)],
)
def test_corrected_recipes_are_closer_to_float_than_published_ones(name, whole, network):
    recipes = [ptq.recipe(n, network) for n in (name, f"{name}-published")]
    if not whole:  # the rounding of products is larger than what they differ by in a tiny ViT
        recipes = [replace(r, layers=without_products(r), steps=("calibrate",)) for r in recipes]
    noises = [noise(network, recipe) for recipe in recipes]
    assert noises[0] < noises[1], noises


def without_products(recipe):
    return tuple(spec for spec in recipe.layers if spec.kind != "product")


def test_layers_after_a_norm_take_its_codes_as_they_are():
    network = vit()
    quantized = ptq.quantize(network, ptq.recipe("fq-vit", network), IMAGES)
    out, taken = quantized.norm1.output, quantized.qkv.input
    assert out.scale.equal(taken.scale) and out.zero_point.equal(taken.zero_point)
    with torch.no_grad():
        y = quantized.norm1(draw(2, 16, 32, seed=7))
        assert torch.allclose(taken(y), y, atol=1e-6)


def test_other_networks_get_the_layers_that_they_have():
    network = torchvision.models.vit_b_16(image_size=32)
    recipe = ptq.recipe("i-bert", network)
    assert {spec.kind for spec in recipe.layers} == {"i-bert-norm", "i-bert-act", "product"}
    network = torchvision.models.resnet18()
    assert [spec.kind for spec in ptq.recipe("fq-vit", network).layers] == ["product"]


def test_fq_vits_layer_norm_in_pythons_numbers():
    """Every token and channel has a floored multiplier of 8 bits and a shift of its own."""
    token, scale, out = (3, -1, 4, 1, -5, 9, 2, -6), 0.05, 0.004
    weight, bias = 1 + 0.5 * draw(8, seed=1), 0.3 * draw(8, seed=2)
    got = fq_vit.fq_vit_norm(torch.tensor(token), scale, weight, bias, out)
    mean, n = scale * sum(token) / 8, 8
    deviation = scale / n * math.sqrt(n * sum(q * q for q in token) - sum(token) ** 2)
    for q, w, b, y in zip(token, weight.tolist(), bias.tolist(), got.tolist()):
        factor = scale * w / (deviation * out)
        shift = 7 - math.floor(math.log2(abs(factor)))
        multiplier = math.copysign(math.floor(abs(factor) * 2**shift), factor)
        offset = round((b - mean * w / deviation) / out * 2**shift)
        assert y == pytest.approx(round((multiplier * q + offset) / 2**shift) * out)
