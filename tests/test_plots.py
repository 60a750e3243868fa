"""Figures and README tables from result files."""

import json

import pytest
from conftest import fails_with_one_line, run

from plots import filled_readme
from ptq import RECIPES
from rows import BadInput

README = "\n".join(
    f"<!-- begin:{name} -->\nold\n<!-- end:{name} -->"
    for name in ("results", "training", "commands", "benchmarks")
)


def row(recipe, dataset="cifar10"):
    ms = {"median": 10.0, "p10": 9.0, "p90": 11.0, "runs": 3, "threads": 1, "batch": 1}
    return {
        "model": "mobilevit_xxs",
        "dataset": dataset,
        "img_size": 256,
        "checkpoint": "best.pth",
        "checkpoint_sha256": "0",
        "recipe": RECIPES[recipe].asdict(),
        "engine": "torch-eager",
        "simulated": RECIPES[recipe].simulated,
        "n_images": 10_000,
        "n_correct": 9000,
        "accuracy_pct": 90.0,
        "predictions": "0" * 10_000,
        "size_bytes": 2**20,
        "size_is_estimate": False,
        "latency_ms": ms,
        "fp32_latency_ms": ms,
        "wall_s": 1.0,
    }


@pytest.fixture
def tree(tmp_path):
    """A results folder with two rows, an empty checkpoints folder and a README with markers."""
    folder = tmp_path / "results" / "mobilevit_xxs"
    folder.mkdir(parents=True)
    (tmp_path / "checkpoints").mkdir()
    for recipe in ("fp32", "int8-fx"):
        (folder / f"{recipe}@engine.json").write_text(json.dumps(row(recipe)))
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def flags(tree):
    return (
        "--results",
        tree / "results",
        "--checkpoints",
        tree / "checkpoints",
        "--readme-file",
        tree / "README.md",
    )


def test_readme_check_and_figures(tree):
    run("plots.py", *flags(tree), "--check", code=1)
    run("plots.py", *flags(tree), "--readme")
    text = (tree / "README.md").read_text()
    assert "| mobilevit_xxs | INT8, torch FX |" in text and "old" not in text
    run("plots.py", *flags(tree), "--check")
    for name in ("methods", "pareto"):
        for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
            figure = tree / "results" / "figures" / f"{name}{suffix}"
            assert figure.read_bytes().startswith(magic)
    changed = tree / "results" / "mobilevit_xxs" / "fp32@engine.json"
    changed.write_text(json.dumps(row("fp32") | {"accuracy_pct": 91.0, "n_correct": 9100}))
    run("plots.py", *flags(tree), "--check", code=1)


def test_synthetic_rows_are_left_out(tree):
    path = tree / "results" / "mobilevit_xxs" / "fp16@engine.json"
    path.write_text(json.dumps(row("fp16", dataset="synthetic")))
    run("plots.py", *flags(tree), "--readme")
    assert "FP16" not in (tree / "README.md").read_text()


def test_missing_markers_and_folders_are_one_line(tree):
    with pytest.raises(BadInput, match="begin:results"):
        filled_readme("no markers", {"results": "table"})
    fails_with_one_line("plots.py", "--results", tree / "absent", says="run quantize.py first")
    damaged = tree / "results" / "mobilevit_xxs" / "fp32@engine.json"
    damaged.write_text("{")
    fails_with_one_line("plots.py", *flags(tree), says="cannot read")
