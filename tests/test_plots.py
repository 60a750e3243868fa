"""Figures and README tables from result files."""

import json
import shutil

import pytest
from conftest import fails_with_one_line, run

from lab.cli import BadInput
from lab.files import sha256, write_json, write_text
from lab.report import figures
from lab.report.pages import filled_page
from lab.report.rows import is_published, load_rows
from ptq import RECIPES


def page(*blocks):
    return "\n".join(f"<!-- begin:{name} -->\nold\n<!-- end:{name} -->" for name in blocks)


def row(recipe, engine=None, **other):
    ms = {"median": 10.0, "p10": 9.0, "p90": 11.0, "runs": 3, "threads": 1, "batch": 1}
    return {
        "model": "mobilevit_xxs",
        "dataset": "cifar10",
        "split": "test",
        "img_size": 256,
        "checkpoint": "best.pth",
        "checkpoint_sha256": sha256(b"weights"),
        "recipe": RECIPES[recipe].asdict(),
        "cpu": "A CPU, AVX2",
        "engine": engine or RECIPES[recipe].peer or "torch-eager",
        "simulated": RECIPES[recipe].simulated,
        "n_images": 10_000,
        "n_correct": 9000,
        "accuracy_pct": 90.0,
        "predictions": "0" * 10_000,
        "confusion": [
            [900 if i == j else 100 * (j == (i + 1) % 10) for j in range(10)] for i in range(10)
        ],
        "size_bytes": 2**20,
        "size_is_estimate": False,
        "products": None,
        "seed": 0,
        "latency_runs": 100,
        "calibration_images": RECIPES[recipe].calibration_images,
        "latency_ms": ms,
        "fp32_latency_ms": ms,
        "wall_s": 1.0,
    } | other


IN_INT8 = {
    "simulated": False,
    "products": {"int8": {"Conv": 30, "MatMul": 37}, "float": {"Conv": 5, "MatMul": 18}},
}
HELD_OUT = {"split": "held-out", "n_images": 2000}


@pytest.fixture
def tree(tmp_path):
    """Rows of a shipped checkpoint, its training log and pages with markers."""
    results, shipped = (
        tmp_path / parent / "mobilevit_xxs" for parent in ("results", "checkpoints")
    )
    results.mkdir(parents=True)
    shipped.mkdir(parents=True)
    (shipped / "best.pth").write_bytes(b"weights")
    rows = {recipe: row(recipe) for recipe in ("fp32", "int8-fx")}
    rows |= {
        f"held-out-{i}": row("w4", accuracy_pct=80.0 + 2 * i, seed=i, **HELD_OUT) for i in (0, 1)
    }
    rows["held-out"] = row("fp32", **HELD_OUT)
    rows["w8a8"] = row("w8a8", "openvino", **IN_INT8)
    rows["w6a6"] = row("w6a6", accuracy_pct=89.5, n_correct=8950)
    small = {"img_size": 128, "accuracy_pct": 88.0, "latency_ms": {"median": 5.0}}
    rows["w8a8-128"] = row("w8a8", "openvino", **IN_INT8 | small)
    for name, content in rows.items():
        (results / f"{name}@engine.json").write_text(json.dumps(content))
    config = {"dataset": "cifar10", "variant": "xxs", "resolutions": "64:1,256:1",
              "precision": "fp32"}  # fmt: skip
    metrics = {"config": config, "hardware": "a CPU", "train_s": 60, "epoch": 2, "printed": "done",
               "val_accuracy_pct": 80.0, "test_accuracy_pct": 79.0}  # fmt: skip
    (shipped / "metrics.json").write_text(json.dumps(metrics))
    command = "python train.py --data-dir /mnt/data --output /tmp/x --seed 3"
    (shipped / "config.json").write_text(json.dumps({"command": command}))
    names = (
        "epoch",
        "img_size",
        "window",
        "train_loss",
        "val_loss",
        "train_accuracy_pct",
        "val_accuracy_pct",
        "images_per_s",
    )
    lines = (
        names,
        (1, 64, 64, 2.1, 1.9, 30, 35, 99),
        (2, 256, 128, 1.8, 1.6, 40, 45, 99),
        (3, 256, 256, 1.8, 1.6, 40, 45, 99),
    )
    (shipped / "log.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
    first = shutil.copytree(shipped, shipped / "first", ignore=shutil.ignore_patterns("*.pth"))
    command = "python train.py --seed 2 --output runs/first --max-minutes 9"
    (first / "config.json").write_text(json.dumps({"command": command}))
    blocks = ("headline", "results", "engines", "simulated", "speeds", "speeds-vnni", "training")
    (tmp_path / "README.md").write_text(page(*blocks, "commands", "sizes", "benchmarks"))
    (tmp_path / "checkpoints" / "README.md").write_text(page("training", "classes"))
    noise = {"weights": {"stem.conv": 0.01}, "inputs": {"stem.conv.input": 0.5}}
    calibration = {"n": RECIPES["w8a8-early"].calibration_images}
    report = {"checkpoint_sha256": sha256(b"weights"), "calibration": calibration,
              "recipe": RECIPES["w8a8-early"].asdict(), "noise": noise, "noise_of_rest": 0.0,
              "noise_of_all": 0.7}  # fmt: skip
    write_json(results / "per-layer" / "w8a8-early.json", report)
    times = {"fp32@torch-eager": 20.0, "fp32@openvino": 10.0, "int8-nncf@nncf": 5.0}
    bench = {"model": "xxs",
             "latency_ms": {name: {"median": ms} for name, ms in times.items()},
             "engine_versions": {"torch-eager": "1", "openvino": "2", "nncf": "3"}}  # fmt: skip
    write_json(tmp_path / "results" / "benchmarks" / "engines-xxs.json", bench)
    bench = bench | {"model": "xs", "latency_ms": {"fp32@torch-eager": {"median": 40.0}}}
    write_json(tmp_path / "results" / "benchmarks" / "engines-xs.json", bench)
    nodes = {"fp32": {"Convolution FP32": 2, "Pad": 1}, "w8a8": {"Convolution INT8": 1, "Pad": 1}}
    write_json(tmp_path / "results" / "benchmarks" / "profile-xxs-vnni.json", {"ms": nodes})
    speeds = {"ours": 40.0, "timm": 32.0, "fused attention": 20.0}
    train = {"images_per_s": speeds, "ratio": {"timm": 1.25, "fused attention": 2.0},
             "variant": "xxs", "img_size": 256, "precision": "bf16", "hardware": "a CPU",
             "timm": "1.2"}  # fmt: skip
    write_json(tmp_path / "results" / "benchmarks" / "train.json", train)
    write_text(
        tmp_path / "docs" / "quantization.md",
        page("per-layer", "per-layer-fx", "profile", "ablation"),
    )
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
    assert text.count("| mobilevit_xxs | w8a8 | openvino | 90.00 | +0.00 (0) | 1.00 | 1.00x |") == 1
    computed = "INT8 (Conv 30/35, MatMul 37/55)"
    assert text.count(f"| mobilevit_xxs | w8a8 | openvino | {computed} |") == 1  # at 256x256
    assert text.count("| mobilevit_xxs | w6a6 |") == 1
    assert "| mobilevit_xxs | w6a6 | 89.50 | -0.50 (0) | 1.00 | 1.00x |" in text
    sizes = ["| mobilevit_xxs | 128 | - | - | 88.00 | 2.00x |",
             "| mobilevit_xxs | 256 | - | - | 90.00 | 1.00x |"]  # fmt: skip
    assert "\n".join(sizes) in text
    run("plots.py", *flags(tree), "--check")
    for command in ("python train.py --seed 2 --output runs/first", "python train.py --seed 3"):
        assert f"{command}\n# done, after 1 min" in text
    assert text.index("--seed 2") < text.index("--seed 3")
    assert text.index("| mobilevit_xxs | 64:1, 256:1 |") < text.index("| then 64:1, 256:1 |")
    assert "| 64:1, 256:1 | AdamW, FP32 | a CPU |" in text
    assert "BF16, a CPU | 40.0 images/s | timm 1.2: 32.0 images/s | 1.25 |" in text
    assert "| The same | 40.0 images/s | fused attention: 20.0 images/s | 2.00 |" in text
    card = (tree / "checkpoints" / "README.md").read_text()
    assert "| airplane | 90.0 | 90.0 |" in card and "| 954,234 |" in card and "old" not in card
    assert "| int8-nncf | nncf 3 | 5.0 | 0.25 | 0.50 | - | - | - |" in text
    assert "| FP32 | torch-eager 1 | 20.0 | 1.00 | 1.00 | 40.0 | 1.00 | 1.00 |" in text
    docs = (tree / "docs" / "quantization.md").read_text()
    assert "| input of stem.conv | 0.5000 |" in docs
    assert "| w4 | 81.00 ± 1.41 | -9.00 | 0 ± 0 | 2 |" in docs and "old" not in docs
    assert "| convolutions, INT8 | 0.00 | 1.00 |" in docs and "| together | 3.00 | 2.00 |" in docs
    for name in ("methods", "pareto", "training_curves", "confusion", "engines", "input_sizes"):
        for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
            figure = tree / "results" / "figures" / f"{name}{suffix}"
            assert figure.read_bytes().startswith(magic)
    changed = tree / "results" / "mobilevit_xxs" / "fp32@engine.json"
    changed.write_text(json.dumps(row("fp32", accuracy_pct=91.0, n_correct=9100)))
    run("plots.py", *flags(tree), "--check", code=1)


@pytest.mark.parametrize(
    "other",
    [
        {"dataset": "synthetic"},
        {"split": "held-out"},
        {"img_size": 128},
        {"n_images": 100},
        {"seed": 1},
        {"latency_runs": 5},
        {"calibration_images": 10},
        {"checkpoint_sha256": "of other weights"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_rows_of_other_data_settings_or_weights_are_not_published(tree, other):
    path = tree / "results" / "mobilevit_xxs" / "fp16@engine.json"
    path.write_text(json.dumps(row("fp16", **other)))
    rows = load_rows(tree / "results", tree / "checkpoints")
    published = [row["recipe"]["name"] for row in rows if is_published(row)]
    assert sorted(published) == ["fp32", "int8-fx", "w6a6", "w8a8"]


def test_speeds_on_another_cpu_are_not_drawn_beside_these():
    elsewhere = row("int8-nncf", cpu="A CPU, AVX512 with VNNI", accuracy_pct=89.0)
    shown = [row("fp32"), row("fp32", engine="openvino"), elsewhere]
    speeds, sizes = figures.engines(shown).axes[:2]
    heights = [[line.get_ydata()[0] for line in axis.get_lines() if len(line.get_xdata())]
               for axis in (speeds, sizes)]  # fmt: skip
    assert heights == [[90.0, 90.0], [90.0, 90.0, 89.0]] and "AVX2" in speeds.get_xlabel()


def test_missing_markers_and_folders_are_one_line(tree):
    with pytest.raises(BadInput, match="begin:results"):
        filled_page("no markers", {"results": "table"}, "README.md")
    fails_with_one_line("plots.py", "--results", tree / "absent", says="run quantize.py first")
    damaged = tree / "results" / "mobilevit_xxs" / "fp32@engine.json"
    damaged.write_text("{")
    fails_with_one_line("plots.py", *flags(tree), says="cannot read")
