"""The checkpoints in this repository on the real test images, where DATA_DIR names them."""

import os
from pathlib import Path

import pytest
from conftest import ROOT

from lab import files
from lab.engines.measure import predict
from lab.models.checkpoint import model_from_checkpoint
from lab.report.rows import load_rows
from lab.report.tables import agreement_pct, twin
from lab.tasks import TASKS
from lab.tasks.batches import EvalBatches
from ptq.recipe import Recipe
from ptq.recipes import RECIPES
from ptq.recipes.baselines import PROTOCOL

SHIPPED = sorted(p for p in Path(ROOT, "checkpoints").glob("mobilevit_*/best.pth")
                 if "synthetic" not in str(p))  # fmt: skip
FP32_ROWS = [ROOT / "results" / p.parent.name / "fp32@torch-eager.json" for p in SHIPPED]
N = 100  # images
AGREEMENT_PCT, POINTS_APART = 99.5, 0.1  # wanted of an engine and the simulation
MISSES = {  # what was got where one of them was not
    ("mobilevit_xxs", "w4a8@openvino"): (99.67, 0.11),
    ("mobilevit_xs", "w8a8@onnxruntime"): (99.48, 0.02),
    ("mobilevit_s", "w4a8@openvino"): (99.49, 0.05),
}


def test_something_is_shipped():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_every_row_is_of_the_shipped_weights(path):
    results = [files.read_json(p) for p in (ROOT / "results" / path.parent.name).glob("*.json")]
    assert {row["recipe"]["name"] for row in results} >= {r.name for r in PROTOCOL}
    assert {row["checkpoint_sha256"] for row in results} == {files.sha256(path)}
    for row in results:
        assert Recipe.fromdict(row["recipe"]) == RECIPES[row["recipe"]["name"]]


# What computes in BF16 around the integers rounds more than the simulation does, see the docs.
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_engines_predict_as_simulated(engine):
    every_row = load_rows(ROOT / "results", ROOT / "checkpoints")
    pairs = [(row, twin(row, every_row)) for row in every_row if row["engine"] == engine]
    pairs = [(row, simulated) for row, simulated in pairs if simulated]
    assert pairs
    for row, simulated in pairs:
        what = row["model"], f"{row['recipe']['name']}@{engine}"
        apart = abs(row["accuracy_pct"] - simulated["accuracy_pct"])
        least, most = MISSES.get(what, (AGREEMENT_PCT, POINTS_APART))
        assert round(agreement_pct(row, simulated), 2) >= least and round(apart, 2) <= most, what


@pytest.mark.skipif(not os.environ.get("DATA_DIR"), reason="DATA_DIR names no CIFAR-10")
@pytest.mark.parametrize("path", FP32_ROWS, ids=lambda path: path.parent.name)
def test_shipped_weights_predict_what_their_row_says(path):
    row = files.read_json(path)
    checkpoint = ROOT / row["checkpoint"]
    assert files.sha256(checkpoint) == row["checkpoint_sha256"]
    model, _ = model_from_checkpoint(checkpoint)
    test = TASKS["cifar10"].load(os.environ["DATA_DIR"], train=False)
    logits, labels = predict(model, EvalBatches(test[:N], row["img_size"], 50))
    expected = sum(int(a) == b for a, b in zip(row["predictions"], test.labels[:N].tolist()))
    n_correct = int((logits.argmax(1) == labels).sum())
    assert abs(n_correct - expected) <= 1  # another CPU may break a tie otherwise
    truth = test.labels.tolist()
    assert sum(int(a) == b for a, b in zip(row["predictions"], truth)) == row["n_correct"]


@pytest.mark.parametrize("path", FP32_ROWS, ids=lambda path: path.parent.name)
def test_shipped_checkpoints_state_the_accuracy_of_their_row(path):
    row = files.read_json(path)
    _, checkpoint = model_from_checkpoint(ROOT / row["checkpoint"])
    assert abs(checkpoint["test_accuracy_pct"] - row["accuracy_pct"]) <= 0.02  # 2 images
