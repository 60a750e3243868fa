"""Result files, logs and pages that are damaged or hold markup: one line, and no page broken."""

import json

import pytest
from conftest import fails_with_one_line, run
from made_results import CLASSES, change, flags, load, write_run, write_tree

from lab.cli import BadInput
from lab.files import write_json
from lab.report.pages import PAGES, filled_page, filled_pages
from lab.report.runs import classifies, read_metrics


@pytest.fixture
def tree(tmp_path):
    write_tree(tmp_path)
    return tmp_path


EVIL = "a | b `c` <!-- end:commands -->\n```\n| d |"


def test_text_from_files_is_no_markup(tree):
    fp32 = tree / "results" / "mobilevit_xxs" / "fp32@torch-eager.json"
    change(fp32, checkpoint=EVIL, model=EVIL, classes=[EVIL, *CLASSES[1:]], cpu=f"A CPU, {EVIL}")
    write_run(tree / "checkpoints" / "mobilevit_xxs", EVIL, resolutions=EVIL)
    path = tree / "checkpoints" / "mobilevit_xxs" / "metrics.json"
    change(path, printed=EVIL, hardware=EVIL, model=EVIL)
    change(tree / "results" / "benchmarks" / "train.json", model=EVIL, timm=EVIL)
    run("plots.py", *flags(tree, "--readme"))
    run("plots.py", *flags(tree, "--check"))
    for name in PAGES:
        lines = (tree / name).read_text().splitlines()
        for before, line in zip(lines, lines[1:]):
            if before.startswith("| "):  # as many cells in every line of a table
                bars = [text.replace("\\|", "").count("|") for text in (before, line)]
                assert not line.startswith("| ") or bars[0] == bars[1], line
        assert sum(line.startswith("```") for line in lines) % 2 == 0
    commands = (tree / "docs" / "training.md").read_text().partition("begin:commands")[2]
    assert commands.count("```bash") == commands.count("\n```\n") == 2


def test_missing_and_stray_markers_are_named():
    table = {"results": "table"}
    full = "<!-- begin:results -->\nold\n<!-- end:results -->"
    assert filled_page(full, table, "a.md") == full.replace("old", "table")
    twice, stray = full + "\n" + full, full + "\n<!-- begin:other -->"
    backwards = "<!-- end:results -->\n<!-- begin:results -->\n"
    for text in ("no markers", twice, stray, backwards, full.replace("\n", " ")):
        with pytest.raises(BadInput, match="a.md .*results"):
            filled_page(text, table, "a.md")


ROW, BENCH = "results/mobilevit_xxs/fp16@published.json", "results/benchmarks/train.json"
RUN = "checkpoints/mobilevit_xxs"


def without(name):
    def damage(path):
        content = json.loads(path.read_text())
        del content[name]
        write_json(path, content)

    return damage


def folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "name, damage, says",
    [
        (ROW, lambda path: path.write_text("{"), "cannot read"),
        (ROW, lambda path: path.write_text("[" * 10_000 + "]" * 10_000), "cannot read"),
        (ROW, folder, "cannot read"),
        (ROW, without("kind"), "lacks kind"),
        (ROW, lambda path: change(path, cpu="\ud800"), "should be text"),
        (ROW, lambda path: change(path, predictions=[0]), "predictions should be 10000"),
        (ROW, lambda path: change(path, score={"accuracy_pct": float("nan")}), "NaN is no number"),
        (ROW, lambda path: change(path, size_bytes="1"), "size_bytes is '1'"),
        (BENCH, without("ratio"), "lacks ratio"),
        (BENCH, without("images_per_s"), "lacks images_per_s"),
        (BENCH, lambda path: change(path, ratio={"unheard of": 1.0}), "lacks unheard of"),
        (BENCH, lambda path: change(path, images_per_s={"ours": 0}), "ours is 0"),
        (BENCH.replace("train", "engines-mobilevit_xxs"), without("recipes"), "lacks recipes"),
        (
            BENCH.replace("train", "engines-mobilevit_xxs"),
            lambda path: change(path, engine_versions={}),
            "engine_versions has no",
        ),
        (BENCH.replace("train", "profile-mobilevit_xxs-vnni"), without("ms"), "lacks ms"),
        (f"{RUN}/log.csv", lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot read"),
        (f"{RUN}/log.csv", lambda path: path.write_text("epoch\n1\n"), "lacks img_size"),
        (f"{RUN}/log.csv", lambda path: path.write_text("epoch\n"), "has no epoch"),
        (f"{RUN}/log.csv", folder, "cannot read"),
        (f"{RUN}/metrics.json", without("parameters"), "lacks parameters"),
        (f"{RUN}/metrics.json", without("test_accuracy_pct"), "lacks test_accuracy_pct"),
        (
            f"{RUN}/metrics.json",
            without("val_accuracy_pct"),
            "lacks val_accuracy_pct or val_map50_pct or val_miou_pct",
        ),
        ("docs/speed.md", lambda path: path.unlink(), "cannot read"),
        ("docs/speed.md", lambda path: path.write_bytes(b"\xff"), "cannot read"),
        ("docs/speed.md", lambda path: path.write_text("no markers"), "marker"),
    ],
)
def test_damaged_files_are_named_in_one_line(tree, name, damage, says):
    damage(tree / name)
    with pytest.raises(BadInput, match=says):
        filled_pages(load(tree), tree)


def test_a_run_is_read_by_its_metric_whatever_its_task_is_called(tree):
    folder = tree / RUN
    metrics = json.loads((folder / "metrics.json").read_text()) | {"task": "faces"}
    without("val_accuracy_pct")(folder / "metrics.json")
    change(folder / "metrics.json", task="faces", val_map50_pct=80.0)
    assert not classifies(read_metrics(folder))
    write_json(folder / "metrics.json", metrics)
    assert classifies(read_metrics(folder))


def test_damaged_files_end_the_command_with_2(tree):
    fails_with_one_line("plots.py", "--results", tree / "absent", says="run quantize.py first")
    fails_with_one_line("plots.py", *flags(tree, "--check"), "--pages", tree / "absent",
                        says="cannot read")  # fmt: skip
    (tree / ROW).write_text("[" * 10_000)
    fails_with_one_line("plots.py", *flags(tree), says="cannot read")
