"""Checkpoints of wrong content: one line that names file, field, what is there, what should be."""

import copy
import math
import os
import zipfile

import pytest
import torch
from conftest import SYNTHETIC, fails_with_one_line, run
from torch import nn

import train
from lab.cli import BadInput
from lab.models import settings_of
from lab.models.checkpoint import (
    like,
    load_checkpoint,
    load_state,
    model_from_checkpoint,
    read_tensors,
    save_checkpoint,
)
from lab.tasks import classification
from lab.training.distributed import World
from lab.training.evaluation import score_on_test_set
from lab.training.run import log_line
from mobilevit import MobileViT


@pytest.fixture(scope="module")
def good() -> dict:
    torch.manual_seed(0)
    model = MobileViT("xxs")
    return {
        "format": 2,
        "model": "mobilevit_xxs",
        "settings": settings_of(model),
        "task": "synthetic",
        "classes": [f"class {k}" for k in range(10)],
        "img_size": 32,
        "state_dict": model.state_dict(),
        "test_accuracy_pct": None,
        "val_accuracy_pct": 50.0,
        "epoch": 1,
        "config": {"val_size": 200},
    }


def nested(depth: int) -> list:
    value = []
    for _ in range(depth):
        value = [value]
    return value


CLASSIFIER = "classifier.bias"


@pytest.mark.parametrize(
    "path, value, says",
    [
        (("format",), 3, "checkpoint format 3"),
        (("format",), torch.zeros(2), "checkpoint format tensor"),
        (("model",), "resnet", "model is 'resnet', but should be mobilevit_xxs"),
        (("settings",), [1], "settings is list, but should be a mapping"),
        (("settings", "heads"), [1.0, 1.0, 1.0], "heads is .* but should hold whole numbers"),
        (("settings", "heads"), [True, 1, 1], "heads is .* but should hold whole numbers"),
        (("settings", "heads"), [3, 3, 3], "3 heads do not divide"),
        (("settings", "heads"), nested(300), "settings: heads holds a list"),
        (("settings", "num_classes"), 10.0, "num_classes is 10.0, but should be a whole number"),
        (("settings", "num_classes"), 10**12, "num_classes is 1000000000000"),
        (("settings", "depth"), 3, "can't be built"),
        (("settings",), {"num_classes": 10}, "settings are .* but should name all: .*heads"),
        (("classes",), ["a"], "names 1 classes of 10"),
        (("img_size",), None, "img_size is None, but should be a whole number from 32 to 4096"),
        (("img_size",), 10**9, "img_size is 1000000000"),
        (("img_size",), "32", "img_size is '32'"),
        (("config",), None, "config is None, but should be a mapping"),
        (("config", "init"), nested(300), "config: init holds a list"),
        (("config", "lr"), math.nan, "config: lr is nan"),
        (("val_accuracy_pct",), math.inf, "val_accuracy_pct is inf"),
        (("state_dict",), {3: torch.zeros(1)}, "state_dict is 3, but should be text"),
        (("state_dict", CLASSIFIER), "text", "classifier.bias is a str, but should be a tensor"),
        (("state_dict", CLASSIFIER), torch.full((10,), math.nan), "bias has values that are not"),
        (("state_dict", CLASSIFIER), torch.zeros(10, dtype=torch.cfloat), "plain tensor of real"),
        (("state_dict", CLASSIFIER), torch.zeros(10, dtype=torch.int8), "bias as torch.int8"),
        (("state_dict", CLASSIFIER), torch.zeros(10).to_sparse(), "torch.sparse_coo"),
        (("state_dict", CLASSIFIER), torch.zeros(1).expand(10**12), "holds fewer values"),
        (("state_dict", CLASSIFIER), torch.zeros(11), r"bias as \[11\] instead of \[10\]"),
        (("state_dict", "more"), torch.zeros(1), "has more, which the network has not"),
    ],
)
def test_wrong_content_is_named(path, value, says, good, tmp_path):
    bad = copy.deepcopy(good)
    *parents, last = path
    inner = bad
    for name in parents:
        inner = inner[name]
    inner[last] = value
    save_checkpoint(tmp_path / "bad.pth", bad)
    with pytest.raises(BadInput, match=f"bad.pth.*{says}"):
        model_from_checkpoint(tmp_path / "bad.pth")


def test_a_missing_field_is_named(good, tmp_path):
    for name in good.keys() - {"format"}:
        save_checkpoint(tmp_path / "a.pth", {k: v for k, v in good.items() if k != name})
        with pytest.raises(BadInput, match=f"a.pth.* lacks {name}"):
            load_checkpoint(tmp_path / "a.pth")


def test_one_flipped_bit_of_a_weight_is_noticed(good, tmp_path):
    path = tmp_path / "a.pth"
    save_checkpoint(path, good)
    content = bytearray(path.read_bytes())
    weight = good["state_dict"]["classifier.weight"].numpy().tobytes()
    content[content.index(weight) + 1000] ^= 1
    path.write_bytes(content)
    assert zipfile.is_zipfile(path)
    with pytest.raises(BadInput, match="a.pth is damaged: the checksum of .*data/"):
        load_checkpoint(path)


def test_prefixes_of_wrappers_are_taken_off(good):
    model = MobileViT("xxs")
    wrapped = torch.nn.DataParallel(copy.deepcopy(model)).state_dict()
    load_state(model, wrapped, "a.pth")
    with pytest.raises(BadInput) as error:
        load_state(model, {f"net.{k}": v for k, v in wrapped.items()}, "a.pth")
    assert len(str(error.value)) < 300


def test_half_precision_is_taken_as_it_is(good, tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in good["state_dict"].items()}
    save_checkpoint(tmp_path / "half.pth", good | {"state_dict": half})
    model, _ = model_from_checkpoint(tmp_path / "half.pth")
    assert model.classifier.weight.dtype == torch.float32
    assert model.classifier.weight.half().equal(half["classifier.weight"])


def test_a_state_is_compared_with_one_of_its_kind():
    optimizer = torch.optim.AdamW(nn.Linear(2, 3).parameters())
    state = optimizer.state_dict() | {"more": torch.zeros(2)}
    schema = like({"a": {"n": 1, "x": 1.0}, "more": state["more"]})
    schema({"a": {"n": 5, "x": -2.0}, "more": torch.ones(2)}, "it")
    for bad, says in (
        ({"a": {"n": 5}, "more": torch.ones(2)}, "it: a lacks x"),
        ({"a": {"n": 5, "x": 1.0, "z": 1}, "more": torch.ones(2)}, "it: a has an unknown z"),
        ({"a": {"n": 5.0, "x": 1.0}, "more": torch.ones(2)}, "it: a: n is 5.0"),
        ({"a": {"n": 5, "x": math.inf}, "more": torch.ones(2)}, "it: a: x is inf"),
        ({"a": {"n": 5, "x": 1.0}, "more": torch.ones(3)}, r"it: more is .*\[3\].*\[2\]"),
        ({"a": {"n": 5, "x": 1.0}, "more": torch.ones(2).long()}, "it: more is .*int64"),
        ({"a": 3, "more": torch.ones(2)}, "it: a is a int, but should be a mapping"),
    ):
        with pytest.raises(BadInput, match=says):
            schema(bad, "it")


def test_weights_that_are_not_finite_leave_no_run_behind(checkpoint, tmp_path):
    state = read_tensors(checkpoint)
    state["state_dict"]["classifier.weight"].fill_(math.nan)
    torch.save(state, tmp_path / "nan.pth")
    for option in ("--init", "--widen"):
        flags = (option, tmp_path / "nan.pth", "--output", tmp_path / "out")
        says = "classifier.weight has values that are not finite"
        fails_with_one_line("train.py", *SYNTHETIC, *flags, says=says)
        assert not (tmp_path / "out").exists()
    fails_with_one_line("train.py", "--eval", "--checkpoint", tmp_path / "nan.pth", says=says)


def test_a_task_or_classes_that_eval_does_not_know_are_one_line(good, tmp_path):
    seven = MobileViT("xxs", 7)
    weights = {"settings": settings_of(seven), "state_dict": seven.state_dict()}
    for change, says in (
        ({"task": "birds"}, "was trained on birds; --eval knows cifar10, synthetic"),
        (weights | {"classes": list("abcdefg")}, "7 classes in .*, but 10 in the test images"),
    ):
        save_checkpoint(tmp_path / "a.pth", good | change)
        with pytest.raises(BadInput, match=says):
            score_on_test_set(tmp_path / "a.pth", None, "cpu")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after its first epoch began."""
    folder = tmp_path_factory.mktemp("run")
    run("train.py", *SYNTHETIC, "--max-minutes", "0.0001", "--output", folder, code=3)
    return folder


LINE = {name: 32 if name in ("img_size", "window") else "1.0" for name in log_line(classification)}


def moment(state) -> dict:
    return state["optimizer"]["state"][5]


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda s: moment(s).update(exp_avg=torch.zeros(2)),
            r"optimizer: state: 5: exp_avg is .*\[2\]",
        ),
        (lambda s: moment(s).update(exp_avg=torch.zeros(2).long()), "exp_avg is .*int64"),
        (lambda s: moment(s).pop("exp_avg_sq"), "state: 5 lacks exp_avg_sq"),
        (lambda s: s["optimizer"]["state"].pop(7), "optimizer: state lacks 7"),
        (lambda s: s["optimizer"]["state"].update({10**6: {}}), "has an unknown 1000000"),
        (lambda s: s.update(optimizer=None), "optimizer is None, but should be a mapping"),
        (lambda s: s.pop("model"), "lacks model"),
        (lambda s: s["model"].pop(CLASSIFIER), "lacks classifier.bias"),
        (lambda s: s.update(step=10**9), "step is 1000000000"),
        (lambda s: s.update(step=72), "logs 0 validations at step 72"),
        (lambda s: s.update(history=[{"epoch": 1}]), r"history\[0\] lacks img_size"),
        (lambda s: s.update(step=36, history=[LINE | {"epoch": 2}]), r"has the epochs \[2\]"),
        (lambda s: s.update(sums=torch.zeros(4)), r"sums is .*\[4\]"),
        (lambda s: s.update(seconds="long"), "seconds is 'long'"),
        (
            lambda s: s["config"].update(train_images=1799),
            r"began with training images: 1799 \(now 1800\)",
        ),
        (
            lambda s: (s["config"].pop("train_images"), s.update(step=-1)),  # an older run: let by
            "step is -1",
        ),
        (lambda s: s["config"].update(classes=["cat"]), r"began with classes: \['cat'\] \(now"),
        (lambda s: s.update(config=[]), "config is list, but should be a mapping"),
    ],
)
def test_a_last_pth_of_wrong_content_is_named(change, says, stopped, tmp_path, monkeypatch):
    state = read_tensors(stopped / "last.pth")
    change(state)
    save_checkpoint(tmp_path / "last.pth", state)
    flags = ("--resume", "--output", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["train.py", *SYNTHETIC, *flags])
    with pytest.raises(BadInput, match=f"last.pth.*({says})"):
        train.train(train.parse_args(train.__doc__), World("cpu"))
    assert os.listdir(tmp_path) == ["last.pth"]


def test_a_checkpoint_of_format_1_is_read_with_its_heads_and_its_task(tmp_path):
    network = MobileViT("xxs", 3, heads=2)
    old = {
        "format": 1,
        "model": "xxs",
        "num_classes": 3,
        "heads": [2, 2, 2],
        "img_size": 64,
        "config": {"dataset": "synthetic", "val_size": 9},
        "epoch": 4,
        "state_dict": network.state_dict(),
    }
    save_checkpoint(tmp_path / "old.pth", old)
    again, checkpoint = model_from_checkpoint(tmp_path / "old.pth")
    assert again.heads == (2, 2, 2) and checkpoint["classes"] == ["class 0", "class 1", "class 2"]
    assert (checkpoint["model"], checkpoint["task"]) == ("mobilevit_xxs", "synthetic")
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(again(x), network.eval()(x))
