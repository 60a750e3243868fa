"""`quantize.py --from`: rows measured again, of which some fail or are no longer what they were."""

from types import SimpleNamespace

import pytest
import torch
from conftest import fails_with_one_line, run
from made_results import row
from small import small_network

import ptq
import quantize
from lab import files
from lab.cli import BadInput
from lab.models import build
from lab.models.checkpoint import save_checkpoint
from lab.models.foreign import as_checkpoint, family_of
from lab.repeats import recipe_of_row
from lab.report.compare import compare_rows
from lab.subject import load_subject
from lab.tasks import TASKS
from ptq import RECIPES


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Two rows of a fresh network."""
    torch.manual_seed(0)
    folder, classes = tmp_path_factory.mktemp("rows"), TASKS["synthetic"].load(None, False).classes
    network = build("mobilevit_xxs", num_classes=len(classes)).eval()
    checkpoint = as_checkpoint(
        network, "mobilevit_xxs", family_of("mobilevit_xxs").layouts[0], classes
    )
    path = folder / "run" / "best.pth"
    path.parent.mkdir()
    save_checkpoint(path, checkpoint | {"task": "synthetic", "img_size": 32})
    few = ("--test-images", "20", "--latency-runs", "1", "--output", folder)
    run("quantize.py", "--checkpoint", path, "--recipes", "fp32", "fp16", *few)
    return sorted(folder.rglob("fp*.json"))


def test_all_rows_are_checked_before_the_first_is_measured(rows, tmp_path):
    row = files.read_json(rows[0])
    command = ("quantize.py", "--from", rows[0], tmp_path / "wrong.json")
    for change, says in (
        ({"engine": "abacus"}, "no engine is called abacus"),
        ({"checkpoint_sha256": "0"}, "holds other weights than were measured"),
        ({"images_sha256": "0"}, "has other images or labels than were measured"),
        ({"recipe": row["recipe"] | {"calibration_images": 7}}, "is not what it was"),
        ({"checkpoint": str(tmp_path / "absent.pth")}, "no checkpoint at"),
    ):
        files.write_json(tmp_path / "wrong.json", row | change)
        fails_with_one_line(*command, "--output", tmp_path / "again", says=says)
    assert not list(tmp_path.rglob("*@*.json"))


def test_a_row_that_fails_does_not_stop_the_others(rows, tmp_path):
    blocked = tmp_path / rows[0].parent.name / rows[0].name
    blocked.mkdir(parents=True)  # a folder where the row's file should go
    command = ("quantize.py", "--from", *rows, "--latency-runs", "1", "--output", tmp_path)
    out, err = run(*command, code=2)
    assert "fp16@published: failed, " in err and "Traceback" not in err
    assert out.count("| yes |") == 1 and "fp32@torch-eager" in out.splitlines()[-2]


def test_names_with_an_ending_are_compared_and_allocated_ones_are_taken_from_the_row():
    subject = SimpleNamespace(model=small_network())
    for name in ("w8a8", "fq-vit-kl", "w4-nearest-tensor"):
        row = {"recipe": ptq.recipe(name, subject.model).asdict()}
        assert recipe_of_row(subject, row, "row.json").name == name
        row["recipe"]["calibration_images"] = 7
        with pytest.raises(BadInput, match=f"row.json: recipe {name} is not what it was"):
            recipe_of_row(subject, row, "row.json")
    for name in ("mixed-5bits", "w8a8-suggested"):
        row["recipe"]["name"] = name
        assert recipe_of_row(subject, row, "row.json").asdict() == row["recipe"]


@pytest.mark.parametrize(
    "change, agree",
    [
        ({}, True),
        ({"size_bytes": 1009}, True),
        ({"size_bytes": 1011}, False),
        ({"score": {"accuracy_pct": 90.4}}, True),
        ({"score": {"accuracy_pct": 90.6}}, False),
        ({"predictions": [1] * 20 + [0] * 980}, True),
        ({"predictions": [1] * 21 + [0] * 979}, False),
    ],
)
def test_rows_agree_within_the_limits_that_are_printed(change, agree):
    shipped = row("w8a8", n_images=2000, size_bytes=1000, accuracy=80.0)
    measured = row("w8a8", n_images=1000, size_bytes=1000, accuracy=90.0) | change
    labels = [0] * 900 + [1] * 100  # on these images, the shipped row is right for 90 %
    assert compare_rows(shipped, measured, labels)[1] is agree


def test_rows_of_another_kind_of_cpu_are_not_compared(checkpoint, tmp_path, monkeypatch, capsys):
    recipe, path = RECIPES["w8a8"], tmp_path / "a.json"
    subject = load_subject(checkpoint, None)
    shipped = row("w8a8", "openvino", n_images=500, checkpoint=str(checkpoint))
    files.write_json(path, shipped | subject.origin(recipe))
    monkeypatch.setattr("lab.machine.has_vnni", lambda: False)
    options = {"data_dir": None, "test_images": None, "latency_runs": 3, "force": True}
    with pytest.raises(BadInput, match="nothing was compared"):
        quantize.repeat_rows(SimpleNamespace(rows=[path], output=tmp_path / "again", **options))
    assert "not compared, it was measured on a CPU with VNNI" in capsys.readouterr().out
