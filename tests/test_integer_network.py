"""Networks of integers alone: the bits of both ways, no float inside, what the recipe simulates."""

import copy
from fractions import Fraction
from itertools import product

import pytest
import torch
from conftest import run
from small import draw, small_network
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ptq
from lab.cli import BadInput
from lab.engines import integer as engine
from lab.engines import torch_float64
from lab.models import vit
from lab.report.rows import read_row
from mobilevit import AttentionCore
from ptq.analysis.compare import noise
from ptq.formats import Uniform
from ptq.integer import OutOfRange
from ptq.integer.network import IntegerNetwork
from ptq.integer.operators import Attention, Codes, Concatenation, Mean, Product, Sum
from ptq.layers import QuantizedLayer, Quantizer
from ptq.methods import ibert
from ptq.methods.norms import replace_norms
from ptq.recipe import LayerSpec

IMAGES = [(draw(8, 3, 32, 32, seed=i), None) for i in range(2)]


class Residual(nn.Module):
    """What ResNets have: ReLU, pooling, a sum with a convolution on either side."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.conv, self.norm2 = nn.Conv2d(8, 12, 3, 2, 1, groups=2), nn.BatchNorm2d(12)
        self.down = nn.Sequential(nn.Conv2d(8, 12, 1, 2), nn.BatchNorm2d(12))
        self.dilated = nn.Conv2d(12, 12, (3, 1), dilation=2, padding=(2, 0))
        self.pool, self.classifier = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(12, 10)

    def forward(self, x):
        x = self.maxpool(self.relu(self.norm(self.stem(x))))
        y = self.norm2(self.conv(x))
        y += self.down(x)
        y = self.dilated(self.relu(y))
        return self.classifier(torch.flatten(self.pool(y), 1))


def residual():
    torch.manual_seed(0)
    return Residual()


def transformer():
    vit.VARIANTS["small"] = vit.Variant(img_size=32, patch=8, dim=16, layers=2, heads=2)
    torch.manual_seed(0)
    network = vit.ViT("small")
    del vit.VARIANTS["small"]
    for block in network.blocks:
        block.attn.qkv.weight.data *= 20  # scores of trained networks are further apart
    network.classifier.weight.data *= 50
    return network


CASES = {
    "mobilevit": (small_network, "i-bert"),
    "vit": (transformer, "i-bert"),
    "resnet": (residual, "i-bert"),
    "vit-logs": (transformer, "fq-vit-a4"),
    "mobilevit-shifts": (small_network, "i-vit"),
}


@pytest.fixture(scope="module", params=CASES)
def quantized(request):
    return quantized_by(*CASES[request.param])


def quantized_by(make, recipe):
    network = make().eval()
    replace_norms(network, None, IMAGES, None)
    return ptq.quantize(network, ptq.recipe(recipe, network), IMAGES)


class IntegersOnly(TorchDispatchMode):
    """Fails when an operator takes in or gives a tensor that is not of integers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor):
                assert value.dtype in (torch.int64, torch.bool), f"{func} of {value.dtype}"
        return out


@torch.no_grad()
def test_no_operator_sees_a_float_and_both_ways_give_the_same_bits(quantized):
    integer = ptq.integer_network(quantized, products=torch.int64)
    codes = integer.encode(draw(6, 3, 32, 32, seed=9))
    with IntegersOnly():
        logits = integer(codes)
    assert logits.dtype == torch.int64 and logits.shape == (6, 10)
    assert not any(t.is_floating_point() for t in integer.operators.state_dict().values())
    fast = ptq.integer_network(quantized)
    assert fast(codes).equal(logits)
    with pytest.raises(AssertionError, match="float64"), IntegersOnly():
        fast(codes)
    with pytest.raises(TypeError, match="float32"):
        fast(codes.float())
    with pytest.raises(OutOfRange, match="codes of images lie in 0 to 255"):
        fast(codes + 200)


@torch.no_grad()
@pytest.mark.parametrize("products", [torch.int64, torch.float64])
def test_an_empty_batch_gives_as_many_logits_as_in_float(quantized, products):
    integer, x = ptq.integer_network(quantized, products), draw(2, 3, 32, 32)[:0]
    logits = integer.decode(integer(integer.encode(x)))
    assert logits.shape == quantized(x).shape == (0, 10)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_refused(value):
    quantizer = Quantizer(Uniform(8, symmetric=False), "minmax")
    quantizer.scale, quantizer.zero_point = torch.tensor([0.1]), torch.tensor([3])
    with pytest.raises(ValueError, match="an image is not finite"):
        IntegerNetwork(nn.Identity(), quantizer, 1.0).encode(torch.tensor([[0.5, value]]))


def in_float64(quantized):
    network = copy.deepcopy(quantized).double()
    for module in network.modules():
        if isinstance(module, QuantizedLayer):
            module.set_weight(module.codes, module.scale)
    return network


@torch.no_grad()
def test_it_predicts_what_the_recipe_simulates(quantized):
    x, integer = draw(60, 3, 32, 32, seed=10), ptq.integer_network(quantized)
    logits = integer.decode(integer(integer.encode(x)))
    # Rounding in float64 moves next to no value to another code; in float32 some move.
    exact, simulated = in_float64(quantized)(x.double()), quantized(x)
    for values, most in ((exact, 1e-4), (simulated.double(), 1e-3)):
        assert logits.argmax(1).equal(values.argmax(1))
        assert noise(logits, values) < most


# A second implementation in Python's integers and fractions.

GRID = Codes(0.001, 2**20)  # of what layers take in below


def layer_of(layer, groups=1):
    """The layer with random codes of weights and inputs: scales of inputs per channel if it has a
    channel a group."""
    channels = groups if groups > 2 else 1
    fmt = Uniform(8, symmetric=False)
    if channels > 1:
        fmt = Uniform(8, symmetric=False, granularity="channel", axis=1)
    quantizer = Quantizer(fmt, "minmax")
    quantizer.scale = 0.01 + draw(channels, seed=1).abs()
    quantizer.zero_point = torch.arange(channels, dtype=torch.int32) * 40 + 7
    built = QuantizedLayer(layer, quantizer, Uniform(8, granularity="channel"), "minmax")
    codes = (40 * draw(*layer.weight.shape, seed=2)).round().clamp(-128, 127).int()
    built.set_weight(codes, 0.001 + draw(len(codes), seed=3).abs())
    layer.bias.data = 5 * draw(len(codes), seed=4)
    return built


def taken_in(layer, code, channel):
    """The quantizer's code, less its zero-point, for a code of GRID."""
    channel = channel % len(layer.input.scale)
    scale, zero = float(layer.input.scale[channel]), int(layer.input.zero_point[channel])
    nearest = (Fraction(code) * Fraction(GRID.scale / scale) + Fraction(1, 2)).__floor__()
    return min(max(nearest, -zero), 255 - zero)


def scale_of(layer, output, channel):
    channel = channel % len(layer.input.scale)
    return Fraction(float(layer.scale[output])) * Fraction(float(layer.input.scale[channel]))


def assert_near(got, codes, wanted):
    """Within two units of 30 bits."""
    assert abs(got - wanted / Fraction(codes.scale)) <= 2 and abs(got) <= codes.reach


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_linear_layer_as_in_plain_integers(dtype):
    layer = layer_of(nn.Linear(5, 4))
    x = (2**16 * draw(3, 5, seed=5)).long()
    built = Product(layer, GRID, dtype)
    got, weight, bias = built(x), layer.codes.tolist(), layer.layer.bias.tolist()
    for row, o in product(range(3), range(4)):
        total = sum(weight[o][c] * taken_in(layer, int(x[row, c]), c) for c in range(5))
        wanted = total * scale_of(layer, o, 0) + Fraction(bias[o])
        assert_near(int(got[row, o]), built.codes, wanted)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 1, 2), (2, 2, 1), (4, 2, 1)])
def test_convolution_as_in_plain_integers(dtype, groups, stride, dilation):
    conv = nn.Conv2d(4, 8, (3, 2), stride, (1, 2), dilation, groups)
    layer = layer_of(conv, groups)
    x = (2**16 * draw(2, 4, 5, 6, seed=6)).long()
    built = Product(layer, GRID, dtype)
    got, bias = built(x), conv.bias.tolist()
    assert got.shape == conv(x.float()).shape
    for b, o, i, j in product(*map(range, got.shape)):
        total = 0
        for c, k, m in product(range(4 // groups), range(3), range(2)):
            channel = o // (8 // groups) * (4 // groups) + c
            row, column = i * stride - 1 + k * dilation, j * stride - 2 + m * dilation
            if 0 <= row < 5 and 0 <= column < 6:
                code = taken_in(layer, int(x[b, channel, row, column]), channel)
                total += int(layer.codes[o, c, k, m]) * code
        wanted = total * scale_of(layer, o, channel) + Fraction(bias[o])
        assert_near(int(got[b, o, i, j]), built.codes, wanted)


@torch.no_grad()
def test_attention_spread_evenly_over_many_tokens_fits_its_register():
    """Its softmax is far below 1, so its levels are far finer than its 8 bits reach."""
    unsigned = Uniform(8, symmetric=False)
    spec = LayerSpec("", input=Uniform(8), attention=unsigned, kind="i-bert-core")
    core = ibert.IBertCore(AttentionCore(), spec)
    tensors = [size * draw(1, 1, 512, 4, seed=i) for i, size in enumerate((0.1, 0.1, 1))]
    for quantizer in core.inputs.values():
        quantizer.observe()
    core(*tensors)
    for quantizer in core.inputs.values():
        quantizer.freeze()
    built = Attention(core, *[Codes(1e-6, 2**23)] * 3, torch.int64)
    got = built(*((t / 1e-6).round().long() for t in tensors)) * built.codes.scale
    simulated = core(*tensors).double()
    assert (got - simulated).abs().max() < 0.01 * simulated.abs().max()


def test_sums_joins_and_means_as_in_plain_integers():
    a, b = (2**18 * draw(7, seed=7)).long(), (2**9 * draw(7, seed=8)).long()
    known = Codes(0.003, 2**20), Codes(0.11, 2**11)
    total, joined = Sum(*known), Concatenation(known, 0)
    values = [[Fraction(x.scale) * q for q in t.tolist()] for x, t in zip(known, (a, b))]
    for got, u, v in zip(total(a, b).tolist(), *values):
        assert_near(got, total.codes, u + v)
    for got, wanted in zip(joined(a, b).tolist(), values[0] + values[1]):
        assert_near(got, joined.codes, wanted)
    x = (2**20 * draw(2, 3, 4, 5, seed=9)).long()
    means = Mean((2, 3), False)(x)
    for i, j in product(range(2), range(3)):
        exact = Fraction(sum(x[i, j].flatten().tolist()), 20)
        assert means[i, j] == (exact + Fraction(1, 2)).__floor__()


# What has no integer form.


class Odd(nn.Module):
    """A quantized layer and, behind it, what `of` does to its output."""

    def __init__(self, of):
        super().__init__()
        self.conv, self.of = nn.Conv2d(3, 4, 3), of

    def forward(self, x):
        return self.of(self.conv(x))


@pytest.mark.parametrize(
    ("make", "recipe", "says"),
    [
        (small_network, "w8a8", "stem.act: a SiLU in float has no integer form"),
        (residual, "w4-nearest", "stem takes in the image in float"),
        (transformer, "i-bert-published", "norm1: published arithmetic"),
        (transformer, "i-vit-published", "norm1: published arithmetic"),
        (lambda: Odd(lambda x: 2 * x), "w8a8", "mul: has no integer form"),
        (lambda: Odd(lambda x: x + 1), "w8a8", "add: has an integer form only for two tensors"),
        (lambda: Odd(lambda x: torch.add(x, x, alpha=2)), "w8a8", "add: has an integer form only"),
        (lambda: Odd(lambda x: x.mean()), "w8a8", "mean: has an integer form only over named"),
        (lambda: Odd(lambda x: x.mean((2, 3), dtype=torch.float32)), "w8a8", "only with dim and"),
        (lambda: Odd(lambda x: (x, x)), "w8a8", "gives more than one tensor"),
        (lambda: Odd(lambda x: x if x.sum() > 0 else -x), "w8a8", "torch.fx can't follow"),
        (lambda: Odd(nn.Hardswish()), "w8a8", "of: a Hardswish in float"),
        (lambda: Odd(nn.AdaptiveAvgPool2d(2)), "w8a8", "of: pooling has an integer form only"),
        (lambda: Odd(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))), "w8a8", "of.1: a BatchNorm2d"),
    ],
)
def test_what_has_no_integer_form_is_refused_by_name(make, recipe, says):
    quantized = quantized_by(make, recipe)
    with pytest.raises(ValueError, match=says):
        ptq.integer_network(quantized)


@torch.no_grad()
def test_feature_maps_that_do_not_fit_are_refused_by_name():
    quantized = quantized_by(small_network, "i-bert")
    network = ptq.integer_network(quantized)
    assert network(network.encode(draw(1, 3, 48, 48))).shape == (1, 10)
    with pytest.raises(ValueError, match="fit_patches interpolates a feature map"):
        network(network.encode(draw(1, 3, 36, 36)))
    with pytest.raises(BadInput, match="fit_patches interpolates a feature map"):
        engine.load(quantized, None, None, draw(1, 3, 36, 36))
    with pytest.raises(ValueError, match="torch.int64 or torch.float64"):
        ptq.integer_network(quantized, products=torch.float32)


def test_a_row_of_kind_integer(checkpoint, tmp_path):
    settings = ("--calibration-images", 16, "--test-images", 20, "--latency-runs", 1)
    settings += ("--img-size", 64)  # at 32, the last feature map is a single pixel
    run(
        "quantize.py", "--checkpoint", checkpoint, "--recipes", "i-bert", "--engines", "integer",
        "torch-eager", "torch-float64", *settings, "--output", tmp_path,
    )  # fmt: skip
    found = [read_row(path) for path in tmp_path.rglob("*.json")]
    rows = {row["engine"]: row for row in found}
    kinds = [rows[name]["kind"] for name in ("integer", "torch-eager", "torch-float64")]
    assert kinds == ["integer", "simulated", "simulated"] and len(found) == 3
    for name in ("torch-eager", "torch-float64"):
        assert rows["integer"]["predictions"] == rows[name]["predictions"]


@torch.no_grad()
def test_integers_are_nearer_to_float64_than_float32_is():
    quantized = quantized_by(small_network, "i-bert")
    x = draw(4, 3, 32, 32, seed=9)
    recipe = ptq.recipe("i-bert", small_network())
    exact = torch_float64.load(quantized, recipe, None, x[:1]).run(x)
    network = ptq.integer_network(quantized)
    assert exact.dtype == torch.float64 and next(quantized.parameters()).dtype == torch.float32
    integers, float32 = network.decode(network(network.encode(x))), quantized(x)
    assert (integers - exact).abs().max() < 1e-6 * exact.abs().max()
    assert noise(float32, exact) > noise(integers, exact)
