"""The multi-scale sampler: sides, batches of equal cost, the same for any number of processes."""

import csv

import pytest
import torch
from conftest import SYNTHETIC, fails_with_one_line, run

import train
from lab.cli import BadInput
from lab.models.checkpoint import read_tensors
from lab.tasks import synthetic
from lab.tasks.augment import Augmentation
from lab.tasks.batches import TrainBatches
from lab.tasks.classification import batch
from lab.tasks.sampler import Sampler
from lab.training.distributed import World
from lab.training.schedule import Stage

STAGE = Stage(256, 256, 10)
N = 2000


def test_the_papers_sides_and_batches_of_equal_cost():
    sampler = Sampler(50_000, 128, seed=0, multi_scale=True)
    sides = [STAGE.scaled(scale).side for scale in sampler.scales]
    assert sides == [160, 192, 256, 288, 320]
    for side, size in zip(sides, sampler.sizes):
        full = 256**2 * 128 / side**2  # the paper's batch, before it is rounded
        assert size % 8 == 0 and full - 8 < size <= full


def test_an_epoch_has_every_scale_equally_often_and_no_image_twice():
    sampler = Sampler(N, 32, seed=3, multi_scale=True)
    per_epoch, orders = sampler.steps_per_epoch, []
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        scales = [sampler.scale(step) for step in steps]
        assert {scales.count(scale) for scale in sampler.scales} == {sampler.rounds}
        orders.append(scales)
        places = [sampler.place(step) for step in steps]
        assert {e for e, _, _ in places} == {epoch} and places[0][1] == 0
        assert all(end == first for (_, _, end), (_, first, _) in zip(places, places[1:]))
        assert N - sum(sampler.sizes) < places[-1][2] <= N
        for step, scale, (_, first, end) in zip(steps, scales, places):
            assert end - first == sampler.sizes[sampler.scales.index(scale)]
            assert sampler.seen(step) == epoch * places[-1][2] + first
    assert orders[0] != orders[1]
    other = Sampler(N, 32, seed=4, multi_scale=True)
    assert orders[0] != [other.scale(step) for step in range(per_epoch)]


def test_one_scale_gives_plain_batches():
    sampler = Sampler(105, 20, seed=0)
    assert (sampler.steps_per_epoch, sampler.scale(7)) == (5, 1)
    assert sampler.place(7) == (1, 40, 60) and sampler.seen(7) == 140


def test_a_trial_warms_up_until_each_scale_has_come(monkeypatch, tmp_path):
    """Each side is compiled anew, and that is no time of a step."""
    sampler = Sampler(1800, 16, seed=0, multi_scale=True)
    warm = sampler.steps_to_all_scales
    counts = [len({sampler.scale(step) for step in range(n)}) for n in (warm - 1, warm)]
    assert counts == [4, 5] and Sampler(105, 20, seed=0).steps_to_all_scales == 1

    def stop(act, world, budget_s, uncounted):
        raise BadInput(f"{uncounted} steps")

    monkeypatch.setattr("lab.training.budget.seconds_each", stop)
    command = "train.py --task synthetic --img-size 64 --batch-size 16 --multi-scale --minutes 1"
    monkeypatch.setattr("sys.argv", [*command.split(), "--output", str(tmp_path)])
    with pytest.raises(BadInput, match=f"^{warm} steps"):
        train.train(train.parse_args(train.__doc__), World("cpu"))


def test_processes_share_the_batch_that_one_would_see():
    images = synthetic.load(None, True)
    stages = [Stage(64, 64, 1)] * 2
    how = (batch, images, 32, 1, Augmentation("crop-flip"))
    for step in (0, 1, 2, 50):
        whole, labels = TrainBatches(*how, stages=stages, multi_scale=True)[step]
        for rank in range(4):
            part = TrainBatches(*how, rank, 4, stages, multi_scale=True)
            x, y = part[step]
            assert torch.equal(x, whole[rank::4]) and torch.equal(y, labels[rank::4])
    sizes = {len(part[step][0]) for step in range(5)}
    assert len(sizes) > 1
    with pytest.raises(BadInput, match="does not divide by 3"):
        TrainBatches(*how, 0, 3, stages, multi_scale=True)
    with pytest.raises(BadInput, match="are more than 100"):
        TrainBatches(batch, images[:100], 32, 0, how[4], multi_scale=True)


def state_and_log(folder):
    with open(folder / "log.csv") as file:
        log = [
            {k: row[k] for k in ("epoch", "img_size", "train_loss")} for row in csv.DictReader(file)
        ]
    return read_tensors(folder / "last.pth"), log


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = ("train.py", *SYNTHETIC, "--img-size", "64", "--epochs", "1", "--multi-scale")
    run(*command, "--output", whole)
    run(*command, "--output", broken, "--max-minutes", "0.02", code=3)
    run(*command, "--output", broken, "--resume")
    (state, log), (broken_state, broken_log) = state_and_log(whole), state_and_log(broken)
    assert log == broken_log and log[0]["img_size"] == "64"
    assert state["step"] == broken_state["step"] == 25  # 5 rounds of 328 of 1800 images
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, broken_state["model"][name]), name


@pytest.mark.parametrize(
    "options, says",
    [
        (["--img-size", "100"], "sides that 8 divides"),
        (["--img-size", "48"], "at least 56 pixels"),
        (["--img-size", "64", "--batch-size", "8"], "at least 16 images"),
    ],
)
def test_sides_and_batches_that_do_not_scale_are_one_line(options, says):
    fails_with_one_line("train.py", *SYNTHETIC, "--multi-scale", *options, says=says)


def test_the_memory_of_every_batch_is_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "require_memory", lambda model, n, side, _: asked.append((n, side)))
    monkeypatch.setattr(train, "loop", lambda *_: 3)
    flags = ("--multi-scale", "--img-size", "96", "--batch-size", "16", "--output", str(tmp_path))
    args = train.parse_args("", ["--task", "synthetic", "--device", "cpu", *flags])
    assert train.train(args, World("cpu")) == 3
    assert sorted(asked) == [(8, 108), (8, 120), (16, 96), (24, 72), (40, 60)]
