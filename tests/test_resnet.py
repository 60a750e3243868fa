"""ResNet-18 with the CIFAR stem, against torchvision's network and its sizes as published."""

import pytest
import torch
import torchvision
from test_foreign import randomized, saved

from lab.cli import BadInput
from lab.models import build, default_img_size, settings_of
from lab.models.checkpoint import model_from_checkpoint, save_checkpoint
from lab.models.foreign import as_checkpoint, read_weights

N = 7  # classes


def test_has_the_published_parameters_and_the_shapes_of_its_stages():
    network = build("resnet18").eval()
    assert sum(p.numel() for p in network.parameters()) == 11_173_962
    assert settings_of(network) == {"num_classes": 10} and default_img_size("resnet18") == 32
    sizes = {}
    for name in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        network.get_submodule(name).register_forward_hook(
            lambda _, x, y, name=name: sizes.update({name: tuple(y.shape[1:])})
        )
    with torch.inference_mode():
        assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == {
        **dict.fromkeys(("conv1", "maxpool", "layer1"), (64, 32, 32)),
        "layer2": (128, 16, 16),
        "layer3": (256, 8, 8),
        "layer4": (512, 4, 4),
    }


def test_behind_the_stem_it_computes_what_torchvisions_does():
    ours, theirs = (
        randomized(build("resnet18", num_classes=N)),
        torchvision.models.resnet18(num_classes=N),
    )
    body = {n: t for n, t in ours.state_dict().items() if not n.startswith("conv1.")}
    theirs.load_state_dict(body, strict=False)
    stem = torch.rand(2, 64, 8, 8)
    outputs = []
    for network in (ours, theirs.eval()):
        network.conv1, network.maxpool = torch.nn.Identity(), torch.nn.Identity()
        with torch.inference_mode():
            outputs.append(network(stem))
    torch.testing.assert_close(*outputs)


def test_weights_are_read_and_other_stems_refused(tmp_path):
    ours = randomized(build("resnet18", num_classes=N))
    path = saved(tmp_path / "w.pth", ours.state_dict())
    network, layout = read_weights(path, "resnet18")
    save_checkpoint(tmp_path / "best.pth", as_checkpoint(network, "resnet18", layout))
    again, checkpoint = model_from_checkpoint(tmp_path / "best.pth")
    assert (checkpoint["img_size"], checkpoint["settings"]) == (32, {"num_classes": N})
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(again(x), ours(x))
    imagenet = saved(tmp_path / "i.pth", torchvision.models.resnet18().state_dict())
    with pytest.raises(BadInput, match=r"conv1.weight as \[64, 3, 7, 7\] instead of"):
        read_weights(imagenet, "resnet18")
    with pytest.raises(BadInput, match="--heads is for MobileViT, not for resnet18"):
        read_weights(path, "resnet18", heads=2)
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        build("resnet18", num_classes=0)
