"""Augmentation of training images at 32x32, every choice a function of random numbers passed in."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

POLICIES = ("none", "crop-flip", "autoaugment")
DRAWS = 5  # random numbers that an image takes


@dataclass(frozen=True)
class Augmentation:
    """`policy`: one of POLICIES; autoaugment (Cubuk et al., CVPR 2019) comes after crop-flip.
    `erase`: probability of erasing a rectangle of an image (Zhong et al., AAAI 2020).
    `mixup`, `cutmix`: the parameter alpha of the Beta distribution of the share that an image keeps
    when it is mixed with another (Zhang et al., ICLR 2018) or gets a patch of it (Yun et al., ICCV
    2019); 0 leaves it out, and with both, each batch is given one of them.
    """

    policy: str = "none"
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def images(self, x: Tensor, draws: Tensor, window: int) -> Tensor:
        """uint8 [b, 3, S, S] -> [b, 3, window, window], from `draws` int64 [b, DRAWS]."""
        padding = 0 if self.policy == "none" else x.shape[-1] // 8
        x = crop(x, draws[:, 0], draws[:, 1], window, padding)
        if self.policy != "none":
            x = flip(x, draws[:, 2])
        if self.policy == "autoaugment":
            v2 = _transforms()
            x = seeded(v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10), x, draws[:, 3])
        if self.erase:
            erasing = _transforms().RandomErasing(self.erase, value=[125, 123, 114])
            x = seeded(erasing, x, draws[:, 4])
        return x

    @property
    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def mixed(self, x: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mix each of `x` uint8 [b, 3, S, S] with the one half a batch away, and `targets` [b, K],
        the probabilities of its classes, likewise."""
        half = len(x) // 2
        other, other_targets = x.roll(half, 0), targets.roll(half, 0)
        patch = self.cutmix and (not self.mixup or rng.random() < 0.5)
        alpha = self.cutmix if patch else self.mixup
        kept = rng.beta(alpha, alpha)
        if patch:
            side = x.shape[-1]
            reach, centre = side * np.sqrt(1 - kept) / 2, rng.uniform(0, side, 2)
            (top, left), (bottom, right) = (
                np.clip(np.round(centre + sign * reach), 0, side).astype(int) for sign in (-1, 1)
            )
            x = x.clone()
            x[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
            kept = 1 - (bottom - top) * (right - left) / side**2
        else:
            x = (kept * x + (1 - kept) * other).round().to(torch.uint8)
        return x, kept * targets + (1 - kept) * other_targets


def _transforms():
    """Those of torchvision, which takes two seconds to import: spent only where it is used."""
    from torchvision.transforms import v2

    return v2


def crop(x: Tensor, top: Tensor, left: Tensor, side: int, padding: int) -> Tensor:
    """Pad [b, 3, S, S] with black and cut [b, 3, side, side] at `top`, `left` (taken modulo)."""
    padded = F.pad(x, (padding,) * 4)
    places, offsets = padded.shape[-1] - side + 1, torch.arange(side)
    rows = (top % places)[:, None] + offsets  # [b, side]
    cols = (left % places)[:, None] + offsets
    image, channel = torch.arange(len(x))[:, None, None, None], torch.arange(3)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], cols[:, None, None, :]]


def flip(x: Tensor, draw: Tensor) -> Tensor:
    return torch.where((draw % 2 == 1)[:, None, None, None], x.flip(-1), x)


def seeded(transform, x: Tensor, seeds: Tensor) -> Tensor:
    """A torchvision transform of each image with its own seed."""
    state = torch.get_rng_state()  # torchvision draws from the global generator
    transformed = []
    for image, seed in zip(x, seeds.tolist()):
        torch.default_generator.manual_seed(seed)
        transformed.append(transform(image))
    torch.set_rng_state(state)
    return torch.stack(transformed)
