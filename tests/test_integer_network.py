"""Networks of integers alone: the bits of both ways, no float inside, what the recipe simulates."""

import math
from fractions import Fraction

import pytest
import torch
from small import draw, small_network
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ptq
from lab.models import vit
from ptq.integer import OutOfRange
from ptq.integer.operators import Codes, Concatenation, Mean, Requantize, Sum
from ptq.layers import QuantizedLayer
from ptq.methods.norms import replace_norms

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


def mobile():
    return small_network()


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


CASES = {"mobilevit": (mobile, "i-bert"), "vit": (transformer, "i-bert")}
CASES |= {"resnet": (residual, "i-bert"), "vit-logs": (transformer, "fq-vit-a4")}


@pytest.fixture(scope="module", params=CASES)
def quantized(request):
    make, recipe = CASES[request.param]
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
def test_it_predicts_what_the_recipe_simulates(quantized):
    x = draw(60, 3, 32, 32, seed=10)
    simulated, integer = quantized(x).double(), ptq.integer_network(quantized)
    logits = integer.decode(integer(integer.encode(x)))
    assert logits.argmax(1).equal(simulated.argmax(1))
    assert (logits - simulated).square().mean() < 1e-4 * simulated.var()
