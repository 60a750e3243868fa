"""Figures and the tables of all pages, from result files that the tests make."""

import ast
import shutil
import sys

import matplotlib.pyplot as plt
import pytest
from conftest import ROOT, fails_with_one_line, run
from made_results import (
    AVX2,
    TIMES,
    bench,
    change,
    flags,
    load,
    row,
    write_tree,
)

from lab.files import write_json
from lab.report import reading, row_figures, study_figures
from lab.report.figures import FIGURES
from lab.report.pages import PAGES
from lab.report.rows import in_main_tables, load_rows, row_path
from ptq import RECIPES


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Results and runs of shipped weights, and pages with markers."""
    root = tmp_path_factory.mktemp("made")
    write_tree(root)
    return root


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def tree(made, tmp_path):
    return shutil.copytree(made, tmp_path / "tree")


def blocks_of(found):
    """{name of a block: its Markdown} of all pages."""
    return {b: markdown(found) for blocks in PAGES.values() for b, markdown in blocks.items()}


def test_pages_are_filled_and_then_agree(tree):
    run("plots.py", *flags(tree, "--check"), code=1)
    path = tree / "results" / "mobilevit_xxs" / "w8a8@openvino.json"
    extra = shutil.copy(path, path.with_name("w8a8-seed1@openvino.json"))
    change(extra, latency_runs=3)
    out, _ = run("plots.py", *flags(tree, "--readme"))
    assert out.startswith("rows left out, of other weights, fewer images or other settings: 1\n")
    run("plots.py", *flags(tree, "--check"))
    texts = {name: (tree / name).read_text() for name in PAGES}
    for text in texts.values():
        assert text.startswith("before\n") and text.endswith("\nafter") and "old" not in text
        assert "No results yet." not in text
    assert (
        "| mobilevit_xxs | w8a8 | openvino | 89.90 | -0.10 (0) | 1.00 | 2.50x |"
        in texts["README.md"]
    )
    for name in FIGURES:
        for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
            figure = tree / "results" / "figures" / f"{name}{suffix}"
            assert figure.read_bytes().startswith(magic) and str(figure) in out
    fp32 = tree / "results" / "mobilevit_xxs" / "fp32@torch-eager.json"
    change(fp32, score={"accuracy_pct": 91.0})
    _, err = run("plots.py", *flags(tree, "--check"), code=1)
    assert "README.md" in err and "training.md" not in err


def test_figures_are_the_same_bytes_at_every_run(tree):
    for folder in ("a", "b"):
        run("plots.py", *flags(tree), "--figures", tree / folder)
    for path in (tree / "a").iterdir():
        assert path.read_bytes() == (tree / "b" / path.name).read_bytes(), path.name


def test_tables_of_rows(made):
    blocks = blocks_of(load(made))
    computed = "INT8 (Conv 30/35, MatMul 37/55)"
    line = f"| mobilevit_xxs | w8a8 | openvino | {computed} | 89.90 | -0.10 (0) | 1.00 | 4.00x |"
    times = " 8.0 (20.0) | 2.50x | AVX512 with VNNI | 100.00 % | `w8a8@openvino.json` |"
    assert line + times in blocks["engines"]
    assert blocks["engines"].count("| w8a8 |") == 1  # at 256x256 alone
    simulated = (
        "| mobilevit_xxs | w6a6 | 89.50 | -0.50 (0) | 1.00 | 4.00x | `w6a6@torch-eager.json` |"
    )
    assert simulated in blocks["simulated"] and "w6a6" not in blocks["engines"]
    assert "| mobilevit_xxs | i-bert | 90.00 | 90.00 | 1 | 2 | 3 |" in blocks["integers"]
    assert "| FP32 | 89.95 |" in blocks["simulated"] and "torch-float64" not in blocks["results"]
    fp16 = "| mobilevit_xxs | FP16 weights | published | FP32, simulated | 90.00 | +0.00 (0) |"
    assert fp16 in blocks["results"] and " 10.0 (20.0) | - | AVX512" in blocks["results"]
    assert "1.00 (est.) | 4.00x |" in blocks["results"]
    assert "| 93.99 / 3.76 / 11.7 | `fp32@torch-eager.json` |" in blocks["results"]
    order = [line.split(" | ")[1:3] for line in blocks["headline"].splitlines()[2:]]
    assert order == [["FP32", "torch-eager"], ["FP32", "openvino"], ["w8a8", "openvino"],
                     ["w4", "openvino"]]  # fmt: skip
    sizes = ["| mobilevit_xxs | 128 | 88.00 | 1.67x | 87.90 | 4.00x |",
             "| mobilevit_xxs | 256 | 90.00 | 1.25x | 89.90 | 2.50x |"]  # fmt: skip
    assert "\n".join(sizes) in blocks["sizes"]
    assert "| airplane | 90.0 | 90.0 |" in blocks["classes"]


def test_headline_shows_speeds_of_one_kind_of_cpu(tree):
    change(tree / "results" / "mobilevit_xxs" / "w4@openvino.json", cpu=AVX2)
    headline = blocks_of(load(tree))["headline"]
    assert "| w4 | openvino | 89.50 | -0.50 (0) | 0.50 | - |" in headline
    assert "| w8a8 | openvino | 89.90 | -0.10 (0) | 1.00 | 2.50x |" in headline
    axis = row_figures.headline(load(tree)).axes[0]
    assert len([line for line in axis.get_lines() if line.get_marker() != "None"]) == 3


def test_tables_of_runs_and_studies(made):
    blocks = blocks_of(load(made))
    first, second = "python train.py --seed 2", "python train.py --seed 3"
    for command in (first, second):
        assert f"```bash\n{command}\n# done, after 6 min\n```" in blocks["commands"]
    assert blocks["commands"].index(first) < blocks["commands"].index(second)
    began, went_on = blocks["training"].splitlines()[2:]
    assert "| widened, 64:1, 128/256:1, 256:1 | AdamW, FP32 | a CPU | 954,234 | 99 |" in began
    assert "| then 64:1, 128/256:1, 256:1 | Muon, BF16 |" in went_on
    for name in ("per-layer", "per-layer-fx"):
        lines = blocks[name].splitlines()[2:]
        assert lines == ["| input of stem.conv | 0.500000 |", "| input of head | 0.100000 |",
                         "| the other 1 together | 0.000000 |",
                         "| all together | 0.700000 |"]  # fmt: skip
    assert "| AdaRound by block | w4 | 89.00 ± 1.41 | -1.00 | 0 ± 0 | 2 |" in blocks["ablation"]
    assert "| int8-nncf | nncf 3 | 5.0 | 0.25 | 0.50 | - | - | - |" in blocks["speeds"]
    assert "| FP32 | torch-eager 1 | 20.0 | 1.00 | 1.00 | 40.0 | 1.00 | 1.00 |" in blocks["speeds"]
    assert "| FP32 | openvino 2 | 4.0 | - | 1.00 |" in blocks["speeds-vnni"]
    assert "| convolutions, INT8 | 0.00 | 1.00 |" in blocks["profile"]
    assert "| all others | 1.00 | 1.00 |\n| together | 5.00 | 3.00 |" in blocks["profile"]
    assert "| logs | 7 | 0 |\n| together | 37 | 2 |" in blocks["abuse"]
    size = "1,000,000 | 87.1"
    assert f"| base | {size} | 81.00 | 80.00 to 82.00 | - |" in blocks["ablations"]
    assert f"| near | {size} | 82.25 | 81.00 to 83.50 | none |" in blocks["ablations"]
    assert f"| far | {size} | 71.00 | 70.00 to 72.00 | -10.00 |" in blocks["ablations"]
    assert "\n\n2 seeds; 1,000 steps of 64 images of 128x128 pixels, BF16" in blocks["ablations"]
    benchmarks = blocks["benchmarks"]
    assert "BF16, a CPU | 40.0 images/s | timm 1.2: 32.0 images/s | 1.25 |" in benchmarks
    assert "| The same | 40.0 images/s | fused attention: 20.0 images/s | 2.00 |" in benchmarks
    assert (
        "augmentation none | 100 images/s | training at 256x256 on cpu: 20.0 images/s | 5 |"
        in benchmarks
    )


def test_other_tasks_have_tables_of_their_own(made):
    blocks = blocks_of(load(made))
    line = "| of_detection | w8a8 | openvino | FP32 | 79.50 | -0.50 | 1.00 | 2.00x |"
    assert line in blocks["detection"]
    assert "| of_segmentation | FP32 | torch-eager | FP32 | 50.00 |" in blocks["segmentation"]
    assert "python train.py --task detection" in blocks["detection-runs"]
    others = [text for name, text in blocks.items() if not name.startswith(("det", "seg"))]
    assert not any("of_detection" in text or "--task" in text for text in others)


def test_times_of_recipes_that_changed_since_are_left_out(tree):
    path = tree / "results" / "benchmarks" / "engines-mobilevit_xxs.json"
    w7a8 = RECIPES["w7a8"].asdict()
    write_json(row_path(tree / "results" / "mobilevit_xxs", row("w7a8", "openvino")),
               row("w7a8", "openvino"))  # fmt: skip
    for layers, shown in ((w7a8["layers"], True), (w7a8["layers"][1:], False)):
        content = bench("mobilevit_xxs", TIMES | {"w7a8@openvino": 7.0})
        content["recipes"]["w7a8"] = w7a8 | {"layers": layers, "title": "another title"}
        write_json(path, content)
        assert ("w7a8" in blocks_of(load(tree))["speeds"]) is shown
    del content["recipes"]["w7a8"]
    write_json(path, content)
    assert "w7a8" not in blocks_of(load(tree))["speeds"]


@pytest.mark.parametrize(
    "other",
    [
        {"task": "synthetic"},
        {"split": "held-out", "n_images": 2000},
        {"img_size": 128, "adapt_images": 256},
        {"n_images": 100},
        {"seed": 1},
        {"latency_runs": 5},
        {"calibration_images": 10},
        {"checkpoint_sha256": "of other weights"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_rows_of_other_data_settings_or_weights_are_not_published(tree, other):
    before = load_rows(tree / "results", tree / "checkpoints")
    content = row("w7a8", "openvino", **other)
    write_json(row_path(tree / "results" / "mobilevit_xxs", content), content)
    rows = load_rows(tree / "results", tree / "checkpoints")
    assert len(list(filter(in_main_tables, rows))) == len(list(filter(in_main_tables, before))) > 0


def test_findings_above_figures_are_what_the_rows_say(made):
    found = load(made)

    def finding(draw):
        return draw(found).get_suptitle().replace("\n", " ")

    assert "2.5 to 2.5 times FP32, and loses at most 0.10 points" in finding(row_figures.headline)
    methods = finding(row_figures.methods)
    assert "INT8 loses 30.0 to 30.0 points, INT4 50.0 to 50.0, FP16 none" in methods
    assert "8.0 times smaller and cost at most 0.50" in finding(row_figures.pareto)
    assert "cat and dog for each other most often: 200 of 1,000" in finding(row_figures.confusion)
    sizes = finding(row_figures.input_sizes)
    assert sizes == "At every side w8a8 loses at most 0.10 points and is 2.0 to 2.4 times as fast"
    curves = finding(study_figures.training_curves)
    assert "80.00 % of held-out images right after 12 minutes on a CPU" in curves
    assert "2 of 3 tensors make 98 % (w8a8-early)" in finding(study_figures.layers)
    assert "linear layers from 2.0 to 1.0 ms" in finding(study_figures.milliseconds)
    waterfall = finding(study_figures.waterfall)
    assert "35.00 to 89.00 %" in waterfall and "norms shifted (+50.00)" in waterfall


def test_findings_are_not_claimed_where_the_rows_do_not_show_them(tree):
    folder = tree / "results" / "mobilevit_xxs"
    change(folder / "w8a8@openvino.json", score={"accuracy_pct": 80.0})
    found = load(tree)
    assert "as fast" not in row_figures.input_sizes(found).get_suptitle()


def test_without_results_there_is_no_figure_and_tables_say_so(tmp_path):
    found = load(tmp_path)
    assert [name for name, draw in FIGURES.items() if draw(found) is not None] == []
    blocks = blocks_of(found)
    assert "| resnet18 | uniform4 | no results yet |" in blocks.pop("neighbours")
    assert set(blocks.values()) == {"No results yet.", ""}
    (tmp_path / "results").mkdir()
    fails_with_one_line("plots.py", *flags(tmp_path), says="holds no row of weights in")


def test_models_that_are_not_known_follow_by_name(tree):
    names = ("resnet18", "deit_tiny")
    for name in names:
        for recipe in ("fp32", "w8a8"):
            content = row(recipe, model=name)
            write_json(row_path(tree / "results" / name, content), content)
    found = load(tree)
    assert reading.models_of(found.rows) == ["mobilevit_xxs", "deit_tiny", "resnet18"]
    assert "| resnet18 | w8a8 |" in blocks_of(found)["simulated"]
    for draw in FIGURES.values():
        assert draw(found) is not None


def test_reports_need_nothing_but_files():
    """lab.report imports no network, no data set and no torch."""
    ours = ("lab.cli", "lab.files", "lab.schema", "lab.report")
    for path in (ROOT / "lab" / "report").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                root = name.split(".")[0]
                known = root in sys.stdlib_module_names or root in ("numpy", "matplotlib")
                assert known or name.startswith(ours), f"{path.name} imports {name}"
