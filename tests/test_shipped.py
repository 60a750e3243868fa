"""What this repository ships: rows, figures and weights, on the real images where DATA_DIR is."""

import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import ptq
from lab.engines.measure import predict
from lab.engines.registry import ENGINES, row_kind
from lab.files import read_json, sha256
from lab.models import build
from lab.models.checkpoint import load_checkpoint, model_from_checkpoint
from lab.report.figures import FIGURES
from lab.report.reading import accuracy, agreement_pct, simulated_row
from lab.report.results import load_results
from lab.report.rows import has_predictions, metric, read_row, row_path, setting
from lab.tasks import TASKS
from lab.tasks.batches import EvalBatches
from lab.training import evaluation
from lab.training.start import network_settings
from ptq.recipe import Recipe
from ptq.recipes import RECIPES
from ptq.recipes.baselines import PROTOCOL

SHIPPED = sorted(Path(ROOT, "checkpoints").glob("*/best.pth"))
CLASSIFIERS = [path for path in SHIPPED if load_checkpoint(path)["task"] == "cifar10"]
OTHERS = [path for path in SHIPPED if path not in CLASSIFIERS]
DATA = {"detection": ROOT / "data" / "bccd"}  # images that ship as well
RESULTS = ROOT / "results"
ROWS = sorted(RESULTS.rglob("*@*.json"))
N = 40  # images
AGREEMENT_PCT, POINTS_APART = 99.5, 0.1  # wanted of an engine and the simulation


@pytest.fixture(scope="module")
def found():
    return load_results(RESULTS, ROOT / "checkpoints")


def fp32_row(checkpoint):
    name = f"fp32{setting(load_checkpoint(checkpoint)['img_size'], seed=0)}@torch-eager.json"
    return read_row(RESULTS / checkpoint.parent.name / name)


def test_something_is_shipped():
    assert SHIPPED and ROWS


def todays(recipe, row):
    """The recipe of that name for the row's network; a mixed one has no other than its own."""
    if recipe.name not in RECIPES:
        return recipe
    run = read_json(ROOT / "checkpoints" / row["model"] / "config.json")
    settings = network_settings(run.get("settings")) | {"num_classes": len(row["classes"])}
    with torch.device("meta"):
        return ptq.recipe(recipe.name, build(run["model"], **settings))


@pytest.mark.parametrize("path", ROWS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_rows_agree_with_their_place_and_with_todays_recipes(path):
    row = read_row(path)
    folder = RESULTS / row["model"]
    assert path == row_path(folder, row)
    recipe = Recipe.fromdict(row["recipe"])
    assert recipe == todays(recipe, row)
    assert row["kind"] == row_kind(recipe, ENGINES[row["engine"]])
    if not has_predictions(row):
        return
    assert sum(row["confusion"][k][k] for k in range(len(row["classes"]))) == row["n_correct"]
    given = [row["predictions"].count(k) for k in range(len(row["classes"]))]
    assert given == [sum(column) for column in zip(*row["confusion"])]
    assert accuracy(row) == pytest.approx(100 * row["n_correct"] / row["n_images"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_every_row_is_of_the_shipped_weights(path):
    rows = [read_row(p) for p in ROWS if path.parent.name in p.parts]
    needed = {r.name for r in PROTOCOL} if path in CLASSIFIERS else {"fp32", "w8a8"}
    assert {row["recipe"]["name"] for row in rows} >= needed
    assert {row["checkpoint_sha256"] for row in rows} == {sha256(path)}


# What computes in BF16 around the integers rounds more than the simulation does, see the docs.
@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_engines_predict_as_simulated(found, engine):
    pairs = [(r, simulated_row(r, found.every_row)) for r in found.every_row]
    pairs = [(row, other) for row, other in pairs if row["engine"] == engine and other]
    assert pairs
    for row, other in pairs:
        what = row["model"], f"{row['recipe']['name']}@{engine}"
        apart = abs(accuracy(row) - accuracy(other))
        assert round(agreement_pct(row, other), 2) >= AGREEMENT_PCT, what
        assert round(apart, 2) <= POINTS_APART, what


def test_every_figure_can_be_drawn_and_is_on_a_page(found):
    pages = [ROOT / "README.md", ROOT / "checkpoints" / "README.md", *ROOT.glob("docs/*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    shipped = {path.name for path in (RESULTS / "figures").iterdir()}
    assert shipped == {f"{name}{suffix}" for name in FIGURES for suffix in (".png", ".svg")}
    for name, draw in FIGURES.items():
        assert draw(found) is not None and f"figures/{name}.png" in text, name


def test_benchmarks_are_of_todays_recipes(found):
    """Every one that has a recipe: the tables drop the others."""
    timed = found.benchmarks["engines"] + found.benchmarks["profile"]
    recipes = [recipe for bench in timed for recipe in bench["recipes"].values()]
    assert recipes
    for recipe in recipes:
        assert Recipe.fromdict(recipe) == RECIPES[recipe["name"]]


@pytest.mark.parametrize("model", sorted({path.relative_to(RESULTS).parts[0] for path in ROWS}))
def test_rows_of_a_model_are_of_the_same_weights_and_images(model):
    rows = [read_row(path) for path in (RESULTS / model).glob("*@*.json")]
    assert len({(row["checkpoint_sha256"], row["n_images"]) for row in rows}) == 1


@pytest.mark.skipif(not os.environ.get("DATA_DIR"), reason="DATA_DIR names no CIFAR-10")
@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda path: path.parent.name)
def test_shipped_weights_predict_what_their_row_says(path):
    row = fp32_row(path)
    model, _ = model_from_checkpoint(path)
    test = TASKS["cifar10"].load(os.environ["DATA_DIR"], train=False)
    logits, _ = predict(model, EvalBatches(test[:N], row["img_size"], N // 2))
    changed = logits.argmax(1) != torch.tensor(row["predictions"][:N])
    assert changed.sum() <= 1  # another CPU may break a tie otherwise
    right = sum(a == b for a, b in zip(row["predictions"], test.labels.tolist()))
    assert right == row["n_correct"]


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.parent.name)
def test_shipped_weights_score_what_their_row_says(path):
    row = fp32_row(path)
    score, _ = evaluation.score_on_test_set(path, DATA[row["task"]], "cpu")
    assert score[metric(row)] == pytest.approx(accuracy(row), abs=0.05)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_shipped_checkpoints_state_the_score_of_their_row(path):
    row = fp32_row(path)
    apart = abs(load_checkpoint(path)[f"test_{metric(row)}"] - accuracy(row))
    assert round(apart, 3) <= 0.02  # 2 images, on other hardware
