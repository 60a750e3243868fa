"""Batch norm over several processes against torch's over the whole batch."""

import os

import pytest
import torch
from conftest import FORKS
from torch import nn

from lab.cli import BadInput
from lab.training.distributed import CpuSyncBatchNorm, World
from mobilevit import MobileViT


def one_step(norm, x, weights):
    """Output, gradients and running statistics after a step on a weighted sum."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y.float() * weights).sum().backward()
    return {"y": y.detach(), "x.grad": x.grad, "mean": norm.running_mean, "var": norm.running_var,
            "weight.grad": norm.weight.grad, "bias.grad": norm.bias.grad}  # fmt: skip


def worker(rank, folder, dtype):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
    x, weights = torch.load(folder / "batch.pt")
    with World("cpu").join() as world:
        net = world.synchronised(nn.Sequential(nn.BatchNorm2d(5)))
        assert isinstance(net[0], CpuSyncBatchNorm)
        result = one_step(net[0], x[rank::2].to(dtype), weights[rank::2])
        for name in ("weight.grad", "bias.grad"):  # each process has its images' part
            result[name] = world.sum(result[name])
    torch.save(result, folder / f"{rank}.pt")


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_two_halves_are_normalised_as_one_batch(tmp_path, dtype, atol):
    torch.manual_seed(0)
    x, weights = 3 * torch.randn(8, 5, 4, 4) + 1, torch.randn(8, 5, 4, 4)
    torch.save((x, weights), tmp_path / "batch.pt")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (tmp_path / "port").write_text(str(store.port))
    del store  # frees the port for the processes
    how = "forkserver" if FORKS else "spawn"
    torch.multiprocessing.start_processes(worker, (tmp_path, dtype), 2, start_method=how)
    expected = one_step(nn.BatchNorm2d(5), x, weights)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for rank, half in enumerate(halves):
        for name, value in half.items():
            whole = expected[name][rank::2] if name in ("y", "x.grad") else expected[name]
            scale = whole.abs().max().item()
            torch.testing.assert_close(value.float(), whole, rtol=0, atol=atol * max(1, scale))


@pytest.mark.parametrize("size", ["0", "-1", "1.5", "", "two", str(2**70)])
def test_a_world_of_no_size_is_one_line(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(BadInput, match="WORLD_SIZE in the environment: .*is not a whole number"):
        World("cpu")


def test_a_rank_without_its_group_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(BadInput, match="RANK is 1, but WORLD_SIZE says 1"):
        World("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="LOCAL_RANK is not"):
        World("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "no port")
    with pytest.raises(BadInput, match="do not find each other"), World("cpu").join():
        pass


def test_alone_nothing_is_communicated():
    world = World("cpu")
    model = MobileViT("xxs")
    assert world.parallel(world.synchronised(model)) is model
    assert world.any(True) and not world.any(False) and world.max(143) == 143
    with world.first_then_others():
        pass
