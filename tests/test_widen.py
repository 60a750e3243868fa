import pytest
import torch
import torch.nn.functional as F
from conftest import run
from torch import nn

import train
from lab import files
from lab.cli import BadInput
from lab.models import settings_of
from lab.models.checkpoint import save_checkpoint
from lab.models.widen import CARRIED, widen
from lab.training.start import fresh_model, load_start
from mobilevit import MobileViT


def trained(variant: str, heads=None) -> MobileViT:
    """A network whose norms are not those of a fresh one, and whose logits depend on the image."""
    torch.manual_seed(1)
    model = MobileViT(variant, heads=heads)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = 1  # one batch gives the statistics
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model.train()(torch.rand(8, 3, 64, 96))
    model.eval()
    assert logits(model).std(0).mean() > 0.1
    return model.float()


def widened(narrow: MobileViT, variant: str, heads=None) -> MobileViT:
    torch.manual_seed(2)
    wide = MobileViT(variant, heads=heads).eval()
    widen(narrow, wide)
    return wide


def logits(model):
    torch.manual_seed(3)
    with torch.inference_mode():
        return model.double()(torch.rand(2, 3, 64, 96, dtype=torch.float64))


def test_the_wide_network_is_the_same_function():
    narrow = trained("xs")
    wide = widened(narrow, "s")
    # What is left is the epsilon of layer norms over more channels.
    torch.testing.assert_close(logits(wide), logits(narrow), rtol=0, atol=1e-3)


def test_split_heads_attend_as_the_whole_one():
    narrow = trained("xs", heads=1)
    for layer in (*narrow.stages[3][1].layers, *narrow.stages[4][1].layers):
        layer.attn.qkv.weight.data[80 : layer.attn.dim] = 0  # queries of a rank that
        layer.attn.qkv.bias.data[80 : layer.attn.dim] = 0  # heads of 80 channels can hold
    wide = widened(narrow, "s", heads=(1, 2, 3))
    torch.testing.assert_close(logits(wide), logits(narrow), rtol=0, atol=1e-3)


def test_the_residual_that_only_xxs_has_is_carried(monkeypatch):
    def difference() -> float:
        narrow = trained("xxs", heads=1)
        return (logits(widened(narrow, "xs", heads=1)) - logits(narrow)).abs().max().item()

    carried = difference()
    monkeypatch.setattr("lab.models.widen.CARRIED", 0.01)
    assert difference() < 2e-3
    monkeypatch.setattr("lab.models.widen._carry_input", lambda *args: None)
    assert carried < 0.7 * difference()


def test_norms_on_the_way_of_the_residual_have_the_statistics_of_normal_values():
    narrow = trained("xxs", heads=1)
    first, norm = widened(narrow, "xs", heads=1).stages[0][0], narrow.stem.norm
    with torch.no_grad():
        x = F.silu(norm.bias + norm.weight * torch.randn(50_000, 16))  # what the block takes in
    for sign, new in ((1, slice(32, 48)), (-1, slice(48, 64))):
        carried = sign * CARRIED * x
        for part, y in ((first.expand.norm, carried), (first.depthwise.norm, F.silu(carried))):
            mean, var = part.running_mean[new], part.running_var[new]
            torch.testing.assert_close(mean, y.mean(0), atol=0.01, rtol=0.05)
            torch.testing.assert_close(var, y.var(0), atol=0.002, rtol=0.1)


def test_all_new_weights_learn():
    wide = widened(trained("xs"), "s").train()
    optimizer = torch.optim.SGD(wide.parameters(), 0.1)
    torch.manual_seed(3)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(wide(torch.rand(4, 3, 64, 64)), torch.arange(4)).backward()
        optimizer.step()
    for name, parameter in wide.named_parameters():
        if parameter.ndim > 1:
            assert parameter.grad.flatten(1).any(1).all(), name


def test_a_wider_network_and_other_heads_are_refused():
    with pytest.raises(ValueError, match="s is wider than xs"):
        widen(MobileViT("s"), MobileViT("xs"))
    with pytest.raises(ValueError, match="heads"):
        widen(MobileViT("xs"), MobileViT("s", heads=1))
    with pytest.raises(ValueError, match=r"patches as usual, not \[4, 4, 4\]"):
        widen(MobileViT("xxs"), MobileViT("xs", patches=4))
    with pytest.raises(ValueError, match="output_stride 8, not as usual"):
        widen(MobileViT("xxs", output_stride=8), MobileViT("xs"))


def start_from(path, name="mobilevit_xs", val_size=200):
    """What train.py does with --widen PATH."""
    model = fresh_model(name, 10, heads=None, seed=0, sides=[])
    load_start(model, name, widened=path, task="synthetic", val_size=val_size)


def test_training_starts_from_a_narrower_checkpoint(checkpoint, tmp_path):
    short = ("--task", "synthetic", "--resolutions", "32:0.05", "--warmup-epochs", "0")
    out, _ = run("train.py", *short, "--model", "xs", "--widen", checkpoint, "--output", tmp_path)
    assert out.startswith("epoch 1") and "mobilevit_xs-synthetic: epoch 1 chosen" in out
    assert files.read_json(tmp_path / "config.json")["widen"] == str(checkpoint)
    with pytest.raises(BadInput, match=f"{tmp_path}/best.pth: xs is wider than xxs"):
        start_from(tmp_path / "best.pth", "mobilevit_xxs")


def test_images_that_a_narrower_checkpoint_was_trained_on_are_not_held_out(checkpoint):
    start_from(checkpoint)
    with pytest.raises(BadInput, match="use its --val-size 200"):
        start_from(checkpoint, val_size=300)


def test_a_network_of_other_classes_is_refused(tmp_path):
    model = MobileViT("xxs", num_classes=3)
    checkpoint = {"format": 2, "model": "mobilevit_xxs", "settings": settings_of(model)}
    checkpoint |= {"task": "cifar10", "classes": list("abc"), "img_size": 32, "config": {}}
    checkpoint |= {"state_dict": model.state_dict()}
    checkpoint |= {"test_accuracy_pct": None, "val_accuracy_pct": None, "epoch": 1}
    save_checkpoint(tmp_path / "three.pth", checkpoint)
    with pytest.raises(BadInput, match="3 classes, not 10"):
        start_from(tmp_path / "three.pth")


def test_a_run_has_one_start(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--init", "a.pth", "--widen", "b.pth"])
    with pytest.raises(SystemExit) as stopped:
        train.parse_args(train.__doc__)
    assert stopped.value.code == 2
    assert "--widen: not allowed with argument --init" in capsys.readouterr().err
