"""CIFAR-10 as uint8 tensors: splits, training batches, evaluation batches, calibration subset.

Images stay 32x32 uint8 [N, 3, 32, 32] until a batch is needed. Augmentation runs at 32x32 in the
loader's workers; normalising and resizing to the model's input run on the model's device, whole
batches at a time (`to_input`). Every random choice is a function of (seed, step), so a batch can be
made again by any process at any time: this is what makes resuming and data-parallel runs exact.
"""

import contextlib
import functools
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.cli import BadInput
from lab.tasks.augment import DRAWS, Augmentation

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.4914, 0.4822, 0.4465)  # of the training images in [0, 1], per RGB channel
STD = (0.2470, 0.2435, 0.2616)
SIDE = 32  # pixels
DATASETS = ("cifar10", "synthetic")
_SPLIT_SEED = 0  # one for all runs: what one holds out, none with as large a share trains on


@dataclass(frozen=True)
class Images:
    """Images uint8 [N, 3, 32, 32] and their labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices) -> "Images":
        return Images(self.images[indices], self.labels[indices])


def load(dataset: str, data_dir, train: bool) -> Images:
    """The 50,000 training or 10,000 test images of CIFAR-10, or the synthetic stand-in's.

    CIFAR-10 is downloaded to `data_dir` if it is not there. Raises BadInput if it can't be, or if
    a file of it does not have its published MD5.
    """
    return synthetic(train) if dataset == "synthetic" else _cifar10(Path(data_dir), train)


def require_known(checkpoint: dict, path) -> None:
    """Raise BadInput unless the network in a checkpoint was trained on a data set of this file."""
    dataset, n = checkpoint["config"]["dataset"], checkpoint["num_classes"]
    if dataset not in DATASETS:
        raise BadInput(f"{path} was trained on {dataset}, known are {' and '.join(DATASETS)}")
    if n != len(CLASSES):
        raise BadInput(f"{path} tells {n} classes apart, {dataset} has {len(CLASSES)}")


def _cifar10(data_dir: Path, train: bool) -> Images:
    from torchvision.datasets import CIFAR10  # two seconds, spent only where it is used

    folder = data_dir / CIFAR10.base_folder
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


def synthetic(train: bool) -> Images:
    """A learnable stand-in without a download: 10 classes of coloured stripes under noise.

    A class is a stripe direction (five) and a colour (two); phase, wavelength and noise vary by
    image. 2,000 images to train on, 500 to test.
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


def split(labels: Tensor, val_size: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and `val_size` indices to hold out, the latter class-balanced.

    The same for every run; a smaller held-out set is part of a larger one.
    """
    held_out = balanced_subset(labels, torch.arange(len(labels)), val_size, _SPLIT_SEED)
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[held_out] = False
    return keep.nonzero().flatten(), held_out


def balanced_subset(labels: Tensor, indices: Tensor, n: int, seed: int) -> Tensor:
    """`n` of `indices`, sorted, drawn at random with each class the same number of times (+-1)."""
    if not 0 < n < len(indices):
        raise BadInput(f"cannot draw {n} of {len(indices)} images: ask for fewer, and at least 1")
    shuffled = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))]
    # The k-th image of its class in shuffled order has rank k: the n lowest ranks are balanced.
    one_hot = F.one_hot(labels[shuffled], len(CLASSES))
    rank = one_hot.cumsum(0).gather(1, labels[shuffled, None]).flatten()
    return shuffled[rank.argsort(stable=True)[:n]].sort().values


class TrainBatches(torch.utils.data.Dataset):
    """All batches of a training run by step: `self[step]` -> images uint8 [b, 3, w, w] and their
    labels int64 [b] or, where `augment` mixes images, class probabilities float32 [b, K].

    Step `s` is batch `s % steps_per_epoch` of a fresh shuffle in epoch `s // steps_per_epoch`; the
    last, incomplete batch of a shuffle is dropped. With `world` processes, process `rank` gets its
    share b = batch_size / world of the batch that a single process would get. `windows` names, by
    epoch, the side w <= 32 of a random window to cut from every image (default: 32).
    """

    def __init__(
        self,
        data: Images,
        batch_size: int,
        seed: int,
        augment: Augmentation,
        rank: int = 0,
        world: int = 1,
        windows: list[int] | None = None,
    ):
        if not 0 < batch_size <= len(data):
            raise BadInput(f"batch size {batch_size} is not within 1 to {len(data)} images")
        divisor = 2 * world if augment.mixes else world  # images mix within a process, by halves
        if batch_size % divisor:
            raise BadInput(
                f"batch size {batch_size} does not divide by {divisor}: {world} processes"
                + (", which mix images in pairs" if augment.mixes else "")
            )
        self.data, self.batch_size, self.seed, self.augment = data, batch_size, seed, augment
        self.rank, self.world, self.windows = rank, world, windows
        self.steps_per_epoch = len(data) // batch_size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.data), generator=_generator(self.seed, epoch))
        indices = order[batch * self.batch_size :][: self.batch_size]
        x, labels = self.data.images[indices], self.data.labels[indices]
        share = slice(self.rank, None, self.world)
        # Drawn for the whole batch and then shared out, so that `world` changes no image.
        draws = torch.randint(
            2**31, (self.batch_size, DRAWS), generator=_generator(self.seed, 0, step)
        )
        x, labels, draws = x[share], labels[share], draws[share]
        window = self.windows[epoch] if self.windows else SIDE
        x = self.augment.images(x, draws, window)
        if not self.augment.mixes:
            return x, labels
        rng = np.random.default_rng((self.seed, 1, step))
        return self.augment.mixed(x, F.one_hot(labels, len(CLASSES)).float(), rng)


def loader_workers(device: str) -> int:
    """Loader processes that keep a device busy; none for a CPU, which trains a hundred times longer
    on a batch than it takes to make it."""
    return min(8, torch.multiprocessing.cpu_count()) if device == "cuda" else 0


def _generator(*key: int) -> torch.Generator:
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


def to_input(images: Tensor, img_size: int) -> Tensor:
    """uint8 [b, 3, w, w] -> the model's float input [b, 3, S, S], channels-last, on its device.

    Normalised first, then resized bilinearly: both are linear and the first is cheaper when small.
    """
    mean, std = _mean_and_std(images.device)
    x = ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
    return x if img_size == x.shape[-1] else F.interpolate(x, (img_size, img_size), mode="bilinear")


@functools.cache  # making a tensor on a GPU waits for the GPU
def _mean_and_std(device) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))


class EvalBatches:
    """A sequence of (input [b, 3, S, S], labels [b]) over `data` in order, made when asked for."""

    def __init__(self, data: Images, img_size: int, batch_size: int, device="cpu"):
        self.data, self.img_size, self.batch_size = data, img_size, batch_size
        self.device = device

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = self.data[i * self.batch_size : (i + 1) * self.batch_size]
        return to_input(part.images.to(self.device), self.img_size), part.labels.to(self.device)
