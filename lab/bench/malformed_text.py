"""Malformed result files, training logs, runs to resume, and text that would break pages.

Every kind is a generator (random source, stand) -> Inputs; `stand` is the folder of intact files.
"""

import itertools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from lab.bench.forked import library
from lab.bench.malformed import (
    HERE,
    MISSING,
    OUT,
    SMALL,
    SPOILT,
    Input,
    at,
    changed,
    given,
    places,
    shown,
    spoilt_file,
    wrong_values,
)
from lab.files import read_json
from lab.models.checkpoint import read_tensors
from lab.report.pages import MARKER, filled_pages
from lab.report.results import load_results

BREAKING = "a <!-- end:results -->\n```\n# b | c <!-- begin:x --> ` *d* [e](f) \x00 \x1b[31m"
FILES = {  # kind: files of the tree that `plots.py` reads
    "rows": ("results/mobilevit_xxs/w8a8@openvino.json",),
    "reports per layer": ("results/mobilevit_xxs/per-layer/w8a8-early.json",),
    "benchmark files": tuple(
        f"results/benchmarks/{name}.json"
        for name in ("engines-mobilevit_xxs", "profile-mobilevit_xxs-vnni", "train", "loader")
    ),
    "training logs": ("checkpoints/mobilevit_xxs/log.csv",),
    "metrics and configs": tuple(
        f"checkpoints/mobilevit_xxs/{name}" for name in ("metrics.json", "config.json")
    ),
}


# Fields of files with entries of any names.
OPEN = {"noise", "weights", "inputs", "activations", "latency_ms", "ms", "images_per_s", "ratio",
        "loader_images_per_s", "steps", "products"}  # fmt: skip


def dumped(value) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 10_000


def _tree(stand: Path, folder: Path) -> Path:
    """A copy of the tree that plots.py reads; weights and pages, which stay so, by link."""
    tree = folder / "tree"
    keep = shutil.ignore_patterns("*.pth", "pages")
    shutil.copytree(stand / "tree", tree, ignore=keep)
    for weights in (stand / "tree" / "checkpoints").rglob("*.pth"):
        (tree / weights.relative_to(stand / "tree")).symlink_to(weights)
    (tree / "pages").symlink_to(stand / "tree" / "pages")
    return tree


def _checked(tree: Path) -> list:
    """The command that says whether the pages agree with a tree: 1 if a table has changed."""
    of = [f"--{name}={tree / name}" for name in ("results", "checkpoints", "pages")]
    return ["plots.py", "--check", *of]


def _of_tree(kind: str):
    def inputs(rng: random.Random, stand: Path) -> Iterator[Input]:
        for file, how in itertools.product(FILES[kind], SPOILT):

            def spoil(folder, file=file, how=how):
                tree = _tree(stand, folder)
                spoilt_file(stand / "tree" / file, how, tree / file)
                return _checked(tree)

            # What is not there need not be, but for the other files of a run with metrics.
            if how != "nothing at all" or file.endswith(("config.json", "log.csv")):
                yield Input(kind, f"{Path(file).name} is {how}", spoil)
        yield from _fields(kind, rng, stand)

    return inputs


def _fields(kind, rng, stand) -> Iterator[Input]:
    drawn = []
    for file in FILES[kind]:
        if file.endswith(".csv"):
            return
        good = read_json(stand / "tree" / file)
        of_file = [(file, p, wrong) for p in places(good) for wrong in wrong_values(at(good, p))]
        drawn += [(f, p, wrong) for f, p, wrong in of_file if not _another(p, wrong)]
    for file, path, wrong in rng.sample(drawn, len(drawn)):

        def spoil(folder, file=file, path=path, wrong=wrong):
            tree = _tree(stand, folder)
            good = read_json(stand / "tree" / file)
            (tree / file).write_text(dumped(changed(good, path, wrong)))
            return _checked(tree)

        name = f"{Path(file).name}: {'.'.join(map(str, path))} is {shown(wrong)}"
        yield Input(kind, name, spoil, may_pass=True)


def _another(path: tuple, wrong) -> bool:
    """Whether such a change makes another good file: of another recipe, or of fewer entries."""
    in_recipe = "recipe" in path or "recipes" in path
    if in_recipe and ("layers" in path[:-1] or path[-1] in ("calibration_batch", "units", "type")):
        return True
    if not isinstance(wrong, str) or wrong != MISSING:
        return False
    return not OPEN.isdisjoint(path[-3:-1]) or path[-1] == "optimizer"


def logs(rng: random.Random, stand: Path) -> Iterator[Input]:
    kind = "training logs"
    yield from _of_tree(kind)(rng, stand)
    lines = (stand / "tree" / FILES[kind][0]).read_text().splitlines()
    columns = lines[0].split(",")
    cells = [
        (k, wrong) for k in columns for wrong in ("", "text", "nan", "inf", MISSING, '"', "1;2")
    ]
    for column, wrong in rng.sample(cells, len(cells)):

        def spoil(folder, column=column, wrong=wrong):
            k, tree = columns.index(column), _tree(stand, folder)
            values = [line.split(",") for line in lines]
            if wrong == MISSING:
                values = [line[:k] + line[k + 1 :] for line in values]
            else:
                values[-1][k] = wrong
            (tree / FILES[kind][0]).write_text("\n".join(map(",".join, values)) + "\n")
            return _checked(tree)

        # These two are in no table.
        unread = column in ("lr", "peak_memory_mb")
        yield Input(kind, f"{column} is {wrong or 'empty'}", spoil, may_pass=unread)


def structure(text: str) -> list[str]:
    """What gives a page its form: its markers, fences, headings, and whether tables are tables."""
    kept = []
    for line in text.splitlines():
        kept += [f"{edge}:{name}" for edge, name in MARKER.findall(line)]
        if line.startswith(("```", "#")):
            kept.append(line[:3])
    return kept


def text_for_pages(rng: random.Random, stand: Path) -> Iterator[Input]:
    """Text that would break or fill a page if it got there as it stands."""
    pages = stand / "tree" / "pages"
    drawn = []
    for file in itertools.chain.from_iterable(FILES.values()):
        if file.endswith(".json"):
            good = read_json(stand / "tree" / file)
            found = [p for p in places(good) if isinstance(at(good, p), str)]
            drawn += [(file, p) for p in found if p != ("task",)]  # of another task, it is left out
    for file, path in rng.sample(drawn, len(drawn)):

        def spoil(folder, file=file, path=path):
            tree = _tree(stand, folder)
            good = read_json(stand / "tree" / file)
            new = f"{at(good, path)} {BREAKING}"
            (tree / file).write_text(json.dumps(changed(good, path, new)))

            def compare():
                found = load_results(tree / "results", tree / "checkpoints")
                for page, (before, after) in filled_pages(found, pages).items():
                    assert structure(before) == structure(after), f"{page.name} has another form"

            return library(compare)

        name = f"{Path(file).name}: markers and fences in {'.'.join(map(str, path))}"
        yield Input("text for pages", name, spoil, may_pass=True)


def runs_to_resume(rng: random.Random, stand: Path) -> Iterator[Input]:
    kind = "runs to resume"
    state = read_tensors(stand / "run" / "last.pth")
    command = ["train.py", *SMALL, "--resume", "--output"]
    top = {k: v for k, v in state.items() if k not in ("model", "optimizer")}
    options = {("config", name) for name in state["config"]}
    drawn = [(p, w) for p in places(top) if p not in options for w in wrong_values(at(top, p))]
    drawn = [(p, w) for p, w in drawn if w is not None or p[0] != "scaler"]
    moment = ("optimizer", "state", 5)
    exp_avg = state["optimizer"]["state"][5]["exp_avg"]
    fixed = [
        ((*moment, "exp_avg"), torch.zeros(2)), ((*moment, "exp_avg"), exp_avg.long()),
        ((*moment, "exp_avg"), exp_avg * torch.nan), ((*moment, "exp_avg_sq"), MISSING),
        (moment, MISSING), (("optimizer", "state"), []), (("optimizer",), None), (("model",), {}),
        (("step",), 10**9), (("step",), -1), (("history",), [1]), (("model",), MISSING),
    ]  # fmt: skip
    for path, wrong in (*fixed, *rng.sample(drawn, len(drawn))):

        def spoil(folder, path=path, wrong=wrong):
            run = shutil.copytree(stand / "run", folder / "run")
            torch.save(changed(state, path, wrong), run / "last.pth")
            return [*command, run]

        name = f"last.pth: {'.'.join(map(str, path))} is {shown(wrong)}"
        yield Input(kind, name, spoil)
    best = read_tensors(stand / "run" / "best.pth")
    for key in ("epoch", "val_accuracy_pct", "test_accuracy_pct", "config", "state_dict"):
        for wrong in wrong_values(best[key]):

            def spoil(folder, key=key, wrong=wrong):
                run = shutil.copytree(stand / "run", folder / "run")
                spoilt = changed(best, (key,), wrong)
                if key != "test_accuracy_pct":
                    spoilt = spoilt | {"test_accuracy_pct": None}  # so that it is evaluated
                torch.save(spoilt, run / "best.pth")
                return [*command, run]

            fine = key == "test_accuracy_pct" and wrong is None
            yield Input(kind, f"best.pth: {key} is {shown(wrong)}", spoil, may_pass=fine)
    for name, how in itertools.product(("metrics.json", "last.pth", "best.pth"), SPOILT):

        def spoil(folder, name=name, how=how):
            run = shutil.copytree(stand / "run", folder / "run")
            spoilt_file(run / name, how, run / name)
            return [*command, run]

        yield Input(kind, f"{name} is {how}", spoil)


def rows_to_repeat(rng: random.Random, stand: Path) -> Iterator[Input]:
    """Rows that quantize.py is to measure again."""
    kind = "rows to measure again"
    path = next((stand / "rows").rglob("fp32*.json"))
    good = read_json(path)
    again = ["quantize.py", "--from", HERE, "--test-images", "20", "--workers", "1", *OUT]
    for how in SPOILT:

        def spoil(folder, how=how):
            spoilt_file(path, how, folder / "row.json")
            return given(again, folder / "row.json")

        yield Input(kind, f"is {how}", spoil)
    fixed = [(("engine",), "no engine"), (("task",), "../x"), (("img_size",), 10**9),
             (("img_size",), 1), (("seed",), 2**70), (("calibration_images",), 10**30),
             (("latency_runs",), 10**30), (("checkpoint",), "\0"), (("checkpoint",), "a" * 300),
             (("predictions",), [0]), (("predictions",), []), (("checkpoint_sha256",), "0" * 64),
             (("recipe", "name"), "w4"), (("model",), "../x"), (("n_images",), 10**9)]  # fmt: skip
    drawn = [(p, w) for p in places(good) for w in wrong_values(at(good, p))]
    for place, wrong in (*fixed, *rng.sample(drawn, len(drawn))):

        def spoil(folder, place=place, wrong=wrong):
            (folder / "row.json").write_text(dumped(changed(good, place, wrong)))
            return given(again, folder / "row.json")

        # Of a row that is repeated, not every field is looked at.
        name = f"{'.'.join(map(str, place))} is {shown(wrong)}"
        yield Input(kind, name, spoil, may_pass=True)


of_rows, of_reports, of_benchmarks, of_metrics = (
    _of_tree(kind) for kind in FILES if kind != "training logs"
)
