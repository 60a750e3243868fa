"""SSDLite's weights with the names of ml-cvnets."""

import pytest
import torch
from test_foreign import cvnets_names, images, randomized, saved

from lab.cli import BadInput
from lab.models.checkpoint import model_from_checkpoint, save_checkpoint
from lab.models.foreign import as_checkpoint, read_weights
from lab.models.ssdlite import SSDLite

NAME = "ssdlite_mobilevit_xxs"


def ssd_cvnets_names(state: dict) -> dict:
    """Our state dict with the names of ml-cvnets, part by part as its code nests them."""
    body = {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
    renamed = {f"encoder.{name}": tensor for name, tensor in cvnets_names(body).items()}
    convs = {"0": "dw_conv", "1": "pw_conv"}
    for name, tensor in state.items():
        match name.split("."):
            case ["extra", i, k, *leaf]:
                stride = (64, 128, 256)[int(i)]
                new = f"extra_layers.os_{stride}.{convs[k]}.block.{'.'.join(leaf)}"
            case ["whole", leaf]:
                new = f"extra_layers.os_-1.1.block.conv.{leaf}"
            case ["projections", h, *leaf]:
                new = f"ssd_heads.{h}.proj_layer.block.{'.'.join(leaf)}"
            case ["heads", "5", leaf]:
                new = f"ssd_heads.5.loc_cls_layer.block.conv.{leaf}"
            case ["heads", h, "1", leaf]:
                new = f"ssd_heads.{h}.loc_cls_layer.pw_conv.block.conv.{leaf}"
            case ["heads", h, "0", *leaf]:
                new = f"ssd_heads.{h}.loc_cls_layer.dw_conv.block.{'.'.join(leaf)}"
            case _:
                continue
        renamed[new] = tensor
    return renamed


def test_equals_the_network_whose_weights_had_cvnets_names(tmp_path):
    ours = randomized(SSDLite("xxs", 7, heads=4))
    path = saved(tmp_path / "w.pt", ssd_cvnets_names(ours.state_dict()))
    network, layout = read_weights(path, NAME)
    assert (layout.name, network.num_classes) == ("ml-cvnets", 7)
    save_checkpoint(tmp_path / "best.pth", as_checkpoint(network, NAME, layout))
    again, checkpoint = model_from_checkpoint(tmp_path / "best.pth")
    assert (checkpoint["task"], len(checkpoint["classes"])) == ("detection", 7)
    with torch.inference_mode():
        expected = ours.double()(images().flip(1))
        torch.testing.assert_close(again.double()(images()), expected, rtol=0, atol=1e-6)


def test_weights_of_another_variant_are_named(tmp_path):
    path = saved(tmp_path / "w.pt", ssd_cvnets_names(SSDLite("xs", 7, heads=4).state_dict()))
    with pytest.raises(BadInput, match="these are weights of ssdlite_mobilevit_xs, not of"):
        read_weights(path, NAME)
