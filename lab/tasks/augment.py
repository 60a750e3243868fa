"""Augmentation of training images at 32x32, every choice a function of random numbers passed in."""

import io
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

POLICIES = ("none", "crop-flip", "autoaugment")
DRAWS = 11  # random numbers that an image takes: 4 of the policy, 2 of JPEG, 5 of erasing
JPEG_QUALITY = (30, 95)  # lowest and highest
GREY = torch.tensor([125, 123, 114], dtype=torch.uint8)  # the mean of the training images


@dataclass(frozen=True)
class Augmentation:
    """How training images are changed at random.

    `policy`: one of POLICIES; autoaugment (Cubuk et al., CVPR 2019) comes after crop-flip.
    `jpeg`: probability of storing an image as a JPEG file of a random quality and reading it.
    `erase`: probability of erasing a rectangle of an image (Zhong et al., AAAI 2020).
    `mixup`, `cutmix`: the parameter alpha of the Beta distribution of the share that an image keeps
    when it is mixed with another (Zhang et al., ICLR 2018) or gets a patch of it (Yun et al., ICCV
    2019); 0 leaves it out, and with both, each batch is given one of them.
    """

    policy: str = "none"
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    jpeg: float = 0.0

    def images(self, x: Tensor, draws: Tensor, window: int) -> Tensor:
        """Return the images `x` uint8 [b, 3, S, S] augmented, as [b, 3, window, window].

        `draws` int64 [b, DRAWS] are the random numbers of each image.
        """
        padding = 0 if self.policy == "none" else x.shape[-1] // 8
        x = crop(x, draws[:, 0], draws[:, 1], window, padding)
        if self.policy != "none":
            x = flip(x, draws[:, 2])
        if self.policy == "autoaugment":
            from torchvision.transforms import v2  # two seconds, see cifar10

            x = torch.stack(seeded(v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10), x, draws[:, 3]))
        if self.jpeg:
            x = through_jpeg(x, draws[:, 4:6], self.jpeg)
        if self.erase:
            x = erased(x, draws[:, 6:], self.erase)
        return x

    @property
    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def mixed(self, x: Tensor, targets: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return `x` uint8 [b, 3, S, S], each mixed with the one half a batch away, and `targets`.

        `targets` [b, K], the probabilities of the classes, are mixed in the same shares.
        """
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


def crop(x: Tensor, top: Tensor, left: Tensor, side: int, padding: int) -> Tensor:
    """Pad [b, 3, S, S] with black and cut [b, 3, side, side] at `top`, `left` (taken modulo)."""
    padded = F.pad(x, (padding,) * 4)
    places, offsets = padded.shape[-1] - side + 1, torch.arange(side)
    rows = (top % places)[:, None] + offsets  # [b, side]
    cols = (left % places)[:, None] + offsets
    image, channel = torch.arange(len(x))[:, None, None, None], torch.arange(3)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], cols[:, None, None, :]]


def fractions(draws: Tensor) -> Tensor:
    """Return draws below 2^31 as float32 in [0, 1): those next to 2^31 would round to 1."""
    return (draws / 2**31).clamp(max=1 - 2**-24)


def flip(x: Tensor, draw: Tensor) -> Tensor:
    return torch.where((draw % 2 == 1)[:, None, None, None], x.flip(-1), x)


def through_jpeg(x: Tensor, draws: Tensor, probability: float) -> Tensor:
    """Return images [b, 3, S, S], some of them as they come back from a JPEG file.

    `draws` [b, 2] say which, with this `probability`, and at what quality.
    """
    from PIL import Image

    low, high = JPEG_QUALITY
    chance, quality = fractions(draws).unbind(1)
    qualities = (low + (high + 1 - low) * quality).int().tolist()
    x = x.clone()
    for i in (chance < probability).nonzero().flatten().tolist():
        file = io.BytesIO()
        Image.fromarray(x[i].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=qualities[i])
        x[i] = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    return x


def erased(x: Tensor, draws: Tensor, probability: float) -> Tensor:
    """Return images [b, 3, S, S], with a grey rectangle over some of them, as `draws` [b, 5] say.

    Zhong et al., "Random Erasing Data Augmentation", AAAI 2020, section 3, in the bounds of
    torchvision's RandomErasing: its area is 2 to 33 % of the image's, its height 0.3 to 3.3 times
    its width, drawn evenly on a logarithmic scale.
    """
    side = x.shape[-1]
    chance, area, shape, top, left = fractions(draws).unbind(1)
    area = side**2 * (0.02 + 0.31 * area)
    ratio = 0.3 * (3.3 / 0.3) ** shape
    inside = []
    for size, place in (((area * ratio).sqrt(), top), ((area / ratio).sqrt(), left)):
        size = size.round().clamp(1, side)
        first = (place * (side - size + 1)).floor()
        pixel = torch.arange(side)
        inside.append((pixel >= first[:, None]) & (pixel < (first + size)[:, None]))  # [b, S]
    rows, columns = inside
    rows = rows & (chance < probability)[:, None]
    return torch.where(rows[:, None, :, None] & columns[:, None, None], GREY[:, None, None], x)


def seeded(transform, samples, seeds: Tensor) -> list:
    """Return the samples after a torchvision transform, each made with its own seed."""
    state = torch.get_rng_state()  # torchvision draws from the global generator
    transformed = []
    for sample, seed in zip(samples, seeds.tolist()):
        torch.default_generator.manual_seed(seed)
        transformed.append(transform(sample))
    torch.set_rng_state(state)
    return transformed
