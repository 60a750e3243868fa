"""The published FP16 and INT4 against hand-computed values, numpy and a float64 brute force."""

import numpy as np
import pytest
import torch

from lab.cli import BadInput
from lab.engines import published
from lab.engines.published import percentile_levels
from mobilevit import MobileViT
from ptq import RECIPES

FP16, INT4 = RECIPES["fp16"], RECIPES["int4-percentile"]


def test_a_channel_computed_by_hand():
    # 0..100 in steps of 1: percentiles 1 and 99, so 15 steps of 98 / 15 from 1.
    values = percentile_levels(torch.arange(101.0).view(1, 101))[0]
    codes = ((values - 1) / (98 / 15)).round()
    assert codes[[0, 1, 4, 5, 50, 99, 100]].tolist() == [0, 0, 0, 1, 8, 15, 15]
    assert values[50].item() == pytest.approx(1 + 8 * 98 / 15)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (16, 1, 3, 3), (12, 33)])
def test_values_are_the_nearest_levels_in_float64(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = percentile_levels(x)
    for channel, quantized in zip(x.double().numpy(), values.double().numpy()):
        low, high = np.percentile(channel, [1, 99])
        levels = np.linspace(low, high, 16)
        error = np.abs(quantized - channel)
        nearest = np.abs(channel[..., None] - levels).min(-1)
        np.testing.assert_allclose(error, nearest, atol=1e-6)
        assert len(np.unique(quantized.round(6))) <= 16


def test_a_constant_channel_stays_itself():
    x = torch.tensor([[0.25] * 9, [0.0] * 9])
    assert torch.equal(percentile_levels(x), x)


def test_float16_is_numpys():
    model = MobileViT("xxs")
    loaded = published.load(model, FP16, None, None)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            expected = tensor.numpy().astype(np.float16).astype(np.float32)
            assert np.array_equal(loaded.run.state_dict()[name].numpy(), expected)
    assert loaded.size_bytes / 2**20 == pytest.approx(1.93, abs=0.03)  # as published


def test_numbers_too_large_for_float16_are_refused():
    model = MobileViT("xxs")
    model.stages[1][0].expand.norm.running_var[0] = 7e4
    with pytest.raises(BadInput, match="expand.norm.running_var reaches 7e.04, .* of float16"):
        published.load(model, FP16, None, None)


def test_int4_touches_matrices_only_and_leaves_the_model_alone():
    model = MobileViT("xxs")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    after = published.load(model, INT4, None, None).run.state_dict()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (tensor.dim() < 2), name


def test_int4_size_by_the_published_formula():
    model = MobileViT("xxs")
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    other = sum(t.numel() for t in model.state_dict().values()) - sum(p.numel() for p in matrices)
    bits = sum(4 * p.numel() + 36 * len(p) for p in matrices) + 32 * other
    loaded = published.load(model, INT4, None, None)
    assert loaded.size_bytes == (bits + 7) // 8 and loaded.size_is_estimate
    assert loaded.size_bytes / 2**20 == pytest.approx(0.55, abs=0.005)  # as published
