"""A learnable stand-in for CIFAR-10 that needs no download: coloured stripes under noise."""

import numpy as np
import torch

from lab.tasks import cifar10, classification
from lab.tasks.cifar10 import CLASSES, SIDE, Images

objective = classification
to_input = cifar10.to_input


def load(data_dir, train: bool) -> Images:
    """Return 2,000 images to train on or 500 to test on, uint8 [N, 3, 32, 32].

    `data_dir` is not looked at. A class is one of five stripe directions with one of two colours.
    Phase, wavelength and noise vary by image.
    """
    n = 2000 if train else 500
    rng = np.random.default_rng(1 if train else 2)
    labels = np.arange(n) % len(CLASSES)
    angle = (labels % 5 * np.pi / 5)[:, None, None]
    wavelength = rng.uniform(6, 12, (n, 1, 1))
    phase = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    y, x = np.mgrid[:SIDE, :SIDE]
    stripes = np.sin(2 * np.pi / wavelength * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    colours = np.array([[70, 30, -20], [-20, 30, 70]])[labels // 5]  # [N, 3]
    images = 128 + stripes[:, None] * colours[:, :, None, None]
    images += rng.normal(0, 25, images.shape)
    images = torch.from_numpy(images.clip(0, 255).astype(np.uint8))
    return Images(images, torch.from_numpy(labels))
