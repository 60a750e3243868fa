"""Networks without a part of MobileViT, against timm's and closed forms; runs that compare them."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import forked
from test_foreign import randomized
from torch import nn

from lab.bench import __main__ as bench
from lab.bench import ablations
from lab.cli import BadInput
from lab.files import write_json
from lab.models import build, settings_of
from lab.models.ablations import ABLATED, MV2Only, TransformerOnly, Unfused
from lab.models.checkpoint import load_checkpoint, read_tensors
from lab.report.ablations import ablations_table, difference
from lab.report.benchmarks import load_benchmarks
from mobilevit import MobileViT, MobileViTBlock, from_timm
from ptq.analysis.energy import count


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def macs(network, side):
    layers, _ = count(network.eval(), torch.zeros(1, 3, side, side))
    return sum(layer.macs for layer in layers.values())


@pytest.mark.parametrize("variant, side", [("xxs", 64), ("xxs", 128), ("xxs", 256), ("s", 128)])
def test_mv2_blocks_have_the_macs_of_what_they_replace(variant, side):
    network = MV2Only(variant, side=side)
    assert macs(network, side) == pytest.approx(macs(MobileViT(variant), side), rel=1e-3)
    assert not any(isinstance(module, nn.Linear) for module in network.stages.modules())


@pytest.mark.parametrize(
    "name, settings, expected",
    [("mv2", {"side": 128}, 1_000_951), ("transformer", {}, 630_026), ("unfused", {}, 723_450)],
)
def test_parameters_and_settings(name, settings, expected):
    network = build(f"mobilevit_xxs_{name}", num_classes=10, **settings)
    assert sum(p.numel() for p in network.parameters()) == expected
    again = build(f"mobilevit_xxs_{name}", **settings_of(network))
    assert settings_of(again) == settings_of(network)
    again.load_state_dict(network.state_dict())


@pytest.mark.parametrize("name", ABLATED)
def test_fx_and_sides_that_are_no_whole_patches(name):
    network, x = randomized(ABLATED[name]("xxs")), images(2, 3, 72, 100)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(x), network(x))


def test_without_fusion_equals_timm_without_it():
    theirs = randomized(timm.create_model("mobilevit_xxs", num_classes=10))
    for module in theirs.modules():
        if hasattr(module, "conv_fusion"):
            module.conv_fusion = None  # what timm's no_fusion leaves
    ours = Unfused("xxs", heads=4).eval()
    ours.load_state_dict(from_timm(theirs.state_dict()))
    x = images(2, 3, 96, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


def test_with_patches_of_a_pixel_every_pixel_attends_to_all():
    block = randomized(MobileViTBlock(8, 12, layers=2, heads=2, patch=1))
    x = images(2, 8, 5, 6)
    y = block.to_tokens(block.local(x))
    tokens = block.norm(block.layers(y.flatten(2).mT))  # [B, H*W, d]
    made = block.project(tokens.mT.unflatten(2, (5, 6)))
    torch.testing.assert_close(block(x), block.fuse(torch.cat((x, made), 1)))


def test_transformers_alone_see_no_order_of_patches():
    """Squares of 64 pixels are whole patches of 2x2 pixels on the last map."""
    x = images(1, 3, 128, 128)
    moved = x.roll((64, 64), (2, 3))
    for network, alike in ((TransformerOnly("xxs"), True), (MobileViT("xxs"), False)):
        network = randomized(network).double()
        ours, other = network(x.double()), network(moved.double())
        assert torch.allclose(ours, other, rtol=0, atol=1e-9) is alike
        turned = network(x.double().flip(-1))  # within patches, there is an order
        assert not torch.allclose(ours, turned, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", [0, 31, 10**9])
def test_no_macs_are_equal_at_impossible_sides(side):
    with pytest.raises(ValueError, match="side must be"):
        MV2Only("xxs", side=side)


# The command


class Forked:
    """In place of subprocess.Popen: a script run to its end, without importing it anew."""

    stopped = ()  # runs that exit with 3 in place of starting

    def __init__(self, argv):
        folder = argv[argv.index("--output") + 1]
        stops = Path(folder).name in self.stopped
        self.returncode = 3 if stops else forked(argv[1:], {}).code

    def poll(self):
        return self.returncode

    wait = poll

    def terminate(self):
        pass


def compared(monkeypatch, runs, *options):
    """What the command finds with a few steps of small images."""
    few = ("--task", "synthetic", "--img-size", "64", "--batch-size", "16", "--seeds", "2")
    argv = ["lab.bench", "ablations", *few, "--device", "cpu", "--runs", str(runs), *options]
    monkeypatch.setattr("sys.argv", argv)
    return bench.measured(bench.parse_args())


def test_all_take_the_same_steps_and_finished_runs_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations.subprocess, "Popen", Forked)
    monkeypatch.setattr(Forked, "stopped", ("multi-scale-seed0",))
    options = (tmp_path / "runs", "--variants", "multi-scale", "--epochs")
    with pytest.raises(SystemExit) as stopped:
        compared(monkeypatch, *options, "0.04")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.pth")}
    assert stopped.value.code == 3 and {path.parent.name for path in kept} == {"base-seed0"}
    monkeypatch.setattr(Forked, "stopped", ())
    found = compared(monkeypatch, *options, "0.04")
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert list(found["variants"]) == ["base", "multi-scale"] and found["steps"] == 4
    for name, variant in found["variants"].items():
        folders = [tmp_path / "runs" / f"{name}-seed{seed}" for seed in (0, 1)]
        for folder, accuracy in zip(folders, variant["val_accuracy_pct"], strict=True):
            assert read_tensors(folder / "last.pth")["step"] == 4
            best = load_checkpoint(folder / "best.pth")
            assert best["val_accuracy_pct"] == accuracy and best["config"]["val_size"] == 400
            assert best["config"]["multi_scale"] is (True if name == "multi-scale" else None)
    with pytest.raises(BadInput, match="base-seed0 has a run with --epochs"):
        compared(monkeypatch, *options, "0.05")
    for path in tmp_path.rglob("*.pth"):  # as where only the small files of a run were copied
        path.unlink()
    monkeypatch.setattr(ablations.subprocess, "Popen", None)  # nothing is to be run
    assert compared(monkeypatch, *options, "0.04") == found
    write_json(tmp_path / "benchmarks" / "ablations.json", found)
    assert ablations_table(load_benchmarks(tmp_path, [])["ablations"]) in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, says",
    [
        (("--variants", "patch-4"), "128 must divide it"),
        (("--variants", "mv2", "--img-size", "96"), "64 must divide it"),
        (("--variants", "mv2", "--batch-size", "2000"), "too large"),
    ],
)
def test_what_can_not_be_compared_is_refused(options, says, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=says):
        compared(monkeypatch, tmp_path / "runs", *options)
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_ends_the_others():
    sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
    fails = [sys.executable, "-c", "import sys; sys.exit(3)"]
    with pytest.raises(SystemExit) as end:
        ablations.run_all([fails, sleeps, sleeps], jobs=2)
    assert end.value.code == 3
    with pytest.raises(SystemExit) as end:  # also of one that began later
        ablations.run_all([sleeps, fails], jobs=2)
    assert end.value.code == 3
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    with pytest.raises(BadInput, match="SIGKILL"):
        ablations.run_all([killed, sleeps], jobs=2)


@pytest.mark.parametrize(
    "found, says",
    [
        ([81.0, 82.0, 83.0], "+2.00"),
        ([77.0, 78.0], "-2.50"),
        ([80.5, 85.0], "none"),
        ([75.0, 79.5], "none"),
        ([70.0, 90.0], "none"),
        ([80.0, 80.0], "none"),
    ],
)
def test_a_difference_within_the_spread_is_none(found, says):
    assert difference(found, [79.5, 80.0, 80.5]) == says
