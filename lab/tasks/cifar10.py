"""CIFAR-10 as uint8 tensors [N, 3, 32, 32], and the float inputs that networks take."""

import contextlib
import functools
import io
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.cli import BadInput
from lab.tasks import classification
from lab.tasks.photo import thumbnail

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.4914, 0.4822, 0.4465)  # of the training images in [0, 1], per RGB channel
STD = (0.2470, 0.2435, 0.2616)
SIDE = 32  # pixels

objective = classification


@dataclass(frozen=True)
class Images:
    """Images uint8 [N, 3, 32, 32], their labels int64 [N], and the names of the classes."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] = CLASSES

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices) -> "Images":
        return Images(self.images[indices], self.labels[indices], self.classes)

    def showing(self, path) -> "Images":
        """Return the picture in a file in place of these, as small as they are; its label is -1."""
        return replace(self, images=thumbnail(path)[None], labels=torch.tensor([-1]))

    def inputs(self, img_size: int, device="cpu") -> Tensor:
        """Return all images as the network's input, float32 [N, 3, S, S]."""
        return to_input(self.images.to(device), img_size)


def load(data_dir, train: bool) -> Images:
    """Return the 50,000 training or 10,000 test images, uint8 [N, 3, 32, 32].

    They are downloaded to `data_dir` if they are not there. BadInput if they can't be downloaded,
    or if a file does not have its published MD5.
    """
    from torchvision.datasets import CIFAR10  # two seconds, spent only where it is used

    folder = Path(data_dir, CIFAR10.base_folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torchvision's chatter
            raw = CIFAR10(data_dir, train, download=not folder.exists())
    except (RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and folder.exists():  # a missing file or another MD5
            raise BadInput(
                f"{folder} is incomplete or damaged: delete it to have it downloaded again"
            ) from error
        raise BadInput(
            f"CIFAR-10 is not in {data_dir} and could not be downloaded ({error}): "
            f"name the folder that holds {CIFAR10.base_folder}/ with --data-dir"
        ) from error
    return Images(
        torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(raw.targets)
    )


def to_input(images: Tensor, img_size: int) -> Tensor:
    """Return images uint8 [b, 3, w, w] as the network's float input [b, 3, S, S], channels-last.

    It is on the device of the images. They are normalised first, then resized bilinearly: both are
    linear and the first is cheaper when small.
    """
    mean, std = _mean_and_std(images.device)
    x = ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
    return x if img_size == x.shape[-1] else F.interpolate(x, (img_size, img_size), mode="bilinear")


@functools.cache  # making a tensor on a GPU waits for the GPU
def _mean_and_std(device) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
