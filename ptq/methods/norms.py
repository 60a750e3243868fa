"""Batch norms of a quantized network: their statistics follow what quantization changes."""

from collections import Counter

import torch
from torch import Tensor, nn

from ptq.graph import has_statistics
from ptq.layers import copied
from ptq.recipe import Recipe


@torch.no_grad()
def shift_norms(model: nn.Module, reference: nn.Module, batches, recipe: Recipe) -> None:
    """Shift the running statistics of every nn.BatchNorm2d by what quantization changes there.

    From those of `reference`, means move by the difference and variances by the ratio between what
    `model` and `reference` make of `batches`. Where both make the same, nothing moves. To replace
    the statistics from training by those of calibration images costs accuracy even in float: there
    are few such images, and they are not augmented like those that the network learnt on. The shift
    is free of both faults.
    """
    _shift(model, reference, statistics(model, batches), statistics(reference, batches))


def adapted(model: nn.Module, batches, trained_batches) -> nn.Module:
    """Return a copy of a float network with batch norms for images of another size.

    `batches` holds the images at that size, `trained_batches` the same images at the size that the
    network was trained at. ValueError unless both have equally many images, all finite, in batches
    of two or more.
    """
    n, n_trained = check_images(batches), check_images(trained_batches)
    if n != n_trained:
        raise ValueError(f"both sizes need the same images, but there are {n} and {n_trained}")
    other = copied(model)
    with torch.no_grad():
        _shift(other, model, statistics(model, batches), statistics(model, trained_batches))
    return other


def check_images(batches) -> int:
    """Return how many images norms can take their statistics from; ValueError if they can't."""
    if iter(batches) is batches:
        raise ValueError("batches of images are gone through again: give a sequence")
    sizes = [len(x) if x.isfinite().all() else 0 for x, *_ in batches]
    if not sizes or min(sizes) < 2:
        raise ValueError("norms take their statistics from batches of two and more finite images")
    return sum(sizes)


def _shift(model: nn.Module, reference: nn.Module, after: dict, before: dict) -> None:
    norms = {name: reference.get_submodule(name) for name in after}
    _set(model, {name: shifted(norms[name], after[name], before[name]) for name in after})


def _set(model: nn.Module, found: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (mean, variance) in found.items():
        norm = model.get_submodule(name)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


def shifted(trained: nn.BatchNorm2d, after, before) -> tuple[Tensor, Tensor]:
    """Return a norm's mean and variance, moved as those of its input from `before` to `after`.

    Both are pairs of mean and variance.
    """
    ratio = (after[1] + trained.eps) / (before[1] + trained.eps)
    return trained.running_mean + after[0] - before[0], trained.running_var * ratio


@torch.no_grad()
def replace_norms(model: nn.Module, reference: nn.Module, batches, recipe: Recipe) -> None:
    """Replace the running statistics of every nn.BatchNorm2d by those of `batches`, as is usual."""
    _set(model, statistics(model, batches))


def statistics(model: nn.Module, batches) -> dict[str, tuple[Tensor, Tensor]]:
    """Return {name of a batch norm: mean and variance [C] of its inputs}, averaged over images.

    Of norms that keep statistics. A batch has the statistics that training would take from it. The
    network stays as it is.
    """
    model = copied(model).eval()
    every = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    norms = {name: norm for name, norm in every.items() if has_statistics(norm)}
    for norm in norms.values():
        norm.training = True  # not its children, such as timm's dropout
    seen = Counter()

    def weigh(norm, args, kwargs):
        (x,) = *args, *kwargs.values()
        seen[norm] += len(x)
        norm.momentum = len(x) / seen[norm]  # 1 at first, which forgets what was there

    for norm in norms.values():
        norm.register_forward_pre_hook(weigh, with_kwargs=True)
    for x, *_ in batches:
        model(x)
    return {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}
