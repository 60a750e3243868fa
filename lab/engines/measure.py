"""Accuracy and latency of anything that runs: the same two functions for every engine."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

CPU_BATCH = 25  # images to evaluate at a time; their activations then fit the cache of one core
FEW_CLASSES = 100  # up to so many, a row holds who was taken for whom; beyond, the top five count


def predict(run, batches, workers=1) -> tuple[Tensor, Tensor]:
    """Logits [N, K] and labels [N], on the CPU, of `run` over a sequence of (input, labels)."""
    return over(batches, lambda x, labels: (run(x).float(), labels), workers)


def over(batches, act: Callable, workers=1) -> tuple[Tensor, ...]:
    """The tensors that `act(input, labels)` gives of a batch, joined over all batches, on the CPU.

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


def top_pct(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Percent of the images whose class is among the `k` likeliest: logits [N, K], labels [N]."""
    likeliest = logits.topk(min(k, logits.shape[1])).indices
    return 100 * int((likeliest == labels[:, None]).any(1).sum()) / len(labels)


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent of the images whose class is the likeliest and, of many classes, among the five
    likeliest: logits [N, K], labels [N]."""
    found = {"accuracy_pct": 100 * int((logits.argmax(1) == labels).sum()) / len(labels)}
    if logits.shape[1] > FEW_CLASSES:
        found["top5_pct"] = top_pct(logits, labels, 5)
    return found


def pairs(labels: Tensor, predictions: Tensor, n: int) -> Tensor:
    """Images of each of `n` true classes (rows) that were given each class, int64 [n, n]."""
    return torch.bincount(n * labels + predictions, minlength=n**2).view(n, n)


def confusion(labels: Tensor, predictions: Tensor, n: int) -> list[list[int]] | None:
    """`pairs` for a file; None for more classes than it should hold pairs of."""
    return pairs(labels, predictions, n).tolist() if n <= FEW_CLASSES else None


def class_scores(logits: Tensor, labels: Tensor) -> dict:
    """Top-1 and top-5 accuracy, and precision, recall and F1 of each class and their means, in %.

    A class without images has none of the three and is left out of the means. One that is never
    predicted has a precision of 0. Top-5 is None for fewer than six classes.
    """
    n, n_classes = logits.shape
    matrix = pairs(labels, logits.argmax(1), n_classes).double()
    right, given, of_class = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
    scores = {
        "precision_pct": 100 * right / given.clamp(min=1),
        "recall_pct": 100 * right / of_class.clamp(min=1),
        "f1_pct": 200 * right / (given + of_class).clamp(min=1),
    }
    present = of_class > 0
    return {
        "n_images": n,
        "top1_pct": 100 * float(right.sum()) / n,
        "top5_pct": top_pct(logits, labels, 5) if n_classes > 5 else None,
        **{name: float(of_each[present].mean()) for name, of_each in scores.items()},
        "n_absent": int((~present).sum()),
        "classes": [
            {"n_images": int(of_class[k])}
            | {name: float(of_each[k]) if present[k] else None for name, of_each in scores.items()}
            for k in range(n_classes)
        ],
    }


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
