"""What repairs a quantized network at little cost: batch-norm statistics and biases."""

import copy

import torch
from torch import Tensor, nn


@torch.no_grad()
def shift_norms(model: nn.Module, batches, reference: nn.Module, reference_batches) -> None:
    """Give every batch norm the running statistics of its twin in `reference`, means moved by the
    difference and variances by the ratio between what `model` makes of `batches` and `reference` of
    `reference_batches`.

    Where both make the same, they stay the same. To replace the statistics from training by those
    of calibration images costs accuracy even in float: there are few of them, and they are not
    augmented as those were that the network learnt on. The shift is free of both.
    """
    before, after = statistics(reference, reference_batches), statistics(model, batches)
    for name, (mean, variance) in after.items():
        norm, trained = model.get_submodule(name), reference.get_submodule(name)
        ratio = (variance + norm.eps) / (before[name][1] + norm.eps)
        norm.running_mean.copy_(trained.running_mean + mean - before[name][0])
        norm.running_var.copy_(trained.running_var * ratio)


@torch.no_grad()
def replace_norms(model: nn.Module, batches, reference: nn.Module, reference_batches) -> None:
    """Replace the running statistics of every batch norm by those of `batches`; the usual way."""
    for name, (mean, variance) in statistics(model, batches).items():
        norm = model.get_submodule(name)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


NORMS = {"shift": shift_norms, "replace": replace_norms}


def statistics(model: nn.Module, batches) -> dict[str, tuple[Tensor, Tensor]]:
    """{name of a batch norm: mean and variance [C] of its inputs, as training takes them in each of
    `batches`, averaged over images}. The network stays as it is."""
    model = copy.deepcopy(model).eval()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for norm in norms.values():
        norm.train()
    seen = 0
    for x, *_ in batches:
        seen += len(x)
        for norm in norms.values():
            norm.momentum = len(x) / seen  # 1 at first, which forgets what was there
        model(x)
    return {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}


def adapted(model: nn.Module, batches, trained_batches) -> nn.Module:
    """A copy of a float network with batch norms for `batches`: the images of `trained_batches`, at
    another size than that which it was trained at."""
    copied = copy.deepcopy(model)
    shift_norms(copied, batches, model, trained_batches)
    return copied
