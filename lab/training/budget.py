"""A schedule that fits into a time: how fast each stage is here, how many epochs that allows."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from lab import cli, machine
from lab.cli import BadInput
from lab.models.checkpoint import read_tensors
from lab.schema import record, text
from lab.tasks.batches import TrainBatches
from lab.training.distributed import World
from lab.training.loader import loader
from lab.training.run import Run
from lab.training.schedule import MAX_EPOCHS, Stage, parse_resolutions

TRIAL = 0.005  # of the time, at least, that the steps take by which a stage is judged
MARGIN = 0.01  # of the time, for what is not measured: files, loader processes


def stages_that_fit(
    minutes: float,
    shares: list[Stage],
    network: nn.Module,
    take_step: Callable,
    run_of: Callable[[list[Stage]], Run],
    batches_of: Callable[[list[Stage]], TrainBatches],
    workers: int,
    val,
    n_test: int,
) -> list[Stage]:
    """Return `shares` with the epochs that fit into `minutes`, by trials that leave no weights.

    `take_step` trains a run's `network`, as it is called, on a batch of images and their targets.
    `val` is what each validation judges, and `n_test` the number of images of the test at the end.
    """
    epoch_s, validation_s = [], []
    for share in shares:
        stage = replace(share, epochs=MAX_EPOCHS)  # more than a trial takes
        trial = run_of([stage])
        steps = range(len(trial.schedule))
        batches = loader(batches_of([stage]), steps, workers, trial.world)
        how = (network, take_step, batches, val, share.img_size, minutes)
        step_s, of_validation = trial_s(trial, *how)
        epoch_s.append(trial.sampler.steps_per_epoch * step_s)
        validation_s.append(of_validation)
    spent_s = trial.world.max(math.ceil(time.monotonic() - cli.BEGAN))  # the same in all processes
    available_s = 60 * minutes - spent_s - validation_s[-1] * n_test / len(val)
    stages = fitting(shares, epoch_s, validation_s, trial.validate_every, available_s)
    if trial.world.rank == 0:
        speeds = ", ".join(
            f"{trial.sampler.seen(trial.sampler.steps_per_epoch) / s:.0f} images/s at {stage.side}"
            for stage, s in zip(shares, epoch_s)
        )
        print(f"--minutes {minutes:g}: {speeds}, so --resolutions {written(stages)}")
    return stages


def trial_s(
    trial: Run,
    network: nn.Module,
    take_step: Callable,
    batches: Iterator,
    val,
    img_size: int,
    minutes: float,
) -> tuple[float, float]:
    """Return what a step of `trial` takes and a validation, in seconds; its weights stay."""
    world, model = trial.world, trial.model
    # On a CPU, all would take half a minute. Those at the beginning may be alike.
    some = val[:: min(8, len(val) // world.size)]
    before = copy.deepcopy(model.state_dict())
    network.train()
    each = partial(seconds_each, world=world, budget_s=60 * minutes)
    warm = trial.sampler.steps_to_all_scales  # each side is compiled anew
    step_s = each(lambda: take_step(trial, network, *next(batches)), uncounted=warm)
    some_s = each(lambda: trial.evaluate(some, img_size))
    model.load_state_dict(before)
    model.zero_grad()
    return step_s, some_s * len(val) / len(some)


def seconds_each(
    act: Callable[[], None], world: World, budget_s: float, uncounted: int = 1
) -> float:
    """Return the seconds that `act` takes on the device of `world`, once it is warm.

    It is called twice as often each time, until that takes a fixed share of `budget_s`: the same
    for a step of seconds and for one of milliseconds. The first `uncounted` calls are those in
    which things are compiled or allocated.
    """
    calls, seconds = 1, 0.0
    for _ in range(uncounted):
        act()
    while seconds < TRIAL * budget_s:
        calls *= 2
        machine.wait_for(world.device.type)
        began = time.perf_counter()
        for _ in range(calls):
            act()
        machine.wait_for(world.device.type)
        # Processes must agree on how often they call.
        seconds = world.max(round(1e6 * (time.perf_counter() - began))) / 1e6
    return seconds / calls


def fitting(
    shares: list[Stage],
    epoch_s: list[float],
    validation_s: list[float],
    validate_every: int,
    available_s: float,
) -> list[Stage]:
    """Return `shares` with as many epochs, in their proportion, as end within `available_s`.

    `epoch_s` is what an epoch takes in each stage, in seconds, and `validation_s` a validation.
    There is one every `validate_every` epochs, and one at the end. All stages but the last get
    whole epochs. BadInput if that leaves less than a hundredth of an epoch to the last one.
    """
    whole = sum(stage.epochs for stage in shares)
    each_s = [s + v / validate_every for s, v in zip(epoch_s, validation_s)]
    left_s = available_s * (1 - MARGIN) - validation_s[-1]
    mean_s = sum(stage.epochs / whole * s for stage, s in zip(shares, each_s))
    *first, _ = (stage.epochs / whole * left_s / mean_s for stage in shares)
    first = [max(1, int(epochs)) for epochs in first]  # never time that the last one needs
    last = (left_s - sum(n * s for n, s in zip(first, each_s))) / each_s[-1]
    last = int(100 * last) / 100
    if last <= 0:
        needed = ", ".join(f"{s:.3g} s at {stage.side}" for stage, s in zip(shares, epoch_s))
        raise BadInput(
            f"--minutes is too short: of its time {max(0, available_s):.0f} s are left, and an "
            f"epoch takes {needed} here"
        )
    return [replace(stage, epochs=n) for stage, n in zip(shares, (*first, last))]


def chosen_before(output: Path) -> list[Stage]:
    """Return the stages of the run that `output` holds."""
    path = output / "last.pth"
    state = read_tensors(path)
    record({"config": record({"resolutions": text})})(state, str(path))
    return parse_resolutions(state["config"]["resolutions"])


def written(stages: list[Stage]) -> str:
    """Return `stages` as --resolutions takes them."""
    parts = []
    for stage in stages:
        side = f"{stage.side}" if stage.side == stage.img_size else f"{stage.side}/{stage.img_size}"
        parts.append(f"{side}:{stage.epochs:.12g}")
    return ",".join(parts)
