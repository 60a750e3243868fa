"""Rounding methods against brute force and against each other."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from small import Idle, draw
from torch import nn

import ptq
from ptq import kinds
from ptq.formats import Uniform
from ptq.layers import QuantizedLayer
from ptq.methods import adaround
from ptq.methods.gptq import gptq_codes, input_moments
from ptq.methods.nearest import units, weight_scale
from ptq.recipe import LayerSpec, Recipe

FORMAT = Uniform(3, granularity="channel")


def correlated(*shape):
    """Inputs whose channels and neighbours share a common part, as those of real layers do."""
    shared = draw(shape[0], 1, *(1 for _ in shape[2:]), seed=1)
    return draw(*shape) + 2 * draw(shape[0], 1, *shape[2:], seed=2) + 2 * shared


LAYERS = {
    "dense": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "grouped": lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "pointwise": lambda: nn.Conv2d(8, 6, 1),
    "linear": lambda: nn.Linear(8, 6),
}


def make(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    x = correlated(16, layer.weight.shape[1] * getattr(layer, "groups", 1), 8, 8)
    return layer, x.movedim(1, -1) if kind == "linear" else x


def quantized(layer, x, method, fmt=FORMAT):
    recipe = Recipe("r", layers=(LayerSpec(".*", fmt),), steps=(method,))
    return ptq.quantize(nn.Sequential(layer), recipe, [(x[:8], None), (x[8:], None)])


@pytest.mark.parametrize("kind", LAYERS)
def test_moments_give_the_output_error(kind):
    layer, x = make(kind)
    moments = input_moments(layer, x).double()
    change = draw(*layer.weight.shape, seed=3).double()
    rows = change.reshape(len(moments), -1, moments.shape[1])
    expected = (rows @ moments @ rows.mT).diagonal(dim1=1, dim2=2).sum()
    if kind == "linear":
        actual = F.linear(x.double(), change)
    else:
        actual = F.conv2d(
            x.double(), change, None, layer.stride, layer.padding, layer.dilation, layer.groups
        )
    torch.testing.assert_close(actual.square().sum(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["gptq", "adaround"])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_come_closer_than_with_nearest(kind, method, monkeypatch):
    monkeypatch.setattr(adaround, "ITERATIONS", 300)
    layer, x = make(kind)
    errors = {
        m: (quantized(layer, x, m)(x) - layer(x)).square().mean() for m in ("nearest", method)
    }
    assert 0 < errors[method] < 0.9 * errors["nearest"]


@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
def test_gptq_takes_every_granularity(granularity):
    fmt = Uniform(4, granularity=granularity)
    layer, x = make("dense")
    result = quantized(layer, x, "gptq", fmt)[0]
    torch.testing.assert_close(result.layer.weight.detach(), fmt.decode(result.codes, result.scale))
    nearest = quantized(layer, x, "nearest", fmt)
    wanted = layer(x)
    assert (result(x) - wanted).square().mean() < (nearest(x) - wanted).square().mean()


def test_gptq_is_near_the_best_of_all_codes():
    fmt = Uniform(3, granularity="channel")
    layer = QuantizedLayer(nn.Linear(4, 1, bias=False), None, fmt, "mse")
    totals = torch.zeros(3, dtype=torch.float64)  # best, GPTQ, nearest
    every = torch.tensor(list(itertools.product(range(-4, 4), repeat=4))).double()
    for seed in range(20):
        with torch.no_grad():
            layer.layer.weight.copy_(draw(1, 4, seed=seed))
        x = correlated(64, 4).double()
        scale, moments = weight_scale(layer), x.T @ x
        weight = layer.layer.weight.detach()
        nearest = fmt.encode(weight, scale)
        found = gptq_codes(layer, scale, moments[None].float())
        off = weight.double() - torch.cat((every, found, nearest)) * scale.double()
        errors = ((off @ moments) * off).sum(1)
        totals += torch.stack((errors[:-2].min(), errors[-2], errors[-1]))
    assert totals[0] <= totals[1] < 1.1 * totals[0] < totals[2]


def test_gptq_of_a_unit_looks_at_inputs_from_before_its_rounding():
    torch.manual_seed(0)
    unit = nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6))
    x = correlated(64, 6)
    recipe = Recipe("r", layers=(LayerSpec(".*", FORMAT),), steps=("gptq",), units="0")
    second = ptq.quantize(nn.Sequential(unit), recipe, [(x, None)])[0][2]
    fresh = QuantizedLayer(copy.deepcopy(unit[2]), None, FORMAT, "mse")
    with torch.no_grad():
        moments = input_moments(unit[2], unit[1](unit[0](x)))
        expected = gptq_codes(fresh, second.scale, moments)
    assert torch.equal(second.codes, expected)


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_a_layer_of_a_unit_that_never_runs_is_refused(method):
    recipe = Recipe("r", layers=(LayerSpec(".*", FORMAT),), steps=(method,), units="0")
    with pytest.raises(ValueError, match="0.idle never ran"):
        ptq.quantize(nn.Sequential(Idle()), recipe, [(draw(2, 4), None)])


def test_adaround_refuses_units_that_give_several_tensors():
    class Two(nn.Sequential):
        def forward(self, x):
            return super().forward(x), x

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two(nn.Linear(4, 4))

        def forward(self, x):
            return sum(self.two(x))

    recipe = Recipe("r", layers=(LayerSpec(".*", FORMAT),), steps=("adaround",), units="two")
    with pytest.raises(ValueError, match="give one tensor, not for two"):
        ptq.quantize(Both(), recipe, [(draw(2, 4), None)])


class Scaled(nn.Module):
    """Its block is told by name how often to take its output."""

    class Block(nn.Sequential):
        def forward(self, x, gain=1):
            return gain * super().forward(x)

    def __init__(self, gain):
        super().__init__()
        self.block, self.gain = self.Block(nn.Linear(4, 4)), gain

    def forward(self, x):
        return self.block(x, gain=self.gain)


def test_adaround_refuses_units_that_are_told_more_by_name(monkeypatch):
    monkeypatch.setattr(adaround, "ITERATIONS", 3)
    recipe = Recipe("r", layers=(LayerSpec(".*", FORMAT),), steps=("adaround",), units="block")
    ptq.quantize(Scaled(1), recipe, [(draw(2, 4), None)])
    for gain in (3, torch.full((1,), 3.0)):
        with pytest.raises(ValueError, match="one input of one size, not for block"):
            ptq.quantize(Scaled(gain), recipe, [(draw(2, 4), None)])


def test_gptq_on_dead_inputs_rounds_to_nearest():
    layer, x = make("pointwise")
    x[:, 1:] = 0
    result = quantized(layer, x, "gptq")[0]
    nearest = quantized(layer, x, "nearest")[0]
    assert torch.equal(result.codes[:, 1:], nearest.codes[:, 1:])


def test_adaround_only_moves_a_weight_to_one_of_its_two_neighbours(monkeypatch):
    monkeypatch.setattr(adaround, "ITERATIONS", 100)
    layer, x = make("dense")
    result = quantized(layer, x, "adaround")[0]
    exact = FORMAT.rows(layer.weight.detach()) / result.scale[:, None]
    clipped = exact.clamp(FORMAT.qmin, FORMAT.qmax)
    assert ((FORMAT.rows(result.codes) - clipped).abs() < 1).all()


def test_adaround_is_near_the_best_of_all_ways_up_or_down(monkeypatch):
    monkeypatch.setattr(adaround, "ITERATIONS", 300)
    totals = torch.zeros(3, dtype=torch.float64)  # best, AdaRound, nearest
    ups = torch.tensor(list(itertools.product((0, 1), repeat=6)))
    for seed in range(8):
        # As small as errors of a layer's outputs are: they are weighed against the regularisation.
        layer, x = nn.Linear(6, 1, bias=False), 0.2 * correlated(64, 6)
        with torch.no_grad():
            layer.weight.copy_(draw(1, 6, seed=seed))
        found, nearest = (quantized(layer, x, m)[0] for m in ("adaround", "nearest"))
        weight, scale = layer.weight.detach(), found.scale
        every = ((weight / scale).floor() + ups).clamp(FORMAT.qmin, FORMAT.qmax)
        codes = torch.cat((every, found.codes, nearest.codes)).double()
        off = weight.double() - codes * scale.double()
        errors = (x.double() @ off.T).square().sum(0)
        totals += torch.stack((errors[:-2].min(), errors[-2], errors[-1]))
    assert totals[0] <= totals[1] < 1.1 * totals[0] < totals[2]


@pytest.mark.parametrize("method", ["nearest", "gptq", "adaround"])
def test_constant_filters_stay_what_they_are(method, monkeypatch):
    monkeypatch.setattr(adaround, "ITERATIONS", 100)
    layer, x = make("dense")
    with torch.no_grad():
        layer.weight[0], layer.weight[1] = 0, 0.3
    result = quantized(layer, x, method)[0]
    assert not result.codes[0].any()
    torch.testing.assert_close(result.layer.weight[0].detach(), torch.zeros_like(layer.weight[0]))
    # All 15 levels of a symmetric format reach to the constant, which is thus the last of them.
    assert (result.codes[1] == FORMAT.qmax).all()


def test_units_are_the_outermost_matches_in_order():
    class Pair(nn.Sequential):
        pass

    net = nn.Sequential(nn.Linear(2, 2), Pair(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    net.add_module("10", nn.Linear(2, 2))  # not in "1"
    recipe = Recipe("r", layers=(LayerSpec(".*", FORMAT),))
    model = ptq.quantize(net, recipe, [])
    assert units(model, None) == ["0", "1.0", "1.1", "2", "10"]
    assert units(model, "1") == ["0", "1", "2", "10"]


def test_learning_a_unit_as_one_beats_layer_by_layer(monkeypatch):
    monkeypatch.setattr(adaround, "ITERATIONS", 500)
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(8, 12, 1), nn.SiLU(), nn.Conv2d(12, 8, 1))
    net, x = nn.Sequential(block), correlated(32, 8, 6, 6)
    errors = []
    for pattern in ("0", None):
        recipe = Recipe("r", layers=(LayerSpec(".*", FORMAT),), steps=("adaround",), units=pattern)
        model = ptq.quantize(net, recipe, [(x, None)])
        errors.append((model(x) - net(x)).square().mean().item())
    assert errors[0] < errors[1]


def test_places_of_a_linear_layer_may_lie_in_rows_and_columns(monkeypatch):
    monkeypatch.setattr(adaround, "ITERATIONS", 300)
    spec = LayerSpec(".*", FORMAT)
    x, found = correlated(16, 2, 8, 6), []  # more channels than rows
    for inputs in (x, x.flatten(1, 2)):
        torch.manual_seed(0)
        unit = kinds.quantized(nn.Linear(6, 64), spec)
        adaround.reconstruct(unit, "", inputs, unit.layer(inputs).detach(), 8)
        found.append(unit.codes)
    assert torch.equal(*found)


@pytest.mark.parametrize("units", ["0", None])
def test_gptq_sees_inputs_of_all_batches_from_before_its_unit_is_rounded(units):
    """Without units every layer is one, and what comes before it is rounded already."""
    torch.manual_seed(0)
    unit = nn.Sequential(nn.Linear(24, 24), nn.SiLU(), nn.Linear(24, 24))
    x = correlated(64, 24) * torch.linspace(0.2, 2, 64)[:, None]
    recipe = Recipe("r", layers=(LayerSpec(".*", FORMAT),), steps=("gptq",), units=units)
    made = ptq.quantize(nn.Sequential(unit), recipe, [(x[:40], None), (x[40:], None)])[0]
    fresh = QuantizedLayer(copy.deepcopy(unit[2]), None, FORMAT, "mse")

    @torch.no_grad()
    def codes(first, images):
        moments = input_moments(unit[2], unit[1](first(images)))
        return gptq_codes(fresh, made[2].scale, moments)

    found = {"0": codes(unit[0], x), None: codes(made[0], x), "part": codes(unit[0], x[40:])}
    assert torch.equal(made[2].codes, found[units])
    assert not torch.equal(found["0"], found[None]) and not torch.equal(found["0"], found["part"])


def test_a_unit_learns_outputs_in_float_from_inputs_of_the_quantized_network(monkeypatch):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), correlated(64, 6)
    seen, reconstruct = {}, adaround.reconstruct

    def watched(unit, name, *io):
        seen[name] = io
        return reconstruct(unit, name, *io)

    monkeypatch.setattr(adaround, "ITERATIONS", 20)
    monkeypatch.setattr(adaround, "reconstruct", watched)
    recipe = Recipe("r", layers=(LayerSpec(".*", FORMAT),), steps=("adaround",))
    made = ptq.quantize(net, recipe, [(x[:40], None), (x[40:], None)])
    inputs, outputs, _ = seen["1"]
    torch.testing.assert_close(inputs, made[0](x))
    torch.testing.assert_close(outputs, net(x))


def test_the_regularisation_begins_late_flat_and_ends_steep(monkeypatch):
    monkeypatch.setattr(adaround, "ITERATIONS", 100)
    found = [adaround.exponent(step) for step in range(100)]
    assert not any(found[:20]) and found[20] == 20 and found[60] == pytest.approx(11)
    assert found[20:] == sorted(found[20:], reverse=True) and 2 < found[99] < 2.01


def test_what_is_learnt_ends_at_whole_codes(monkeypatch):
    """The regularisation sees to it."""
    made, soft = [], adaround.SoftRounding
    monkeypatch.setattr(adaround, "SoftRounding", lambda *how: made.append(soft(*how)) or made[-1])
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 6)), 0.2 * correlated(64, 8)
    recipe = Recipe("r", layers=(LayerSpec(".*", FORMAT),), steps=("adaround",))
    ptq.quantize(net, recipe, [(x, None)])
    assert ((2 * made[0].h() - 1).abs() > 0.99).all()


def test_a_convolution_of_a_pixel_learns_the_codes_of_a_linear_layer(monkeypatch):
    monkeypatch.setattr(adaround, "ITERATIONS", 300)
    torch.manual_seed(0)
    linear, conv = nn.Linear(8, 6), nn.Conv2d(8, 6, 1)
    conv.weight.data, conv.bias.data = linear.weight.data[..., None, None], linear.bias.data
    x = 0.1 * correlated(64, 8)
    recipe = Recipe("r", layers=(LayerSpec(".*", FORMAT),), steps=("adaround",))
    codes = [
        ptq.quantize(nn.Sequential(layer), recipe, [(images, None)])[0].codes.flatten()
        for layer, images in ((linear, x), (conv, x[..., None, None]))
    ]
    assert torch.equal(*codes)
