"""The campaign: a few inputs of each kind, two kills, and whether it would notice a fault."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from conftest import run

from lab.bench import kills
from lab.bench.abuse import KINDS, fault_of
from lab.bench.forked import Outcome, forked, library
from lab.bench.malformed import Input, changed, places, wrong_values
from lab.bench.malformed_text import BREAKING, structure
from lab.cli import BadInput


def test_some_inputs_of_every_kind_and_two_kills(tmp_path):
    n = len(KINDS) + 8
    out, _ = run(
        *("abuse", "--inputs", n, "--kills", 2, "--output", tmp_path), module=("-m", "lab.bench")
    )
    found = json.loads((tmp_path / "abuse.json").read_text())
    assert found["faults"] == [] and "FAULT" not in out
    counts = {kind: count["inputs"] for kind, count in found["kinds"].items()}
    assert counts.pop("kills of training") == counts.pop("kills of quantize") == 1
    assert sum(counts.values()) == n and set(counts.values()) == {1, 2}
    assert f"| together | {n + 2} | 0 |" in out


INPUT = Input("kind", "name", lambda folder: None)
LINE = "train.py: error: no\n"


@pytest.mark.parametrize(
    "outcome, says",
    [
        (Outcome(2, "", LINE), None),
        (Outcome(0, "fine", ""), "exit code 0"),
        (Outcome(1, "", "Traceback\n  File\nValueError: no\n"), "exit code 1, ValueError: no"),
        (Outcome(2, "", "Warning: old\n" + LINE), "2 lines"),
        (Outcome(2, "", "x" * 5000), "5000 characters"),
        (Outcome(2, "", ""), "0 lines"),
        (Outcome(-11, "", ""), "exit code -11"),
        (Outcome("hangs", "", ""), "hangs"),
    ],
)
def test_an_input_must_end_in_one_line(outcome, says, tmp_path):
    fault = fault_of(INPUT, outcome, tmp_path)
    assert fault is None if says is None else says in fault


@pytest.mark.parametrize("name", ["out/best.pth", "tree/.writing-abc.tmp/row.json"])
def test_an_input_must_leave_nothing(name, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    assert fault_of(INPUT, Outcome(2, "", LINE), tmp_path).startswith("leaves")


def refused():
    raise BadInput("no")


@pytest.mark.parametrize(
    "function, code",
    [
        (lambda: print("done"), 0),
        (library(refused), 2),
        (lambda: 1 / 0, 1),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
    ],
)
def test_a_forked_function_ends_as_a_process_does(function, code, tmp_path):
    outcome = forked(function, tmp_path)
    assert outcome.code == code
    assert (outcome.out == "done\n") == (code == 0)
    assert ("ZeroDivisionError" in outcome.err) == (code == 1)


@pytest.mark.parametrize("place", kills.PLACES[:-1])
def test_a_kill_comes_at_its_place(place, tmp_path):
    def work():
        for i in range(3):
            new = tmp_path / f"{i}.new"
            torch.save({}, os.devnull)
            new.write_bytes(b"1234")
            os.replace(new, tmp_path / f"{i}.done")

    assert forked(kills.killed(work, place, 2), tmp_path).code == -signal.SIGKILL
    done = sorted(path.name for path in tmp_path.glob("*.done"))
    assert done == (["0.done", "1.done"] if place == "after a rename" else ["0.done"])
    size = {"before a rename": 4, "inside a write": 2}.get(place)
    assert [path.stat().st_size for path in tmp_path.glob("1.new")] == ([size] if size else [])


def test_every_kill_has_its_place():
    drawn = kills.journeys(60, 0)
    assert sum(len(at) for _, at in drawn) == 60
    assert {place for _, at in drawn for place, _ in at} == set(kills.PLACES)
    assert drawn == kills.journeys(60, 0) != kills.journeys(60, 1)


def test_runs_that_differ_are_noticed(checkpoint, tmp_path):
    run_folder = checkpoint.parent
    for name in ("best.pth", "last.pth", "log.csv", "metrics.json"):
        (tmp_path / name).write_bytes((run_folder / name).read_bytes())
    assert kills.differences(run_folder, tmp_path) == []
    last = torch.load(tmp_path / "last.pth", weights_only=True)
    moment = last["optimizer"]["state"][5]["exp_avg"]
    moment.flatten()[3] += 1e-3
    torch.save(last, tmp_path / "last.pth")
    lines = (tmp_path / "log.csv").read_text().splitlines()
    (tmp_path / "log.csv").write_text("\n".join(lines[:-1]))
    weights, log = kills.differences(run_folder, tmp_path)
    assert "last.pth differs in 1 values" in weights and "exp_avg" in weights
    assert log.startswith("log.csv has 1 lines instead of 2")
    (tmp_path / "best.pth").write_bytes((run_folder / "best.pth").read_bytes()[:1000])
    assert kills.not_whole("training", tmp_path)[0].startswith("not whole")


def test_values_are_spoilt_in_copies():
    good = {"a": {"b": [1, 2]}, "c": "text"}
    assert list(places(good)) == [("a",), ("a", "b"), ("a", "b", 0), ("c",)]
    assert changed(good, ("a", "b", 0), None) == {"a": {"b": [None, 2]}, "c": "text"}
    assert changed(good, ("c",), "(missing)") == {"a": {"b": [1, 2]}}
    assert good == {"a": {"b": [1, 2]}, "c": "text"}
    for value in (3, 0.5, "text", True, {}, [], None):
        assert not any(
            type(wrong) is type(value) and wrong == value for wrong in wrong_values(value)
        )


def test_the_same_seed_draws_the_same(tmp_path):
    options = KINDS[-2]
    names = [[i.name for i in options(random.Random(seed), Path(tmp_path))] for seed in (1, 1, 2)]
    assert names[0] == names[1] != names[2] and len(names[0]) > 60


def test_a_page_that_text_breaks_has_another_form():
    page = "# A\n<!-- begin:x -->\n| a |\n<!-- end:x -->\n"
    assert structure(page) == ["# A", "begin:x", "end:x"]
    assert structure(page.replace("| a |", "| b |")) == structure(page)
    assert structure(page.replace("a", BREAKING)) != structure(page)
