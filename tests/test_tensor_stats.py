"""What a profile says of single tensors and blocks, against plain sums over whole tensors."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from small import draw
from test_profile import of, profiled, seen_at, stats_of
from torch import nn

import ptq
from ptq.analysis.profile import profile
from ptq.analysis.sensitivity import noises, set_tensor
from ptq.analysis.tensors import TensorStats
from ptq.formats import PowerOfTwo, Uniform


def test_histograms_and_outliers_are_those_of_either_copy():
    x, format = draw(3000) ** 3, Uniform(4, symmetric=False)
    grid = torch.tensor([0.53]), torch.tensor([7], dtype=torch.int32)
    found, y = stats_of(x, format, *grid), format.nearest(x, *grid)  # cut off at either end
    assert found["range"] == pytest.approx([-7 * 0.53, 8 * 0.53])
    assert (found["scale"], found["zero_point"]) == (pytest.approx([0.53] * 2), [7, 7])
    shown = found["histogram"]
    assert (shown["low"], shown["high"]) == (x.min(), x.max())
    sigma = x.std(correction=0)
    kinds = {"float": (x, "outliers"), "quantized": (y, "outliers_quantized")}
    for kind, (values, outliers) in kinds.items():
        expected, _ = np.histogram(values, 64, (shown["low"], shown["high"]))
        off = np.cumsum(expected) - np.cumsum(shown[kind])
        assert np.abs(off).max() <= 30  # a hundredth: what shares a bin of the finer one
        far = ((values - x.mean()).abs() > 3 * sigma).double().mean().item()
        assert found[outliers] == pytest.approx(far, abs=1e-3)
    assert found["outliers"] > 0.01 > found["outliers_quantized"]


def test_codes_of_many_bits_are_counted_by_neighbours():
    x, scale = draw(3000).abs(), torch.tensor([0.01])
    found = stats_of(x, Uniform(10), scale, torch.zeros(1, dtype=torch.int32))
    codes = (x / 0.01).round().long().clamp(max=511) + 512
    assert found["codes"] == (codes // 4).bincount(minlength=256).tolist()
    assert (found["n_codes"], found["first_code"]) == (1024, -512)


def test_scales_of_a_power_of_two_format_are_doubled():
    grid = torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32), torch.tensor([0, 1, 3])
    x, stats = 40 * draw(50, 3), TensorStats(PowerOfTwo(8), grid, -1)
    stats.add(x)
    found = stats.as_dict()
    assert found["scale"] == pytest.approx([0.1, 0.8]) and found["n_scales"] == 3
    assert found["range"] == pytest.approx([-3 * 0.8, 252 * 0.8])
    steps = torch.tensor([0.1, 0.2, 0.8])
    assert found["clipped_low"] == pytest.approx(((x / steps).round() < -3).double().mean().item())
    mse = (x - PowerOfTwo(8).nearest(x, *grid)).square().mean().item()
    assert found["mse_over_rounding"] == pytest.approx(mse / (steps**2).mean().item() * 12)


def test_sums_of_rows_are_those_of_all_batches():
    stats = TensorStats(Uniform(8, symmetric=False), (torch.ones(1), torch.zeros(1)), 1)
    rows = [1 + 0.1 * draw(2, 3, 5, 4, seed=i) for i in range(3)]
    for y in rows:
        stats.add_quantized(torch.ones_like(y), y, is_softmax=True)
    sums = torch.cat(rows).sum(-1)
    found = {"mean": sums.mean().item(), "min": sums.min().item(), "max": sums.max().item()}
    stats.add(rows[0])
    assert stats.as_dict()["row_sums"] == pytest.approx(found)


def decibels(x, y):
    return 10 * math.log10(x.square().sum() / (x - y).square().sum())


@pytest.fixture(scope="module")
def made(network, images):
    return profiled(network, "w8a8", images)


def test_a_block_is_compared_alone_and_in_the_network(network, images, made):
    quantized, found = made
    blocks = {block["name"]: block for block in found["blocks"]}
    for name in ("body.1", "classifier"):
        x, y = seen_at(network, name, images)
        with torch.no_grad():
            alone = quantized.get_submodule(name)(x)
        block, (_, in_network) = blocks[name], seen_at(quantized, name, images)
        assert block["local_db"] == pytest.approx(decibels(y, alone), abs=0.05)
        assert block["cumulative_db"] == pytest.approx(decibels(y, in_network), abs=0.05)
        assert block["local_db"] > block["cumulative_db"] + 0.1


def test_the_worst_channel_of_a_softmax_is_a_head(network, images, made):
    quantized, found = made
    core = "body.2.layers.0.attn.core"
    calls, module = [], network.get_submodule(core)
    handle = module.register_forward_hook(lambda _, args, out: calls.append(args))
    with torch.no_grad():
        network(torch.cat([x for x, _ in images]))
    handle.remove()
    ((q, k, _),) = calls
    softmax = (q @ k.mT / 8**0.5).softmax(-1)  # [B * P, h, N, N]
    with torch.no_grad():
        rounded = quantized.get_submodule(core).inputs["attention"](softmax)
    heads = [decibels(softmax[:, h], rounded[:, h]) for h in range(2)]
    local = of(found, core, "attention")["local"]
    assert local["worst_channel_db"] == pytest.approx(min(heads), abs=1e-3)
    assert local["qsnr_db"] == pytest.approx(decibels(softmax, rounded), abs=1e-3)


@pytest.mark.parametrize(
    "path, axis", [("body.1.project.conv", 1), ("body.2.layers.0.attn.qkv", -1)]
)
def test_the_worst_channel_of_an_input_is_one_along_its_axis(network, images, made, path, axis):
    x, _ = seen_at(network, path, images)
    with torch.no_grad():
        rounded = made[0].get_submodule(path).input(x)
    channels = [decibels(*pair) for pair in zip(x.unbind(axis), rounded.unbind(axis))]
    found = of(made[1], path, "input")["local"]["worst_channel_db"]
    assert found == pytest.approx(min(channels), abs=1e-3)


def test_noise_of_all_tensors_is_that_of_all_at_once():
    a, b, x = torch.ones(1), torch.ones(1), draw(20)
    alone = {"a": partial(set_tensor, a, a + 1), "b": partial(set_tensor, b, b - 1)}
    found = noises(None, lambda _: x * (a + b), {"weights": alone})
    one = (x.square().mean() / (2 * x).var()).item()
    assert found["noise"]["weights"] == pytest.approx({"a": one, "b": one})
    assert found["noise_of_all"] == found["noise_of_rest"] == 0  # one makes up for the other


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)

    def forward(self, x):
        return self.linear(x) + self.linear(2 * x)


def test_the_fisher_score_of_a_layer_that_runs_twice_is_the_mean_of_both_calls():
    """Of two classes as likely, the gradient of the logits is a half up and a half down."""
    model, batches = Twice(), [(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), None)]
    model.linear.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0 + 1e-5]])
    recipe = ptq.recipe("w8a8-nearest", model)
    found = profile(model, ptq.quantize(model, recipe, batches), recipe, batches)
    assert of(found, "linear", "input")["fisher"] == pytest.approx(0.25, rel=1e-3)
