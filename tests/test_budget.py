"""A schedule that fits a time, checked by adding up what it takes."""

import math
import time
from types import SimpleNamespace

import pytest
from conftest import run
from torch import nn

from lab import cli
from lab.cli import BadInput
from lab.training import budget
from lab.training.budget import fitting, seconds_each, written
from lab.training.distributed import World
from lab.training.schedule import parse_resolutions


def takes_s(stages, epoch_s, validation_s, validate_every):
    training = sum(stage.epochs * s for stage, s in zip(stages, epoch_s))
    # Of the last stage's speed: it is the slowest.
    validations = math.ceil(sum(stage.epochs for stage in stages) / validate_every)
    return training + validations * validation_s[-1]


@pytest.mark.parametrize("speed", [1, 100])
@pytest.mark.parametrize("shares", ["256:1", "192/256:0.6,256:0.4", "64:8,128:3,256:1"])
@pytest.mark.parametrize("validate_every", [1, 5])
def test_a_schedule_uses_its_time_and_not_more(speed, shares, validate_every):
    shares = parse_resolutions(shares, shares=True)
    epoch_s = [40 / speed * (stage.side / 256) ** 2 for stage in shares]
    validation_s = [4 / speed] * len(shares)
    stages = fitting(shares, epoch_s, validation_s, validate_every, available_s=1000)
    spent_s = takes_s(stages, epoch_s, validation_s, validate_every)
    assert 1000 - 30 - max(epoch_s) < spent_s <= 1000
    whole = sum(stage.epochs for stage in stages)
    for stage, share in zip(stages, shares):
        fraction = share.epochs / sum(s.epochs for s in shares)
        assert stage.epochs == pytest.approx(fraction * whole, abs=1)
    assert all(isinstance(stage.epochs, int) for stage in stages[:-1])
    assert parse_resolutions(written(stages)) == stages


@pytest.mark.parametrize("available_s", [45, 58, 61])
def test_no_stage_gets_time_that_the_last_one_needs(available_s):
    shares = parse_resolutions("128:20,256:0.5", shares=True)
    first, last = fitting(shares, [20.0, 80.0], [0.0, 0.0], 1, available_s)
    assert first.epochs == int(0.99 * available_s / 22) and last.epochs > 0


def test_a_schedule_is_written_with_all_its_digits():
    assert parse_resolutions(written(parse_resolutions("64:12345.67")))[0].epochs == 12345.67


def test_too_short_a_time_is_one_line():
    with pytest.raises(BadInput, match="an epoch takes 40 s at 256"):
        fitting(parse_resolutions("256:1"), [40.0], [4.0], 1, available_s=4)


@pytest.mark.parametrize("first", [1, 3])
def test_the_first_calls_do_not_count(first, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    durations = iter([100.0] * first + [0.25] * 10000)

    def act():
        clock[0] += next(durations)

    assert seconds_each(act, World("cpu"), 600, uncounted=first) == pytest.approx(0.25)
    assert 3 <= clock[0] - 100 * first < 10  # long enough to be judged by, not much longer


def test_time_counts_from_before_the_imports():
    code = "began = time.monotonic(); import train; print(train.cli.BEGAN - began)"
    code = f"import time; {code}; print(time.monotonic() - began)"
    before, all_imports = map(float, run(module=("-c", code))[0].split())
    assert before < all_imports / 3


def test_validations_and_the_test_are_taken_from_the_time(monkeypatch):
    world = World("cpu")
    trial = SimpleNamespace(
        world=world,
        schedule=range(3),
        sampler=SimpleNamespace(steps_per_epoch=10, seen=lambda step: 500),
        validate_every=2,
    )
    monkeypatch.setattr(cli, "BEGAN", time.monotonic())
    monkeypatch.setattr(budget, "loader", lambda *_: None)
    monkeypatch.setattr(budget, "trial_s", lambda *_: (0.1, 4.0))  # a step, a validation
    asked = []
    monkeypatch.setattr(budget, "fitting", lambda shares, *given: asked.append(given) or shares)
    shares = parse_resolutions("32:1,64:1", shares=True)
    how = (lambda stages: trial, lambda stages: None, 0)
    budget.stages_that_fit(2.0, shares, None, None, *how, val=range(100), n_test=250)
    epoch_s, validation_s, validate_every, available_s = asked[0]
    assert (epoch_s, validation_s, validate_every) == ([1.0, 1.0], [4.0, 4.0], 2)
    assert 120 - 10 - 2 <= available_s < 120 - 10  # less the seconds since the start


def test_a_validation_is_timed_by_a_part_of_its_images(monkeypatch):
    model, judged = nn.Linear(2, 2), []
    trial = SimpleNamespace(
        world=World("cpu"),
        model=model,
        sampler=SimpleNamespace(steps_to_all_scales=1),
        evaluate=lambda some, img_size: judged.append(len(some)),
    )
    # A step takes 3 s and 10 images of a validation a second.
    monkeypatch.setattr(
        budget, "seconds_each", lambda act, **_: 3.0 if act() == "step" else judged[-1] / 10
    )
    step = (model, lambda *_: "step", iter([(None, None)]))
    assert budget.trial_s(trial, *step, range(80), 32, 1.0) == pytest.approx((3.0, 8.0))
    assert judged == [10]
