"""What changes in the course of a training run: image side and learning rate."""

import math

from mobilevit import MIN_IMG_SIZE
from rows import BadInput


def parse_resolutions(text: str) -> list[tuple[int, int]]:
    """Read `64:8,128:3` as [(64, 8), (128, 3)]: 8 epochs at 64x64, then 3 at 128x128."""
    try:
        stages = [tuple(int(n) for n in stage.split(":")) for stage in text.split(",")]
    except ValueError:
        stages = []
    if not stages or any(len(s) != 2 or s[0] < MIN_IMG_SIZE or s[1] < 1 for s in stages):
        raise BadInput(
            f"--resolutions {text}: give SIDE:EPOCHS,... with sides of at least {MIN_IMG_SIZE} "
            "pixels and whole epochs"
        )
    return stages


class Schedule:
    """Image side and learning rate of every step.

    The rate rises linearly for `warmup_epochs`, then falls as a cosine over the pixels still to be
    seen. With one resolution that is the usual cosine over steps; with several, the last and most
    expensive one still gets a rate at which the network can adapt to it.
    """

    def __init__(self, stages, steps_per_epoch: int, peak_lr: float, warmup_epochs: float):
        self.peak_lr, self.warmup_steps = peak_lr, round(warmup_epochs * steps_per_epoch)
        self.sides = [side for side, epochs in stages for _ in range(epochs * steps_per_epoch)]
        self.pixels = [0]  # seen per image slot of the batch, before each step
        for side in self.sides:
            self.pixels.append(self.pixels[-1] + side**2)

    def __len__(self) -> int:
        return len(self.sides)

    def lr(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        start, end = self.pixels[self.warmup_steps], self.pixels[-1]
        progress = (self.pixels[step] - start) / (end - start)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * progress))
