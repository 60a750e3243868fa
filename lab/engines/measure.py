"""Outputs and latency of anything that runs: the same functions for every engine."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

CPU_BATCH = 25  # images to evaluate at a time; their activations then fit the cache of one core


def predict(run, batches, workers=1) -> tuple[Tensor, Tensor]:
    """Return logits [N, K] and labels [N], on the CPU, of `run` over (input, labels) batches."""
    return over(batches, lambda x, labels: (run(x).float(), labels), workers)


def over(batches, act: Callable, workers=1) -> tuple[Tensor, ...]:
    """Return the tensors that `act(input, labels)` gives, each joined over all batches, on the CPU.

    `batches`: a sequence of (input [b, 3, S, S], labels [b]). `act` gives tensors of b rows each.
    On a CPU, `workers` threads with one core each take batches in turn: on small batches that
    beats all cores sharing each operator.
    """

    def one(i: int):
        with torch.inference_mode():
            return [column.cpu() for column in act(*batches[i])]

    def results():
        if workers == 1:
            yield from map(one, range(len(batches)))
            return
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(workers, "", torch.set_num_threads, (1,)) as pool:
                yield from pool.map(one, range(len(batches)))
        finally:
            torch.set_num_threads(threads)  # of which some libraries have one for all

    shown = tqdm(results(), "evaluating", len(batches), leave=False, disable=None)
    return tuple(torch.cat(column) for column in zip(*shown))


def latency(runs: dict[str, Callable], n: int = 100, warmup: int = 10) -> dict:
    """Return the milliseconds that a call of each of `runs` takes, for one image on one thread.

    {name: {"median", "p10", "p90", "runs", "threads", "batch"}}, of `n` calls. The runs
    take turns, so that a change of the machine's speed meets all of them alike.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = {name: [] for name in runs}
        with torch.inference_mode():
            for i in range(warmup + n):
                for name, run in runs.items():
                    began = time.perf_counter()
                    run()
                    if i >= warmup:
                        times[name].append(1000 * (time.perf_counter() - began))
    finally:
        torch.set_num_threads(threads)
    points = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    stats = {}
    for name, ms in times.items():
        median, p10, p90 = torch.tensor(ms, dtype=torch.float64).quantile(points).tolist()
        of_times = {"median": median, "p10": p10, "p90": p90}
        stats[name] = of_times | {"runs": n, "threads": 1, "batch": 1}
    return stats
