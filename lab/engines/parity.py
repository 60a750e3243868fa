"""Whether an exported ONNX file predicts what was simulated, on every engine installed.

OpenVINO runs it as a server would, too: with several streams, which compute at the same time. What
goes wrong between them is a race, so each pass compiles anew and the worst of several counts.
"""

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lab.engines import EngineMissing, onnx_runtime, openvino_cpu, require

STREAMS = {
    "1 stream": {"NUM_STREAMS": 1},
    "2 streams": {"NUM_STREAMS": 2},
    "THROUGHPUT": {"PERFORMANCE_HINT": "THROUGHPUT"},
}
Run = Callable[[list[np.ndarray]], list[np.ndarray]]  # batches of images -> outputs of each
# Where an image has more outputs than one logit a class: their squared error over their variance,
# up to which they are as expected. It is 2 for outputs that have nothing in common. Last bits that
# differ made 0.2 in a network that was hardly trained.
NOISE = 0.5


@dataclass(frozen=True)
class Parity:
    """How a file did in one setting.

    `same` of `images` came out as expected in the worst of `passes`. With a `reason`, the file was
    not checked, if there were no passes, or did not run.
    """

    engine: str
    setting: str = ""
    batch: int = 0
    passes: int = 0
    images: int = 0
    same: int = 0
    reason: str = ""

    @property
    def share(self) -> float | None:
        """Return the share of images that came out as expected, None if none was run."""
        return self.same / self.images if self.passes else None


def check(
    path, inputs: Sequence[Tensor], expected: Tensor, batch: int = 8, passes: int = 5, few: int = 16
) -> list[Parity]:
    """Run the file at `path`, its batch left open, on one image and on `batch` images at a time.

    Returns a Parity for each engine, setting and number of images at a time. An engine that is
    missing or can't read the file has one, with the reason.

    `inputs`: tensors [b, 3, S, S]. `expected`: what was simulated on them. These are classes [N],
    logits [N, K], or outputs of more dimensions, such as those of pixels. Several streams run only
    the first `few` images, `passes` times over.
    """
    expected = expected.argmax(1) if expected.dim() == 2 else expected
    results = []
    for engine, settings in ((onnx_runtime.NAME, _onnx_runtime), (openvino_cpu.NAME, _openvino)):
        try:
            for setting, several, load in settings(path):
                times, n = (passes, min(few, len(expected))) if several else (1, len(expected))
                counted = {1: [], batch: []}
                for _ in range(times):
                    loaded = functools.cache(load)  # once a pass
                    for size, found in counted.items():
                        found.append(_right(loaded, inputs, expected[:n], size))
                for size, found in counted.items():
                    same, reason = min(found)
                    results.append(Parity(engine, setting, size, times, n, same, reason))
        except (EngineMissing, ValueError) as reason:
            results.append(Parity(engine, reason=str(reason)))
    return results


def in_words(result: Parity) -> str:
    """Return a result as a line for people."""
    if result.share is None:
        return f"{result.engine}: not checked, {result.reason}"
    where = ", ".join(filter(None, (result.engine, result.setting, f"batch {result.batch}")))
    if result.reason:
        return f"{where}: does not run, {result.reason}"
    worst = f" in the worst of {result.passes} passes" if result.passes > 1 else ""
    return f"{where}: predicts as simulated on {result.same} of {result.images} images{worst}"


def _right(
    load: Callable[[], Run], inputs: Sequence[Tensor], expected: Tensor, size: int
) -> tuple[int, str]:
    """Return how many images come out as expected, `size` at a time, and why if they don't run."""
    try:
        outputs = torch.from_numpy(np.concatenate(load()(_batches(inputs, len(expected), size))))
    except Exception as error:  # those of ONNX Runtime have no base of their own
        return 0, str(error).split("\n")[0]
    return int(as_expected(outputs, expected).sum()), ""


def as_expected(outputs: Tensor, expected: Tensor) -> Tensor:
    """Say of each image whether it came out as expected: bool [N].

    Where the class [N] is expected, logits `outputs` [N, K] must have their largest value there.
    Outputs of more dimensions [N, ...] must have little noise. What is not finite is never as
    expected.
    """
    if expected.dim() == 1:
        return (outputs.argmax(1) == expected) & outputs.isfinite().all(1)
    noise = (outputs - expected).flatten(1).square().mean(1)
    return noise <= NOISE * expected.flatten(1).var(1)  # False for NaN


def _batches(inputs: Sequence[Tensor], n: int, size: int) -> list[np.ndarray]:
    """Return the first `n` images as arrays [size, 3, S, S], the last of an input maybe smaller."""
    batches = []
    for x in inputs:
        batches += [part.contiguous().numpy() for part in x[:n].split(size)] if n > 0 else []
        n -= len(x)
    return batches


def _onnx_runtime(path) -> Iterator[tuple[str, bool, Callable[[], Run]]]:
    """Yield ONNX Runtime's one setting: its name, whether several streams, and how to load it."""
    with tempfile.TemporaryDirectory() as folder:  # the engine leaves a file beside its own
        run = onnx_runtime.loaded(Path(shutil.copy(path, folder))).run
        yield "", False, lambda: lambda xs: [run(torch.from_numpy(x)).numpy() for x in xs]


def _openvino(path) -> Iterator[tuple[str, bool, Callable[[], Run]]]:
    """Yield the settings of OpenVINO, as above. ValueError if the file can't be read."""
    openvino, *_ = require("openvino")
    core = openvino.Core()
    try:
        network = core.read_model(path)
    except RuntimeError as error:
        raise ValueError(f"{path} is no ONNX file that it reads") from error

    def load(settings) -> Run:
        compiled = core.compile_model(network, "CPU", settings | openvino_cpu.AS_SIMULATED)
        n = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        return functools.partial(at_once, [compiled.create_infer_request() for _ in range(n)])

    def at_once(requests, xs):
        """Run as many batches at a time as there are requests.

        No callback of ours runs in the engine's threads: one that waits for Python's lock while
        Python waits for the engine never ends.
        """
        outputs = []
        for i in range(0, len(xs), len(requests)):
            running = list(zip(requests, xs[i : i + len(requests)]))
            for request, x in running:
                request.start_async([x])
            for request, _ in running:
                request.wait()
                outputs.append(request.get_output_tensor().data.copy())
        return outputs

    for setting, settings in STREAMS.items():
        yield setting, setting != "1 stream", functools.partial(load, settings)
