"""DeepLabv3 against transformers' network, and through the tracers."""

import pytest
import torch
from test_foreign import images, randomized
from torch import nn

from lab.models import build, settings_of
from lab.models.deeplab import DeepLab
from mobilevit import VARIANTS


@pytest.mark.parametrize(
    "variant, expected", [("xxs", 1_854_853), ("xs", 2_944_069), ("s", 6_357_941)]
)
def test_parameter_count(variant, expected):
    assert sum(p.numel() for p in DeepLab(variant, 21).parameters()) == expected


def test_a_map_is_seen_at_the_rates():
    rates = [b.conv.dilation[0] for b in DeepLab("xxs", rates=(3, 6, 9)).pyramid.branches]
    assert rates == [1, 3, 6, 9]


def test_fx_and_export_with_any_batch():
    model = randomized(DeepLab("xxs", 3, output_stride=8, rates=(1, 2, 3)))
    example, x = torch.randn(2, 3, 72, 64), torch.randn(3, 3, 72, 64)
    expected = model(x)
    assert expected.shape == (3, 3, 72, 64)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_build_the_same_network(variant):
    name = f"deeplab_mobilevit_{variant}"
    model = build(name, num_classes=4, heads=1, output_stride=8, rates=(1, 2, 3))
    again = build(name, **settings_of(model))
    assert settings_of(again) == settings_of(model)
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"num_classes": 0}, "num_classes"),
        ({"rates": (1, 2)}, "three"),
        ({"rates": (0, 2, 3)}, "from 1"),
        ({"output_stride": 4}, "output_stride"),
    ],
)
def test_impossible_networks_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        DeepLab("xxs", **settings)
