"""Number formats against hand-computed values, numpy and a float64 brute force."""

import numpy as np
import pytest
import torch

import ptq
from mobilevit import MobileViT
from ptq import RECIPES
from ptq.formats import Float16, PercentileUniform
from ptq.packing import estimated_size_bytes
from ptq.recipe import Recipe, Rule


def test_a_channel_computed_by_hand():
    # 0..100 in steps of 1: percentiles 1 and 99, so 15 steps of 98 / 15 from 1.
    x = torch.arange(101.0).view(1, 101)
    codes, scale, offset = PercentileUniform().encode(x)
    assert scale.item() == pytest.approx(98 / 15) and offset.item() == pytest.approx(1)
    assert codes[0, [0, 1, 4, 5, 50, 99, 100]].tolist() == [0, 0, 0, 1, 8, 15, 15]
    values = PercentileUniform().decode(codes, scale, offset)
    assert values[0, 50].item() == pytest.approx(1 + 8 * 98 / 15)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (16, 1, 3, 3), (12, 33)])
def test_values_are_the_nearest_levels_in_float64(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = PercentileUniform().decode(*PercentileUniform().encode(x))
    for channel, quantized in zip(x.double().numpy(), values.double().numpy()):
        low, high = np.percentile(channel, [1, 99])
        levels = np.linspace(low, high, 16)
        error = np.abs(quantized - channel)
        nearest = np.abs(channel[..., None] - levels).min(-1)
        np.testing.assert_allclose(error, nearest, atol=1e-6)
        assert len(np.unique(quantized.round(6))) <= 16


def test_a_constant_channel_stays_itself():
    x = torch.tensor([[0.25] * 9, [0.0] * 9])
    assert torch.equal(PercentileUniform().decode(*PercentileUniform().encode(x)), x)


def test_float16_is_numpys():
    x = torch.tensor([1 / 3, 1e-8, 65504.0, -2.5])
    values = Float16().decode(*Float16().encode(x))
    assert values.tolist() == x.numpy().astype(np.float16).astype(np.float32).tolist()


def test_int4_touches_matrices_only_and_leaves_the_model_alone():
    model = MobileViT("xxs")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    after = ptq.quantize(model, RECIPES["int4-percentile"]).state_dict()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (tensor.dim() < 2), name


def test_int4_size_by_the_published_formula():
    model = MobileViT("xxs")
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    other = sum(t.numel() for t in model.state_dict().values()) - sum(p.numel() for p in matrices)
    bits = sum(4 * p.numel() + 36 * len(p) for p in matrices) + 32 * other
    size = estimated_size_bytes(model, RECIPES["int4-percentile"])
    assert size == (bits + 7) // 8
    assert size / 2**20 == pytest.approx(0.55, abs=0.005)  # as published


def test_a_recipe_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="no tensor of the network is left that matches weigth"):
        ptq.quantize(MobileViT("xxs"), Recipe("typo", rules=(Rule("weigth", Float16()),)))


def test_a_recipe_is_plain_data():
    recipe = RECIPES["int4-percentile"].asdict()
    assert recipe["rules"][0]["format"] == {
        "type": "PercentileUniform",
        "bits": 4,
        "low_pct": 1.0,
        "high_pct": 99.0,
    }
