"""Costs of widths for outputs of pixels and of tokens."""

import math

import pytest
import torch
import torch.nn.functional as F
from small import draw
from torch import nn

import ptq
from ptq.analysis.costs import sampled_loss
from ptq.analysis.mixed import layer_costs


def test_a_label_is_drawn_for_each_pixel():
    kinds, generator = draw(2, 5, 4, 3).argmax(-1), torch.Generator()
    certain = 50 * F.one_hot(kinds, 3).movedim(-1, 1).float()  # [B, K, H, W]
    assert sampled_loss(certain, generator).item() == pytest.approx(0, abs=1e-3)
    alike = sampled_loss(0 * certain, generator)
    assert alike.item() == pytest.approx(2 * 5 * 4 * math.log(3), rel=1e-5)


def test_the_nuclear_norm_of_a_sequence_is_that_of_a_matrix():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Flatten(), nn.Linear(35, 4)).eval(), draw(9, 7, 6)
    found = layer_costs(model, [(x, None)], "nuclear", "w4a8-nearest")
    made = ptq.quantize(model, ptq.recipe("w4-nearest", model))
    with torch.no_grad():
        first, off = model[0](x), made[0].layer.weight - model[0].weight
        norms = torch.linalg.matrix_norm(first, "nuc")  # of [7, 5]
        cost = (norms * F.linear(x, off).square().sum((1, 2))).mean()
    assert found["0"][4] == pytest.approx(cost.item(), rel=1e-4)
