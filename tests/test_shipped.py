"""The checkpoints in this repository on the real test images, where DATA_DIR names them."""

import os
from pathlib import Path

import pytest
from conftest import ROOT

import data
import rows
from engines import predict
from weights import model_from_checkpoint

FP32_ROWS = sorted(Path(ROOT, "results").glob("mobilevit_*/fp32*@torch-eager.json"))
FP32_ROWS = [path for path in FP32_ROWS if "synthetic" not in str(path)]
N = 1000  # images


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
    assert int((logits.argmax(1) == labels).sum()) == expected
    truth = test.labels.tolist()
    assert sum(int(a) == b for a, b in zip(row["predictions"], truth)) == row["n_correct"]


@pytest.mark.parametrize("path", FP32_ROWS, ids=lambda path: path.parent.name)
def test_shipped_checkpoints_state_the_accuracy_of_their_row(path):
    row = rows.read_json(path)
    _, checkpoint = model_from_checkpoint(ROOT / row["checkpoint"])
    assert abs(checkpoint["test_accuracy_pct"] - row["accuracy_pct"]) <= 0.02  # 2 images
