"""What changes in the course of a training run: image side and learning rate."""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate

from lab.cli import BadInput, shortened
from lab.models.checkpoint import MAX_IMG_SIZE
from lab.tasks import cifar10
from mobilevit import MIN_IMG_SIZE

MAX_EPOCHS = 10**6


@dataclass(frozen=True)
class Stage:
    """A part of a run: `epochs` on images of `img_size` pixels a side.

    The network sees windows of `side` pixels of them. The last stage may end within an epoch.

    A window of half the side costs a quarter, and shows the features of the full size: what a
    network learnt at 128x128 does not carry over to 256x256, where everything is twice as large.
    """

    side: int
    img_size: int
    epochs: float

    def steps(self, per_epoch: int) -> int:
        return max(1, round(self.epochs * per_epoch))

    def scaled(self, scale: float) -> "Stage":
        """Return the same stage with its sides scaled."""
        return replace(self, side=int(scale * self.side), img_size=int(scale * self.img_size))

    @property
    def window(self) -> int:
        """Return the side of what the network sees, in pixels of the 32x32 image."""
        return cifar10.SIDE * self.side // self.img_size


def parse_resolutions(text: str, shares: bool = False) -> list[Stage]:
    """Return the stages that a text such as `64:8,128/256:4,256:0.5` names.

    That is 8 epochs at 64x64, 4 on 128x128 windows of 256x256, and half a one at 256x256. All but
    the last must be whole epochs, unless they are `shares` of a time. BadInput for other texts.
    """
    try:
        stages = []
        for part in text.split(","):
            sides, epochs = part.split(":")
            side, *img_size = (int(n) for n in sides.split("/", 1))
            epochs = float(epochs)
            epochs = int(epochs) if epochs % 1 == 0 else epochs
            stages.append(Stage(side, *(img_size or [side]), epochs))
    except ValueError:
        stages = []
    whole = shares or all(stage.epochs % 1 == 0 for stage in stages[:-1])
    short = 0 < sum(stage.epochs for stage in stages) <= MAX_EPOCHS
    if not whole or not short or not all(map(_valid, stages)):
        raise BadInput(
            f"--resolutions {shortened(text)}: give SIDE:EPOCHS or WINDOW/SIDE:EPOCHS, separated "
            f"by commas: whole epochs but for the last, at most {MAX_EPOCHS}, sides from "
            f"{MIN_IMG_SIZE} to {MAX_IMG_SIZE} pixels, windows of whole pixels of the "
            f"{cifar10.SIDE}x{cifar10.SIDE} image"
        )
    return stages


def _valid(stage: Stage) -> bool:
    fits = MIN_IMG_SIZE <= stage.side <= stage.img_size <= MAX_IMG_SIZE
    return fits and stage.epochs > 0 and cifar10.SIDE * stage.side % stage.img_size == 0


class Schedule:
    """Stage and learning rate of every step.

    The rate rises linearly for `warmup_epochs`, then falls to `min_lr` as a cosine over the pixels
    still to be seen. With one resolution that is the usual cosine over steps; with several, the
    last and most expensive one still gets a rate at which the network can adapt to it.
    """

    def __init__(self, stages, steps_per_epoch, peak_lr, warmup_epochs, min_lr=0.0):
        epochs = sum(stage.epochs for stage in stages)
        if warmup_epochs >= epochs:
            raise BadInput(f"--warmup-epochs {warmup_epochs:g} must be less than {epochs:g} epochs")
        self.peak_lr, self.min_lr = peak_lr, min_lr
        self.warmup_steps = round(warmup_epochs * steps_per_epoch)
        self.stages = stages
        steps = [stage.steps(steps_per_epoch) for stage in stages]
        self.ends = list(accumulate(steps))  # the step after each stage
        pixels = [n * stage.side**2 for n, stage in zip(steps, stages)]
        self.pixels_by_end = list(accumulate(pixels))  # seen per image slot of the batch

    def __len__(self) -> int:
        return self.ends[-1]

    def stage(self, step: int) -> Stage:
        """Return the stage that a step is in."""
        return self.stages[bisect_right(self.ends, step)]

    def lr(self, step: int) -> float:
        """Return the learning rate of a step: a linear rise, then half a cosine over pixels."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        start, end = self._pixels_before(self.warmup_steps), self.pixels_by_end[-1]
        progress = (self._pixels_before(step) - start) / (end - start)
        fall = 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr + (self.peak_lr - self.min_lr) * fall

    def _pixels_before(self, step: int) -> int:
        i = bisect_right(self.ends, step)
        return self.pixels_by_end[i] - (self.ends[i] - step) * self.stages[i].side ** 2
