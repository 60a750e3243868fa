"""From a data set to batches: splits, balanced subsets, batches to train and to evaluate on.

A data set has `labels`, a tensor with a row for each image (int64 [N] where one class is the whole
answer), `classes`, `len`, indexing by a tensor of indices or a slice, and `inputs(img_size,
device)`, which makes the network's input of all its images.

Every random choice is a function of (seed, step). Any process can make any batch again at any
time, so a resumed or data-parallel run sees exactly the same images.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lab.cli import BadInput, shortened
from lab.tasks.augment import DRAWS, Augmentation
from lab.tasks.sampler import Sampler

# The same for every run, so that no run trains on images that another one holds out.
_SPLIT_SEED = 0


def require_classes(images, names, here: str, there: str) -> None:
    """Raise BadInput unless `images` have the classes of these `names`, in this order.

    Messages call the images `here`, and what has the names `there`.
    """
    ours = images.classes
    if len(ours) != len(names):
        raise BadInput(f"{len(names)} classes in {there}, but {len(ours)} in {here}")
    for k, (our, their) in enumerate(zip(ours, names)):
        if our != their:
            our, their = (shortened(repr(name)) for name in (our, their))
            raise BadInput(f"class {k} is {their} in {there}, but {our} in {here}")


def split(labels: Tensor, val_size: int) -> tuple[Tensor, Tensor]:
    """Return indices to train on and `val_size` indices to hold out, the latter class-balanced.

    They are the same for every run. A smaller held-out set is part of a larger one.
    """
    held_out = balanced_subset(labels, torch.arange(len(labels)), val_size, _SPLIT_SEED)
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[held_out] = False
    return keep.nonzero().flatten(), held_out


def balanced_subset(labels: Tensor, indices: Tensor, n: int, seed: int) -> Tensor:
    """Return `n` of `indices`, sorted, drawn at random with as many of each class (+-1).

    A class that has too few gives all that it has. BadInput unless `n` is 1 to len(indices).
    """
    if not 0 < n <= len(indices):
        raise BadInput(
            f"cannot draw {n} of {len(indices)} images: ask for at most as many, and at least 1"
        )
    shuffled = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))]
    # The k-th image of its class in shuffled order has rank k: the n lowest ranks are balanced.
    of_class = labels[shuffled]
    by_class = of_class.argsort(stable=True)
    counts = of_class.bincount()
    first = (counts.cumsum(0) - counts)[of_class[by_class]]  # place of a class's first image
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(len(by_class)) - first
    return shuffled[rank.argsort(stable=True)[:n]].sort().values


class TrainBatches(torch.utils.data.Dataset):
    """All batches of a training run by step.

    `self[step]` is what `make(data, indices, draws, rng, augment, stage)` makes of the images at
    `indices` [b]. `draws` int64 [b, DRAWS] are random numbers of each image, and the generator
    `rng` is for what concerns them all.

    Step `s` is batch `s % steps_per_epoch` of a fresh shuffle in epoch `s // steps_per_epoch`; the
    last, incomplete batch of a shuffle is dropped. With `world` processes, process `rank` gets its
    share b = batch_size / world of the batch that a single process would get. `stages` has the
    lab.training.schedule.Stage of every epoch; with `multi_scale`, its sides and the batch size
    change from step to step (see lab.tasks.sampler).
    """

    def __init__(
        self,
        make: Callable[..., tuple[Tensor, Tensor]],
        data,
        batch_size: int,
        seed: int,
        augment: Augmentation,
        rank: int = 0,
        world: int = 1,
        stages: list | None = None,
        multi_scale: bool = False,
    ):
        if not 0 < batch_size <= len(data):
            raise BadInput(f"batch size {batch_size} is not within 1 to {len(data)} images")
        self.sampler = Sampler(len(data), batch_size, seed, multi_scale)
        divisor = 2 * world if augment.mixes else world  # images mix within a process, by halves
        for size in self.sampler.sizes:
            if size % divisor:
                raise BadInput(
                    f"batch size {size} does not divide by {divisor}: {world} processes"
                    + (", which mix images in pairs" if augment.mixes else "")
                )
        if not self.sampler.rounds:
            raise BadInput(f"batches of {self.sampler.sizes} images are more than {len(data)}")
        self.make, self.data, self.seed, self.augment = make, data, seed, augment
        self.rank, self.world, self.stages = rank, world, stages

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, first, end = self.sampler.place(step)
        # seed_of pads with zeros, so the shuffle of epoch 0 and the draws of step 0 share a seed.
        # That does no harm, and to change it would change every run.
        order = torch.randperm(len(self.data), generator=_generator(self.seed, epoch))
        indices = order[first:end]
        # Drawn for the whole batch and then shared out, so that `world` changes no image.
        draws = torch.randint(
            2**31, (len(indices), DRAWS), generator=_generator(self.seed, 0, step)
        )
        share = slice(self.rank, None, self.world)
        rng = np.random.default_rng((self.seed, 1, step))
        stage = self.stages[epoch].scaled(self.sampler.scale(step)) if self.stages else None
        return self.make(self.data, indices[share], draws[share], rng, self.augment, stage)


def loader_workers(device: str) -> int:
    """Return how many loader processes keep a device busy.

    A CPU needs none: it trains a hundred times longer on a batch than it takes to make it.
    """
    return min(8, torch.multiprocessing.cpu_count()) if device == "cuda" else 0


def seed_of(*key: int) -> int:
    """Return a seed for torch that is a function of the whole numbers in `key`."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key))


class EvalBatches:
    """A sequence of (input [b, 3, S, S], labels [b]) over `data` in order, made when asked for."""

    def __init__(self, data, img_size: int, batch_size: int, device="cpu"):
        self.data, self.img_size, self.batch_size = data, img_size, batch_size
        self.device = device

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = self.data[i * self.batch_size : (i + 1) * self.batch_size]
        return part.inputs(self.img_size, self.device), part.labels.to(self.device)
