"""Learning from another network's answers."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SYNTHETIC, fails_with_one_line, run

from lab import files
from lab.cli import BadInput
from lab.models.checkpoint import load_checkpoint, save_checkpoint
from lab.tasks import TASKS
from lab.tasks.cifar10 import CLASSES
from lab.training.schedule import Stage
from lab.training.teacher import Teacher


def teacher(path, weight=0.3, temperature=2.0, task="synthetic", val_size=200):
    device = torch.device("cpu")
    return Teacher(path, task, CLASSES, val_size, weight, temperature, device, "fp32")


def test_the_loss_is_the_formula_in_float64(checkpoint):
    torch.manual_seed(0)
    logits, taught = 3 * torch.randn(2, 8, 10).double()
    labels = torch.arange(8)
    ours = teacher(checkpoint).loss(logits, taught, F.cross_entropy(logits, labels))
    student, target = (logits / 2).softmax(1), (taught / 2).softmax(1)
    divergence = (target * (target.log() - student.log())).sum(1).mean()
    of_labels = -logits.softmax(1)[labels, labels].log().mean()
    assert ours.item() == pytest.approx((0.7 * of_labels + 0.3 * 4 * divergence).item(), rel=1e-9)


def test_it_is_shown_the_students_window_at_its_own_scale(checkpoint):
    taught = teacher(checkpoint)  # of images of 32x32
    assert taught.side(Stage(192, 256, 1)) == 24 and taught.side(Stage(256, 256, 1)) == 32
    whole = taught.logits(TASKS["synthetic"].load(None, True).images[:2], Stage(64, 64, 1))
    assert whole.shape == (2, 10) and not whole.requires_grad and not taught.model.training
    taught.require_sides([Stage(256, 256, 1)])
    with pytest.raises(BadInput, match="--teacher in windows of 192: MobileViT takes"):
        taught.require_sides([Stage(192, 256, 1)])


def test_a_student_learns_from_it(checkpoint, tmp_path):
    flags = ("--teacher", checkpoint, "--teacher-weight", "1", "--temperature", "4")
    run("train.py", *SYNTHETIC, *flags, "--output", tmp_path)
    config = files.read_json(tmp_path / "config.json")
    assert (config["teacher_weight"], config["temperature"]) == (1, 4)
    assert config["sha256"] == {"teacher": files.sha256(checkpoint)}
    assert files.read_json(tmp_path / "metrics.json")["sha256"] == config["sha256"]
    best, alone = load_checkpoint(tmp_path / "best.pth"), load_checkpoint(checkpoint)
    name = "classifier.weight"
    assert not torch.equal(best["state_dict"][name], alone["state_dict"][name])


def test_a_teacher_that_has_seen_what_the_run_holds_out_is_refused(checkpoint, tmp_path):
    with pytest.raises(BadInput, match="was trained on images that this run holds out"):
        teacher(checkpoint, val_size=300)
    other = load_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "other.pth", other | {"task": "cifar10"})
    with pytest.raises(BadInput, match="was trained on cifar10"):
        teacher(tmp_path / "other.pth")
    command = ("train.py", *SYNTHETIC, "--output", tmp_path / "out")
    fails_with_one_line(*command, "--teacher", tmp_path / "absent.pth", says="no checkpoint at")
