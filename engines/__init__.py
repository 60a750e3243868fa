"""Running a network for real, judging it and timing it.

An engine is a module with `NAME`, `version()` and `load(model, recipe, calibration, example) ->
Loaded`, where `model` comes from `ptq.quantize`, `calibration` is a sequence of (input, labels) or
None, and `example` is an input [1, 3, S, S]. `predict` and `latency` treat all of them alike.
"""

import importlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

CPU_BATCH = 25  # images to evaluate at a time; their activations then fit the cache of one core


class EngineMissing(Exception):
    """An engine can't run here; the message says why, or what to install."""


def require(*packages: str) -> list:
    """The imported packages, the engine's own first; EngineMissing if one is not installed."""
    try:
        return [importlib.import_module(name) for name in packages]
    except ModuleNotFoundError as error:
        raise EngineMissing(f"{error.name} is missing: pip install {' '.join(packages)}") from error
    except ImportError as error:
        raise EngineMissing(f"{packages[0]} can't be imported: {error}") from error


@dataclass(frozen=True)
class Loaded:
    """`run`: images [b, 3, S, S] -> logits [b, K]. What its weight file holds (`state`) or how
    large the file was that it was read from (`size_bytes`). `products`: how many convolutions and
    matrix products it computes in integers and how many in float, where the engine tells."""

    run: Callable[[Tensor], Tensor]
    state: dict | None = None
    size_bytes: int | None = None
    products: dict | None = None


def predict(run, batches, workers=1) -> tuple[Tensor, Tensor]:
    """Logits [N, K] and labels [N], on the CPU, of `run` over a sequence of (input, labels).

    On a CPU, `workers` threads with one core each take batches in turn: on small batches that
    beats all cores sharing each operator.
    """

    def one(i: int):
        with torch.inference_mode():
            x, labels = batches[i]
            return run(x).float().cpu(), labels.cpu()

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
    """Milliseconds a call of each of `runs` takes, for one image on one thread: median, p10 and p90
    of `n`.

    The runs take turns, so that a change of the machine's speed meets all of them alike.
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
        stats[name] = {"median": median, "p10": p10, "p90": p90} | {
            "runs": n,
            "threads": 1,
            "batch": 1,
        }
    return stats
