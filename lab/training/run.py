"""A training run: everything that changes from step to step, and the files that hold it."""

import csv
import io
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from lab import files, machine
from lab.cli import BadInput, flags, shortened
from lab.models.checkpoint import (
    FORMAT,
    like,
    load_state,
    plain,
    read_tensors,
    save_checkpoint,
    tensor,
)
from lab.schema import Schema, integer, mapping, number, record, sequence, text
from lab.tasks import TASKS
from lab.tasks.batches import seed_of
from lab.tasks.sampler import Sampler
from lab.training.distributed import World
from lab.training.evaluation import judged
from lab.training.schedule import Schedule, Stage


def numeral(value, where: str) -> None:
    """Raise BadInput unless `value` is a number as text, as the log shows it."""
    text(value, where)
    try:
        float(value)
    except ValueError as error:
        raise BadInput(f"{where} is {value!r}, but should be a number") from error


def seconds(value, where: str) -> None:
    """Raise BadInput unless `value` is a number of seconds as text."""
    numeral(value, where)
    number(0)(float(value), where)


def log_line(objective) -> dict[str, Schema]:
    """Return {column of the log: its schema} for a task of this `objective`."""
    return {
        "epoch": integer(1),
        "img_size": integer(1),
        "window": integer(1),
        "lr": numeral,
        "train_loss": numeral,
        f"train_{objective.TRAIN_METRIC}": numeral,
        "val_loss": numeral,
        f"val_{objective.METRIC}": numeral,
        "images_per_s": numeral,
        "peak_memory_mb": numeral,
        "seconds": seconds,
    }


SAVED = ("step", "seconds", "history", "best_accuracy", "config")  # besides the weights and sums
# Of the config, what no option says but the run: how a message calls it.
OF_RUN = {"world_size": "processes:", "train_images": "training images:", "classes": "classes:"}


@dataclass
class Run:
    """A training run: everything that changes from step to step, and its files.

    `about` is what best.pth says of the network (see lab.models.checkpoint), `config` the options
    that a resumed run must be given again and the data that it must find. Process 0 writes the
    files; all processes call.
    """

    output: Path
    world: World
    model: nn.Module
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    sampler: Sampler
    validate_every: int  # epochs
    about: dict
    config: dict
    tensorboard: object = None  # a SummaryWriter
    step: int = 0
    history: list = field(default_factory=list)  # a log_line a validation
    best_accuracy: float = -1.0  # of the task's metric, in percent
    # Since the last validation, and of this process:
    seconds: float = 0.0  # training only
    sums: Tensor = field(init=False)  # loss, right, gradient norm

    def __post_init__(self):
        self.sums = torch.zeros(3, device=self.world.device)

    @property
    def task(self):
        """Return the module of the run's task."""
        return TASKS[self.about["task"]]

    def stage(self) -> Stage:
        """Return the stage that the next step is in, with the sides of the step's images."""
        return self.schedule.stage(self.step).scaled(self.sampler.scale(self.step))

    def seed(self) -> int:
        """Return the seed of what layers draw in the next step, another in each process."""
        return seed_of(self.sampler.seed, 3, self.step, self.world.rank + 1)

    @property
    def validation_due(self) -> bool:
        """Say whether the steps up to a validation are done, but not yet validated and logged."""
        return self.validations_due(self.step) > len(self.history)

    @property
    def interval(self) -> int:
        """Return the number of steps from one validation to the next."""
        return self.validate_every * self.sampler.steps_per_epoch

    def validations_due(self, step: int) -> int:
        """Return the number of validations up to `step`; there is one at the end, too."""
        at_end = step == len(self.schedule)
        return math.ceil(step / self.interval) if at_end else step // self.interval

    def network(self) -> nn.Module:
        """Return the network with the weights to evaluate and ship."""
        return self.ema.module if self.ema else self.model

    def evaluate(self, data, img_size: int) -> dict:
        """Return the score of the weights on `data`; each process takes its share of the images."""
        world, model = self.world, self.network().eval()
        share = data[world.rank :: world.size]
        columns = judged(model, share, img_size, self.task, world.device)
        self.model.train()
        return self.task.objective.score(*world.gather(columns), data.classes)

    def validate(self, val) -> None:
        """Validate and log, keep the weights if they are the best yet, save."""
        world, objective = self.world, self.task.objective
        stage = self.schedule.stage(self.step - 1)
        loss, right, _ = world.sum(self.sums).tolist()
        before = self.step - (self.step % self.interval or self.interval)  # the last can be short
        n = self.sampler.seen(self.step) - self.sampler.seen(before)
        score = self.evaluate(val, stage.img_size)
        row = {
            "epoch": math.ceil(self.step / self.sampler.steps_per_epoch),
            "img_size": stage.img_size,
            "window": stage.side,
            "lr": f"{self.schedule.lr(self.step - 1):.3g}",
            "train_loss": f"{loss / n:.4f}",
            f"train_{objective.TRAIN_METRIC}": f"{100 * right / n:.2f}",
            "val_loss": f"{score['loss']:.4f}",
            f"val_{objective.METRIC}": f"{score[objective.METRIC]:.2f}",
            "images_per_s": f"{n / max(self.seconds, 1e-3):.1f}",
            "peak_memory_mb": f"{peak_memory_bytes(world.device) / files.MB:.0f}",
            "seconds": f"{self.seconds:.1f}",
        }
        self.history.append(row)
        self.sums.zero_()
        self.seconds = 0.0
        # Weights validated at another resolution than the last one can't be chosen.
        comparable = stage.img_size == self.about["img_size"]
        if comparable and score[objective.METRIC] > self.best_accuracy:
            self.best_accuracy = score[objective.METRIC]
            if world.rank == 0:
                save_checkpoint(self.output / "best.pth", self.shippable())
        self.save()
        if world.rank == 0:
            tqdm.write("  ".join(f"{k} {v}" for k, v in row.items()))
            sys.stdout.flush()
            if self.tensorboard:
                for name, value in row.items():
                    self.tensorboard.add_scalar(name, float(value), row["epoch"])
                self.tensorboard.flush()

    def shippable(self) -> dict:
        """Return the content of best.pth."""
        return {
            "format": FORMAT,
            **self.about,
            "state_dict": {k: v.contiguous().cpu() for k, v in self.network().state_dict().items()},
            f"test_{self.task.objective.METRIC}": None,
            f"val_{self.task.objective.METRIC}": self.best_accuracy,
            "epoch": self.history[-1]["epoch"],
            "config": self.config,
            "commit": machine.code()[0],
        }

    def save(self) -> None:
        """Write last.pth and the log.

        The data, its augmentation and what dropout draws are functions of the step, so no random
        state is alive between steps and none needs saving.
        """
        sums = self.world.sum(self.sums)
        if self.world.rank:
            return
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state |= {name: getattr(self, name) for name in SAVED}
        save_checkpoint(self.output / "last.pth", state | {"sums": sums.cpu()})
        write_log(self.output, self.history, self.task.objective)

    def parts(self) -> dict:
        """Return what has a state dict, by its name in last.pth."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return parts | ({"ema": self.ema} if self.ema else {})

    def resume(self) -> None:
        """Go back to what last.pth holds, and write the log that belongs to it."""
        path = self.output / "last.pth"
        state = read_tensors(path)
        record({"config": mapping(plain)})(state, str(path))
        # Runs of before they were recorded do not say which images and classes they had.
        unsaid = {name: self.config[name] for name in ("train_images", "classes")}
        if changed := changed_options(unsaid | state["config"], self.config):
            raise BadInput(f"{path} began with {changed}: resume with the same")
        self.schema()(state, str(path))
        if not 0 <= self.validations_due(state["step"]) - len(state["history"]) <= 1:
            n = len(state["history"])
            raise BadInput(f"{path} logs {n} validations at step {state['step']}")
        logged = [line["epoch"] for line in state["history"]]
        last = math.ceil(len(self.schedule) / self.sampler.steps_per_epoch)
        due = [min((i + 1) * self.validate_every, last) for i in range(len(logged))]
        if logged != due:
            raise BadInput(f"{path}: history has the epochs {logged}, but should have {due}")
        load_state(self.model, state["model"], path)
        # Groups and their settings follow from the options, as when the run began.
        groups = self.optimizer.state_dict()["param_groups"]
        moments = state["optimizer"]["state"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        for name in SAVED:
            setattr(self, name, state[name])
        if self.world.rank == 0:  # the saved sums are those of all processes
            self.sums.copy_(state["sums"])
            write_log(self.output, self.history, self.task.objective)

    def schema(self) -> Schema:
        """Return the schema of what last.pth must hold for this run."""
        ema = {"ema": like(self.ema.state_dict())} if self.ema else {}
        return record(
            {
                "model": mapping(tensor),
                "optimizer": record({"state": self.moments()}),
                "scaler": like(self.scaler.state_dict()),
                "step": integer(0, len(self.schedule)),
                "seconds": number(0),
                "history": sequence(record(log_line(self.task.objective))),
                "best_accuracy": number(-1, 100),
                "sums": like(torch.zeros(3)),
                **ema,
            }
        )

    def moments(self) -> Schema:
        """Return the schema of an optimizer's state: none before its first step, then all weights'.

        It makes a step to find out, so the weights and the state have to be loaded after it.
        """
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # gives the optimizer a state; the weights are overwritten anyway
        self.optimizer.zero_grad()
        as_after_a_step = like(self.optimizer.state_dict()["state"])

        def check(value, where):
            if value != {}:
                as_after_a_step(value, where)

        return check


def write_log(output: Path, history: list[dict], objective) -> None:
    """Write the log.csv of a run that has validated."""
    if history:
        content = io.StringIO()
        columns = log_line(objective)
        writer = csv.DictWriter(content, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(history)
        files.write_text(output / "log.csv", content.getvalue())


def changed_options(before: dict, now: dict) -> str:
    """Return in words which options of `now` a run had otherwise `before`; "" if there are none."""
    changed = [
        f"{option(k)} {shortened(before.get(k))} (now {shortened(v)})"
        for k, v in now.items()
        if before.get(k) != v
    ]
    return ", ".join(changed)


def option(name: str) -> str:
    return OF_RUN.get(name) or flags(name)


def hardware(world: World) -> str:
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
    else:
        name = f"{machine.cpu_name()}, {torch.get_num_threads()} threads"
    return name if world.size == 1 else f"{world.size} x {name}"


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return machine.peak_memory_bytes()


def tensorboard_writer() -> type:
    """Return the class that writes tensorboard's files; BadInput without that package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BadInput("--tensorboard needs tensorboard: pip install tensorboard") from error
    return SummaryWriter
