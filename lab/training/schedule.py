"""What changes in the course of a training run: image side and learning rate."""

import math
from dataclasses import dataclass

from lab.cli import BadInput
from lab.tasks import cifar10
from mobilevit import MIN_IMG_SIZE


@dataclass(frozen=True)
class Stage:
    """`epochs` at images of `img_size` pixels a side, of which the network sees `side` at a time.
    The last stage of a run may end within an epoch.

    A window of half the side costs a quarter, and shows the features of the full size: what a
    network learnt at 128x128 does not carry over to 256x256, where everything is twice as large.
    """

    side: int
    img_size: int
    epochs: float

    def steps(self, per_epoch: int) -> int:
        return max(1, round(self.epochs * per_epoch))

    @property
    def window(self) -> int:
        """Side of what the network sees, in pixels of the 32x32 image."""
        return cifar10.SIDE * self.side // self.img_size


def parse_resolutions(text: str) -> list[Stage]:
    """Read `64:8,128/256:4,256:0.5`: 8 epochs at 64x64, 4 on 128x128 windows of 256x256, half a one
    at it."""
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
    whole = all(stage.epochs % 1 == 0 for stage in stages[:-1])
    if not stages or not whole or not all(map(_valid, stages)):
        raise BadInput(
            f"--resolutions {text}: give SIDE:EPOCHS or WINDOW/SIDE:EPOCHS, separated by commas: "
            f"whole epochs but for the last, at least {MIN_IMG_SIZE} pixels, windows of whole "
            f"pixels of the {cifar10.SIDE}x{cifar10.SIDE} image"
        )
    return stages


def _valid(stage: Stage) -> bool:
    fits = MIN_IMG_SIZE <= stage.side <= stage.img_size
    return fits and 0 < stage.epochs < math.inf and cifar10.SIDE * stage.side % stage.img_size == 0


class Schedule:
    """Stage and learning rate of every step.

    The rate rises linearly for `warmup_epochs`, then falls as a cosine over the pixels still to be
    seen. With one resolution that is the usual cosine over steps; with several, the last and most
    expensive one still gets a rate at which the network can adapt to it.
    """

    def __init__(self, stages, steps_per_epoch: int, peak_lr: float, warmup_epochs: float):
        self.peak_lr, self.warmup_steps = peak_lr, round(warmup_epochs * steps_per_epoch)
        self.stages = [s for s in stages for _ in range(s.steps(steps_per_epoch))]  # by step
        self.pixels = [0]  # seen per image slot of the batch, before each step
        for stage in self.stages:
            self.pixels.append(self.pixels[-1] + stage.side**2)

    def __len__(self) -> int:
        return len(self.stages)

    def lr(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        start, end = self.pixels[self.warmup_steps], self.pixels[-1]
        progress = (self.pixels[step] - start) / (end - start)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * progress))
