"""DeepLabv3 against transformers' network, and through the tracers."""

from functools import partial

import pytest
import torch
from small import require_traced_and_exported
from test_foreign import assert_computes, cvnets_names, randomized, saved, transformers_network

from lab.cli import BadInput
from lab.models import build, settings_of
from lab.models.checkpoint import model_from_checkpoint, save_checkpoint
from lab.models.deeplab import DeepLab
from lab.models.foreign import as_checkpoint, family_of, read_weights
from mobilevit import VARIANTS

NAME = "deeplab_mobilevit_xxs"


@pytest.mark.parametrize(
    "variant, expected", [("xxs", 1_854_853), ("xs", 2_944_069), ("s", 6_357_941)]
)
def test_parameter_count(variant, expected):
    assert sum(p.numel() for p in DeepLab(variant, 21).parameters()) == expected


def test_a_map_is_seen_at_the_rates():
    rates = [b.conv.dilation[0] for b in DeepLab("xxs", rates=(3, 6, 9)).pyramid.branches]
    assert rates == [1, 3, 6, 9]


def test_dropout_is_of_values_in_the_pyramid_and_of_channels_behind_it():
    torch.manual_seed(0)
    model, ones = DeepLab("xxs").train(), torch.ones(1, 4000, 2, 2)
    channels, values = model.dropout(ones)[0], model.pyramid.dropout(ones)[0]
    for y in (channels, values):
        assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert (channels.flatten(1).std(1) == 0).all() and (values.flatten(1).std(1) > 0).any()


def test_fx_and_export_with_any_batch():
    model = randomized(DeepLab("xxs", 3, output_stride=8, rates=(1, 2, 3)))
    example, x = torch.randn(2, 3, 72, 64), torch.randn(3, 3, 72, 64)
    expected = model(x)
    assert expected.shape == (3, 3, 72, 64)
    require_traced_and_exported(model, example, x, expected)


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
        build(NAME, **settings)


def transformers_logits(theirs, x):
    """Of transformers' network, which leaves it to its loss to resize them to the image."""
    return torch.nn.functional.interpolate(theirs(x).logits, x.shape[2:], mode="bilinear")


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers_which_takes_blue_green_red(tmp_path, variant):
    theirs = transformers_network(variant, "SemanticSegmentation", output_stride=16)
    path = saved(tmp_path / "model.safetensors", theirs.state_dict())
    network, layout = read_weights(path, f"deeplab_mobilevit_{variant}")
    assert (layout.name, network.classifier.out_channels) == ("transformers", 7)
    theirs.double()
    assert_computes(network, partial(transformers_logits, theirs), bgr=True)


def deeplab_cvnets_names(state: dict, v01: bool) -> dict:
    """Our state dict with the names of ml-cvnets, whose classifier v0.1 nests once more."""
    body = {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
    renamed = {f"encoder.{name}": tensor for name, tensor in cvnets_names(body).items()}
    for name, tensor in state.items():
        pyramid = "seg_head.aspp.aspp_layer."
        match name.split("."):
            case ["pyramid", "branches", k, *leaf]:
                renamed[f"{pyramid}convs.{k}.block.{'.'.join(leaf)}"] = tensor
            case ["pyramid", "pool", *leaf]:
                renamed[f"{pyramid}convs.4.aspp_pool.conv_1x1.block.{'.'.join(leaf)}"] = tensor
            case ["pyramid", "project", *leaf]:
                renamed[f"{pyramid}project.block.{'.'.join(leaf)}"] = tensor
            case ["classifier", leaf]:
                nested = "classifier.classifier" if v01 else "classifier"
                renamed[f"seg_head.{nested}.block.conv.{leaf}"] = tensor
    return renamed


@pytest.mark.parametrize("v01", [True, False])
def test_equals_the_network_whose_weights_had_cvnets_names(tmp_path, v01):
    ours = randomized(DeepLab("xxs", 7, heads=4))
    path = saved(tmp_path / "w.pt", deeplab_cvnets_names(ours.state_dict(), v01))
    network, layout = read_weights(path, NAME)
    assert layout.name == "ml-cvnets"
    assert_computes(network, ours, bgr=True)


def test_as_checkpoint_gives_one_that_can_be_read_again(tmp_path):
    ours = randomized(DeepLab("xxs", 7))
    network, layout = read_weights(saved(tmp_path / "w.pth", ours.state_dict()), NAME)
    assert layout == family_of(NAME).layouts[0]
    save_checkpoint(tmp_path / "best.pth", as_checkpoint(network, NAME, layout))
    again, checkpoint = model_from_checkpoint(tmp_path / "best.pth")
    assert checkpoint["task"] == "segmentation"
    assert_computes(again, ours)


def test_a_classifier_is_no_segmentation_network(tmp_path):
    path = saved(tmp_path / "w.pth", transformers_network("xxs").state_dict())
    with pytest.raises(BadInput, match="transformers.* lacks pyramid.branches|no classifier"):
        read_weights(path, NAME)
