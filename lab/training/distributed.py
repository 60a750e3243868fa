"""Data-parallel training, torch's own: started by torchrun, NCCL on GPUs and gloo on CPUs.

Losses and gradients are averaged by DistributedDataParallel. Batch norm takes its statistics over
the whole global batch, so that the curve is that of one process with the same batch.
"""

import contextlib
import os
from argparse import ArgumentTypeError

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lab.cli import BadInput, at_least


class World:
    """This process's place among those that train together: `rank` of `size`, and its device."""

    def __init__(self, device: str):
        self.size = _from_environment("WORLD_SIZE", 1, low=1)
        self.rank = _from_environment("RANK", 0, low=0)
        self.device = torch.device(device)
        if self.rank >= self.size:
            raise BadInput(f"RANK is {self.rank}, but WORLD_SIZE says {self.size}: use torchrun")
        missing = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ)
        if self.size > 1 and missing:
            raise BadInput(f"WORLD_SIZE is set, {min(missing)} is not: start processes by torchrun")
        if self.size > 1 and device == "cuda":
            self.device = torch.device("cuda", _from_environment("LOCAL_RANK", 0, low=0))
            if self.device.index >= torch.cuda.device_count():
                raise BadInput(f"{torch.cuda.device_count()} GPUs are fewer than the processes")
            torch.cuda.set_device(self.device)

    @contextlib.contextmanager
    def join(self):
        """Form the process group for the duration of a run, if there is more than one process."""
        if self.size == 1:
            yield self
            return
        on_gpu = self.device.type == "cuda"
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", device_id=self.device if on_gpu else None
            )
        except (RuntimeError, ValueError) as error:  # no such address, or nobody answers there
            raise BadInput(f"the {self.size} processes do not find each other: {error}") from error
        yield self
        # Not after an error: with NCCL it would wait for processes that wait for this one.
        dist.destroy_process_group()

    @contextlib.contextmanager
    def first_then_others(self):
        """Let process 0 through alone, and the others when it is done."""
        if self.rank > 0:
            dist.barrier()
        try:
            yield
        finally:
            if self.rank == 0 and self.size > 1:
                dist.barrier()

    def parallel(self, model: nn.Module) -> nn.Module:
        """Return `model` with gradients averaged over all processes; `model` itself when alone."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, devices)

    def synchronised(self, model: nn.Module) -> nn.Module:
        """Return `model` with batch norm over the global batch; `model` itself when alone."""
        if self.size == 1:
            return model
        if self.device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for module in list(model.modules()):
            for child in module.children():
                if isinstance(child, nn.BatchNorm2d):
                    child.__class__ = CpuSyncBatchNorm  # same parameters and buffers
        return model

    def sum(self, x: Tensor) -> Tensor:
        """Return `x` summed over all processes, as a new tensor."""
        x = x.clone()
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, columns: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return each of `columns` joined over all processes, whose rows may differ in number.

        The columns are tensors on the CPU.
        """
        if self.size == 1:
            return columns
        parts = [None] * self.size
        dist.all_gather_object(parts, columns)
        return tuple(map(torch.cat, zip(*parts)))

    def max(self, n: int) -> int:
        """Return the largest `n` of any process."""
        if self.size == 1:
            return n
        largest = torch.tensor(n, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def any(self, flag: bool) -> bool:
        """Say whether `flag` is set in any process."""
        return bool(self.max(int(flag)))


def _from_environment(name: str, default: int, low: int) -> int:
    """Return a whole number that torchrun sets for each of its processes; `default` without it."""
    text = os.environ.get(name, str(default))
    try:
        return at_least(low)(text)
    except ArgumentTypeError as error:
        raise BadInput(f"{name} in the environment: {error}; torchrun sets it") from error


def leave_process_group(worker_id: int) -> None:
    """Take a loader's process out of the trainer's group of processes.

    A signal to that group, such as that of Ctrl-C or `timeout`, would end it before the trainer
    has stopped. Windows has no such groups.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class _AllReduceMean(torch.autograd.Function):
    """Mean over processes; the gradient of a mean over processes is one too."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    backward = staticmethod(lambda ctx, grad: _AllReduceMean.apply(grad))


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, which must be equally large.

    torch.nn.SyncBatchNorm is this for GPUs and refuses CPU tensors.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean = _AllReduceMean.apply(x.float().mean((0, 2, 3)))  # [C]
        centred = x.float() - mean[:, None, None]
        var = _AllReduceMean.apply(centred.square().mean((0, 2, 3)))
        n = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)
