"""A campaign of malformed inputs and kills through the real commands and readers.

Expected of every malformed input: exit code 2, one line on stderr, nothing written to the output.
Some change what nothing may depend on; these may also pass. Expected of every kill: what it leaves
is whole, and going on gives what an undisturbed run gives.
"""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

import ptq
from lab import machine
from lab.bench import kills, malformed_calls, malformed_tensors, malformed_text
from lab.bench.forked import HANGS, ROOT, TIMEOUT_S, Outcome, command, forked, script
from lab.bench.malformed import SMALL, Input
from lab.cli import SIGNALS, BadInput
from lab.files import PREFIX
from lab.models import build
from lab.models.checkpoint import model_from_checkpoint
from lab.report.pages import fill_pages
from lab.report.results import load_results
from lab.report.studies import abuse_table
from lab.tasks import TASKS
from ptq import packing

KINDS = (
    malformed_tensors.checkpoint_fields,
    malformed_tensors.checkpoint_tensors,
    malformed_tensors.archives,
    malformed_text.runs_to_resume,
    malformed_text.rows_to_repeat,
    *(partial(malformed_text.tree_files, kind) for kind in malformed_text.JSON_KINDS),
    malformed_text.logs,
    malformed_text.text_for_pages,
    malformed_tensors.packed,
    malformed_tensors.foreign,
    malformed_tensors.refused_by_methods,
    malformed_calls.photos,
    malformed_calls.options,
    malformed_calls.surroundings,
)
MAX_LINE = 1000  # characters
MAX_OF_KIND = 600  # inputs
N_IMAGES = 300  # to train on, and to test on
SHIPPED = (  # files that the pages of the campaign are made of
    *(f"results/mobilevit_xxs/{row}.json" for row in ("fp32@torch-eager", "w8a8@openvino")),
    *(f"results/mobilevit_xxs/per-layer/{r}.json" for r in ("w8a8-early", "int8-fx")),
    *(malformed_text.FILES["benchmark files"]),
    *(f"checkpoints/mobilevit_xxs/{f}" for f in ("best.pth", "log.csv", "metrics.json")),
    *("checkpoints/mobilevit_xxs/config.json", "checkpoints/README.md", "README.md"),
)


def abuse(n_inputs: int, n_kills: int, seed: int) -> dict:
    """Try so many inputs, drawn with `seed`, and kills; print each fault as it is found.

    Returns {"kinds": {kind: {"inputs", "faults"}}, "faults": [a line for each], "seed", "wall_s"}.
    """
    if not hasattr(os, "fork"):
        raise BadInput("this system can't fork processes, so the campaign can't run here")
    began = time.monotonic()
    torch.set_num_threads(1)  # a forked process can't use the threads of its parent
    for name in ("train.py", "quantize.py", "plots.py"):
        script(name)
    machine.code()
    be_small()
    with tempfile.TemporaryDirectory() as folder:
        stand = Path(folder, "stand")
        seconds = prepare(stand)
        tasks = [partial(_tried, given) for given in drawn_inputs(n_inputs, seed, stand)]
        for kind, at in kills.journeys(n_kills, seed):
            tasks.append(partial(_journeyed, kind, at, stand, seconds[kind]))
        with get_context("fork").Pool(os.cpu_count(), _receive, (tasks,)) as pool:
            kinds, found = {}, []
            for kind, n, faults in pool.imap(_done, range(len(tasks))):
                counts = kinds.setdefault(kind, {"inputs": 0, "faults": 0})
                counts["inputs"] += n
                counts["faults"] += bool(faults)
                found += [f"{kind}: {fault}" for fault in faults]
                print("".join(f"FAULT {kind}: {fault}\n" for fault in faults), end="", flush=True)
    print(abuse_table([{"kinds": kinds}]), flush=True)
    return {
        "kinds": kinds,
        "faults": found,
        "seed": seed,
        "wall_s": time.monotonic() - began,
    }


def drawn_inputs(n: int, seed: int, stand: Path) -> list[Input]:
    """Return `n` inputs, all kinds taking turns; the same for the same seed."""
    kinds = []
    for i, make in enumerate(KINDS):
        rng = random.Random(f"{seed}, {i}")
        known = list(itertools.islice(make(rng, stand), MAX_OF_KIND))  # of some there is no end
        kinds.append(rng.sample(known, len(known)))
    turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds))
    return list(itertools.islice(filter(None, turns), n))


def be_small() -> None:
    """Give the synthetic task few images, and let training save after every step, from now on.

    This holds for this process and its children.
    """
    task = TASKS["synthetic"]
    whole = task.load
    task.load = lambda data_dir, train: whole(data_dir, train)[:N_IMAGES]
    script("train.py").SAVE_EVERY_S = 0


def prepare(stand: Path) -> dict[str, float]:
    """Fill `stand` with the intact files that are to be spoilt.

    Returns how many seconds each command for it takes, {"training", "quantize"}.
    """
    stand.mkdir()
    seconds = {}
    for kind, argv in (
        ("training", ("train.py", *SMALL, "--output", stand / "run")),
        ("quantize", (*kills.quantize(stand), "--output", stand / "rows")),
    ):
        began = time.monotonic()
        _require(forked(command(argv), stand))
        seconds[kind] = time.monotonic() - began
    _require(forked(lambda: _write_weights(stand), stand))
    _require(forked(lambda: _write_tree(stand / "tree"), stand))
    return seconds


def _require(outcome: Outcome) -> None:
    if outcome.code != 0:
        raise BadInput(f"the campaign can't begin: {kills.described(outcome)}")


def _write_weights(stand: Path) -> None:
    """Write a packed file, weights of a network with two classes, and photos of these."""
    model, _ = model_from_checkpoint(stand / "run" / "best.pth")
    recipe = ptq.recipe("w8a8", model)
    batches = [(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), None)]
    packing.save(ptq.quantize(model, recipe, batches), recipe, stand / "packed.safetensors")
    two = {k: v.contiguous() for k, v in build("mobilevit_xxs", num_classes=2).state_dict().items()}
    save_file(two, stand / "two-classes.safetensors")
    for name, colour in (("cat", "red"), ("dog", "blue")):
        for i in range(6):
            path = stand / "photos" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + i, 20), colour).save(path)


def _write_tree(tree: Path) -> None:
    """Write a part of the shipped results, and the pages that follow from it."""
    docs = [str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")]
    for name in (*SHIPPED, *docs):
        is_page = name.endswith(".md")
        target = tree / ("pages" if is_page else "") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    fill_pages(load_results(tree / "results", tree / "checkpoints"), tree / "pages")


_tasks: list = []  # forked processes have them: functions can't be sent


def _receive(tasks) -> None:
    _tasks[:] = tasks
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _done(i: int) -> tuple[str, int, list[str]]:
    """Do a task in a folder of its own; return its kind, how many inputs it was, and its faults."""
    with tempfile.TemporaryDirectory() as folder:
        return _tasks[i](Path(folder))


def _journeyed(kind, at, stand, seconds, folder) -> tuple[str, int, list[str]]:
    faults = kills.journey(kind, at, folder, stand, seconds)
    where = ", ".join(f"{place} {n}" for place, n in at)
    return f"kills of {kind}", len(at), [f"{where}: {fault}" for fault in faults]


def _tried(given: Input, folder: Path) -> tuple[str, int, list[str]]:
    fault = fault_of(given, outcome_of(given, folder), folder)
    return given.kind, 1, [f"{given.name}: {fault}"] if fault else []


def outcome_of(given: Input, folder: Path) -> Outcome:
    what = given.make(folder)
    if callable(what):
        return forked(what, folder, given.env)
    words = [str(folder / "out") if word == "OUT" else str(word) for word in what]
    if not given.own_process:
        return forked(command(words), folder, given.env)
    env = os.environ | {"OMP_NUM_THREADS": "1"} | dict(given.env)
    run = [sys.executable, ROOT / words[0], *words[1:]]
    try:
        done = subprocess.run(run, capture_output=True, text=True, env=env, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Outcome(HANGS, "", "")
    return Outcome(done.returncode, done.stdout, done.stderr)


def fault_of(given: Input, outcome: Outcome, folder: Path) -> str | None:
    """Say what is wrong with the way in which a malformed input ended; None if nothing is."""
    if outcome.code == 0 and given.may_pass:
        return None
    if outcome.code != 2:
        return kills.described(outcome)
    lines, n = len(outcome.err.splitlines()), len(outcome.err)
    if lines != 1 or n > MAX_LINE:
        return f"{lines} lines of {n} characters: {outcome.err[:200]!r}"
    left = [path.name for path in folder.rglob(f"{PREFIX}*")]
    left += [path.name for path in (folder / "out").rglob("*") if path.is_file()]
    return f"leaves {', '.join(left)}" if left else None
