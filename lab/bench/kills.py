"""Commands killed at bad moments and started again: what they leave must be whole.

A journey is one training run, or one call for several rows, that is killed a few times at places
drawn at random, each time goes on, and in the end must have what an undisturbed one has.
"""

import csv
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lab.bench.forked import HANGS, Outcome, command, forked
from lab.bench.malformed import SMALL
from lab.cli import BadInput
from lab.files import PREFIX, read_json
from lab.models.checkpoint import read_tensors
from lab.report.rows import read_row

KILLS_A_JOURNEY = 4
PLACES = ("before a rename", "after a rename", "inside a write", "after torch.save", "at random")
RECIPES = ("fp32", "fp16", "w4-nearest")
TIMES = ("images_per_s", "peak_memory_mb", "seconds")  # columns of a log that differ between runs


def quantize(stand: Path) -> tuple:
    """Return the command for several rows of the run in `stand`."""
    few = ("--test-images", "100", "--latency-runs", "2", "--workers", "1")
    return "quantize.py", "--checkpoint", stand / "run" / "best.pth", "--recipes", *RECIPES, *few


def killed(run: Callable[[], None], place: str, n: int) -> Callable[[], None]:
    """Return `run` so that it kills itself when it comes to `place` for the n-th time.

    `place`: one of PLACES. One to be killed "at random" does not kill itself: `forked` ends it.
    """
    calls = 0

    def die_at_last(*_):
        nonlocal calls
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner, name, before=lambda *_: None, after=lambda *_: None):
        original = getattr(owner, name)

        def replacement(*args, **kwargs):
            before(*args)
            result = original(*args, **kwargs)
            after(*args)
            return result

        setattr(owner, name, replacement)

    def half(path, content, *_):  # written, as far as a killed process would have come
        with open(path, "wb") as file:
            data = content.encode() if isinstance(content, str) else bytes(content)
            file.write(data[: len(data) // 2])
        die_at_last()

    def patched():
        if place == "before a rename":
            around(os, "replace", before=die_at_last)
        elif place == "after a rename":
            around(os, "replace", after=die_at_last)
        elif place == "inside a write":
            around(Path, "write_bytes", before=half)
            around(Path, "write_text", before=half)
        elif place == "after torch.save":
            around(torch, "save", after=die_at_last)
        run()

    return patched


def journeys(kills: int, seed: int) -> list[tuple[str, list]]:
    """Return [(kind, [(place, n), ...]), ...] for `kills` kills in all.

    Four in five are of training runs. `n`: which time at the place; for one at random, a share of
    the usual duration in percent.
    """
    rng, drawn = random.Random(f"{seed}, kills"), []
    n_rows = -(-kills // 5)
    for kind, total, most in (("training", kills - n_rows, 7), ("quantize", n_rows, 2)):
        at = [PLACES[i % len(PLACES)] for i in range(total)]
        rng.shuffle(at)
        places = [(p, rng.randint(5, 95) if p == PLACES[-1] else rng.randint(1, most)) for p in at]
        size = KILLS_A_JOURNEY
        drawn += [(kind, places[i : i + size]) for i in range(0, total, size)]
    return drawn


def journey(kind: str, places: list, folder: Path, stand: Path, seconds: float) -> list[str]:
    """Kill a command at `places`, let it end, and say what is wrong then.

    `stand` has what an undisturbed one made, in `seconds`.
    """
    output, faults = folder / "output", []
    argv = ("train.py", *SMALL) if kind == "training" else quantize(stand)
    argv = (*argv, "--output", output)
    for place, n in places:
        code = 0
        while code == 0:
            run = command((*argv, *_resume(kind, output)))
            after_s = seconds * n / 100 if place == PLACES[-1] else None
            outcome = forked(killed(run, place, n), folder, kill_after_s=after_s)
            code = outcome.code
            if code == 0:  # it was done before its time came: begin anew, for an earlier one
                shutil.rmtree(output)
                n = 1
        if code != -signal.SIGKILL:
            faults.append(f"goes on, {place}: {described(outcome)}")
        faults += not_whole(kind, output)
    for left in output.rglob(f"{PREFIX}*"):  # what a process that just began has is left alone
        os.utime(left, (0, time.time() - 60))
    outcome = forked(command((*argv, *_resume(kind, output))), folder)
    if outcome.code != 0:
        return [*faults, f"to its end: {described(outcome)}"]
    faults += not_whole(kind, output)
    faults += [f"{path.name} is left" for path in output.rglob(f"{PREFIX}*")]
    return faults + (differences(stand / "run", output) if kind == "training" else missing(output))


def _resume(kind: str, output: Path) -> tuple[str, ...]:
    begun = kind == "training" and (output / "last.pth").exists()
    return ("--resume",) if begun else ()


def described(outcome: Outcome) -> str:
    """Return a line that describes an end that should have been another."""
    last = (outcome.err.strip().splitlines() or ["nothing on stderr"])[-1]
    if outcome.code == HANGS:
        return "hangs"
    return f"exit code {outcome.code}, {last[:200]}"


def not_whole(kind: str, output: Path) -> list[str]:
    """Return a line for each file under `output` that can't be read to its end."""
    faults = []
    readers = {".pth": read_tensors, ".json": read_json if kind == "training" else read_row}
    for path in output.rglob("*"):
        if path.suffix in readers and not path.parent.name.startswith(PREFIX):
            try:
                readers[path.suffix](path)
            except BadInput as error:
                faults.append(f"not whole: {error}")
    return faults


def missing(output: Path) -> list[str]:
    rows = {path.name.split("-32@")[0] for path in output.rglob("*.json")}
    return [f"no row of {name}" for name in RECIPES if name not in rows]


def differences(undisturbed: Path, output: Path) -> list[str]:
    """Return a line for each file of a run that differs from the undisturbed run's.

    Times and the commit may differ.
    """
    faults = []
    for name in ("best.pth", "last.pth"):
        ours, theirs = (flat(read_tensors(folder / name)) for folder in (undisturbed, output))
        apart = [k for k in ours.keys() | theirs.keys() if not same(ours.get(k), theirs.get(k))]
        apart = [k for k in apart if k[0] not in ("seconds", "commit") and k[-1] not in TIMES]
        if apart:
            faults.append(f"{name} differs in {len(apart)} values, first {apart[0]}")
    logs = []
    for folder in (undisturbed, output):
        with open(folder / "log.csv", newline="") as file:
            lines = list(csv.DictReader(file))
        logs.append([{k: v for k, v in line.items() if k not in TIMES} for line in lines])
    if logs[0] != logs[1]:
        faults.append(f"log.csv has {len(logs[1])} lines instead of {len(logs[0])}, or others")
    metrics = [read_json(folder / "metrics.json") for folder in (undisturbed, output)]
    if metrics[0]["printed"] != metrics[1]["printed"]:
        faults.append("metrics.json has another result")
    return faults


def flat(value, path=()) -> dict[tuple, object]:
    """Return {path: value} of everything in nested dicts and lists."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {p: v for key, part in items for p, v in flat(part, (*path, key)).items()}
    return {path: value}


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b
