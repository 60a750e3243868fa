"""Malformed result files, training logs, runs to resume, and text that would break pages.

Every kind is a generator (random source, stand) -> Inputs; `stand` is the folder of intact files.
"""

import itertools
import random
import shutil
from collections.abc import Iterator
from functools import partial
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
    in_words,
    of_file,
    places,
    spoil,
    write_changed,
    wrong_fields,
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
JSON_KINDS = [kind for kind in FILES if kind != "training logs"]
# Fields whose entries have names of any kind: with one entry less, a file is still a good one.
OPEN = {"noise", "weights", "inputs", "activations", "latency_ms", "ms", "images_per_s", "ratio",
        "loader_images_per_s", "steps", "products"}  # fmt: skip

# Files that plots.py reads


def _of_tree(kind, name, stand: Path, file: str, write, run=None, **more) -> Input:
    """Return an input of the tree that plots.py reads, with one file that `write(path)` spoils.

    `run(tree)` is what is then to be run: by default the command that says whether pages agree
    with the tree, 1 if a table has changed. Weights and pages, which stay so, are links.
    """

    def make(folder):
        tree, intact = folder / "tree", stand / "tree"
        shutil.copytree(intact, tree, ignore=shutil.ignore_patterns("*.pth", "pages"))
        for path in (*intact.glob("checkpoints/**/*.pth"), intact / "pages"):
            (tree / path.relative_to(intact)).symlink_to(path)
        write(tree / file)
        if run:
            return run(tree)
        folders = [f"--{name}={tree / name}" for name in ("results", "checkpoints", "pages")]
        return ["plots.py", "--check", *folders]

    return Input(kind, name, make, **more)


def tree_files(kind: str, rng: random.Random, stand: Path) -> Iterator[Input]:
    """Yield files of FILES that are spoilt as a whole, and JSON files with one wrong field."""
    for file, how in itertools.product(FILES[kind], SPOILT):
        # plots.py does without a missing file, but a run with metrics must have the others.
        if how != "nothing at all" or file.endswith(("config.json", "log.csv")):
            name = f"{Path(file).name} is {how}"
            yield _of_tree(kind, name, stand, file, partial(spoil, stand / "tree" / file, how))
    drawn = []
    for file in FILES[kind]:
        if file.endswith(".json"):
            good = read_json(stand / "tree" / file)
            changes = [change for change in wrong_fields(good) if not _another(*change)]
            drawn += [(file, good, *change) for change in changes]
    for file, *change in rng.sample(drawn, len(drawn)):
        name = f"{Path(file).name}: {in_words(*change[1:])}"
        write = partial(write_changed, *change)
        yield _of_tree(kind, name, stand, file, write, may_pass=True)


def _another(path: tuple, wrong) -> bool:
    """Say whether such a change makes another good file: of another recipe, or of fewer entries."""
    in_recipe = "recipe" in path or "recipes" in path
    if in_recipe and ("layers" in path[:-1] or path[-1] in ("calibration_batch", "units", "type")):
        return True
    if not isinstance(wrong, str) or wrong != MISSING:
        return False
    return not OPEN.isdisjoint(path[-3:-1]) or path[-1] == "optimizer"


def logs(rng: random.Random, stand: Path) -> Iterator[Input]:
    kind = "training logs"
    (file,) = FILES[kind]
    yield from tree_files(kind, rng, stand)
    lines = [line.split(",") for line in (stand / "tree" / file).read_text().splitlines()]

    def write(k, wrong, path):
        *others, last = lines
        if wrong == MISSING:
            spoilt = [line[:k] + line[k + 1 :] for line in lines]
        else:
            spoilt = [*others, [*last[:k], wrong, *last[k + 1 :]]]
        path.write_text("\n".join(map(",".join, spoilt)) + "\n")

    wrongs = ("", "text", "nan", "inf", MISSING, '"', "1;2")
    cells = [(k, column, wrong) for k, column in enumerate(lines[0]) for wrong in wrongs]
    for k, column, wrong in rng.sample(cells, len(cells)):
        name, unread = f"{column} is {wrong or 'empty'}", column in ("lr", "peak_memory_mb")
        yield _of_tree(kind, name, stand, file, partial(write, k, wrong), may_pass=unread)


def structure(text: str) -> list[str]:
    """Return what gives a page its form: its markers, and how its fences and headings begin."""
    kept = []
    for line in text.splitlines():
        kept += [f"{edge}:{name}" for edge, name in MARKER.findall(line)]
        if line.startswith(("```", "#")):
            kept.append(line[:3])
    return kept


def text_for_pages(rng: random.Random, stand: Path) -> Iterator[Input]:
    """Yield text that would break or fill a page if it got there as it stands."""

    def compare(tree):
        found = load_results(tree / "results", tree / "checkpoints")
        for page, (before, after) in filled_pages(found, stand / "tree" / "pages").items():
            assert structure(before) == structure(after), f"{page.name} has another form"

    drawn = []
    for file in itertools.chain.from_iterable(FILES.values()):
        if file.endswith(".json"):
            good = read_json(stand / "tree" / file)
            found = [p for p in places(good) if isinstance(at(good, p), str)]
            # Of another task, a file is left out.
            drawn += [(file, good, p) for p in found if p != ("task",)]
    for file, good, place in rng.sample(drawn, len(drawn)):
        name = f"{Path(file).name}: markers and fences in {'.'.join(map(str, place))}"
        write = partial(write_changed, good, place, f"{at(good, place)} {BREAKING}")
        run = lambda tree: library(partial(compare, tree))  # noqa: E731
        yield _of_tree("text for pages", name, stand, file, write, run, may_pass=True)


# Files that commands go on from


def runs_to_resume(rng: random.Random, stand: Path) -> Iterator[Input]:
    def resuming(name, file, write, **more):
        def make(folder):
            run = shutil.copytree(stand / "run", folder / "run")
            write(run / file)
            return ["train.py", *SMALL, "--resume", "--output", run]

        return Input("runs to resume", f"{file}{name}", make, **more)

    state = read_tensors(stand / "run" / "last.pth")
    top = {k: v for k, v in state.items() if k not in ("model", "optimizer")}
    options = {("config", name) for name in state["config"]}
    drawn = [
        (place, wrong)
        for place, wrong in wrong_fields(top)
        if place not in options and not (place[0] == "scaler" and wrong is None)
    ]
    moment = ("optimizer", "state", 5)
    exp_avg = state["optimizer"]["state"][5]["exp_avg"]
    fixed = [
        ((*moment, "exp_avg"), torch.zeros(2)), ((*moment, "exp_avg"), exp_avg.long()),
        ((*moment, "exp_avg"), exp_avg * torch.nan), ((*moment, "exp_avg_sq"), MISSING),
        (moment, MISSING), (("optimizer", "state"), []), (("optimizer",), None), (("model",), {}),
        (("step",), 10**9), (("step",), -1), (("history",), [1]), (("model",), MISSING),
    ]  # fmt: skip
    for change in (*fixed, *rng.sample(drawn, len(drawn))):
        write = partial(torch.save, changed(state, *change))
        yield resuming(f": {in_words(*change)}", "last.pth", write)
    best = read_tensors(stand / "run" / "best.pth")
    for key in ("epoch", "val_accuracy_pct", "test_accuracy_pct", "config", "state_dict"):
        for wrong in wrong_values(best[key]):
            spoilt = changed(best, (key,), wrong)
            if key != "test_accuracy_pct":
                spoilt = spoilt | {"test_accuracy_pct": None}  # so that it is evaluated
            fine = key == "test_accuracy_pct" and wrong is None
            name, write = f": {in_words((key,), wrong)}", partial(torch.save, spoilt)
            yield resuming(name, "best.pth", write, may_pass=fine)
    for file, how in itertools.product(("metrics.json", "last.pth", "best.pth"), SPOILT):
        yield resuming(f" is {how}", file, partial(spoil, stand / "run" / file, how))


def rows_to_repeat(rng: random.Random, stand: Path) -> Iterator[Input]:
    """Yield rows that quantize.py is to measure again."""
    path = next((stand / "rows").rglob("fp32*.json"))
    good = read_json(path)
    again = ("quantize.py", "--from", HERE, "--test-images", "20", "--workers", "1", *OUT)
    of_row = partial(of_file, "rows to measure again", run=again, file="row.json")
    for how in SPOILT:
        yield of_row(f"is {how}", partial(spoil, path, how))
    fixed = [(("engine",), "no engine"), (("task",), "../x"), (("img_size",), 10**9),
             (("img_size",), 1), (("seed",), 2**70), (("calibration_images",), 10**30),
             (("latency_runs",), 10**30), (("checkpoint",), "\0"), (("checkpoint",), "a" * 300),
             (("predictions",), [0]), (("predictions",), []), (("checkpoint_sha256",), "0" * 64),
             (("recipe", "name"), "w4"), (("model",), "../x"), (("n_images",), 10**9)]  # fmt: skip
    drawn = wrong_fields(good)
    for change in (*fixed, *rng.sample(drawn, len(drawn))):
        # Of a row that is repeated, not every field is looked at.
        yield of_row(in_words(*change), partial(write_changed, good, *change), may_pass=True)
