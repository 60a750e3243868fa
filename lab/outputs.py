"""What comes of a quantized network: its answers, reports per layer, and files to use."""

import functools
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from lab import files, machine
from lab.cli import BadInput
from lab.engines import EngineMissing, parity, require, require_formats
from lab.engines.measure import CPU_BATCH, over, predict
from lab.engines.registry import ENGINES
from lab.recipes import calibration_images
from lab.report.rows import setting
from lab.report.studies import per_layer_table
from lab.subject import Subject, named
from lab.tasks import TASKS
from lab.tasks.batches import EvalBatches
from lab.tasks.classification import confusion
from lab.training.evaluation import judged
from ptq import Recipe, packing
from ptq.analysis.compare import noise
from ptq.analysis.sensitivity import sensitivities

NOISE_IMAGES = 1_000  # of the first images that are judged; logits on them are set beside FP32's
REPORT_IMAGES, REPORT_BATCH = 64, 16  # calibration images that a report per layer looks at
PARITY_IMAGES, PARITY_SHARE = 100, 0.9  # training images that an exported file is checked on
PARITY_SCENES = 16  # instead, where outputs are many
CPU = torch.device("cpu")
SHOWN_CLASSES = 3  # of a prediction


def write_reports(pairs, output: str, n_calibration: int | None, workers: int, force: bool) -> None:
    """Write a report per layer of each (subject, recipe); print its most sensitive tensors.

    It is calibrated on `n_calibration` images, or on as many as the recipe says. BadInput if there
    can be no report, or if one is there and `force` does not say to replace it.
    """
    jobs = []
    for subject, recipe in pairs:
        name = f"{recipe.name}{setting(subject.img_size, subject.seed)}.json"
        path = Path(output, subject.folder, "per-layer", name)
        jobs.append((subject, recipe, path, report_fn(recipe)))
        files.require_absent(path, force)
    for subject, recipe, path, noises in jobs:
        n = calibration_images(recipe, n_calibration)
        try:
            with named(recipe.name):
                report = per_layer_report(subject, recipe, noises, n, workers)
        except EngineMissing as missing:
            raise BadInput(f"--per-layer, {recipe.name}: {missing}") from missing
        files.write_json(path, report)
        print(f"{path}, in {report['wall_s']:.0f} s\n{per_layer_table(report)}", flush=True)


def report_fn(recipe: Recipe):
    """Return the function that says how much each single tensor that a recipe quantizes matters.

    BadInput if there is none for the recipe.
    """
    found = sensitivities if recipe.layers and recipe.calibration_images else None
    if recipe.peer:
        found = getattr(ENGINES[recipe.peer], "sensitivities", None)
    if found is None:
        raise BadInput(
            f"--per-layer is for int8-fx and what calibrates layers, {recipe.name} is neither"
        )
    return found


def per_layer_report(subject: Subject, recipe: Recipe, noises, n: int, workers: int) -> dict:
    """Return the noise in the logits from each single tensor that a recipe quantizes.

    `noises` is what `report_fn` gives for the recipe. It is calibrated on `n` images.
    """
    began = time.monotonic()
    batches, described = subject.calibration_batches(recipe, n)
    shown = EvalBatches(batches.data[:REPORT_IMAGES], subject.img_size, REPORT_BATCH)

    def logits(network):
        return predict(network, shown, workers)[0]

    found = noises(subject.network, recipe, batches, logits)
    return {
        **subject.origin(recipe),
        "seed": subject.seed,
        **found,
        "n_images": len(shown.data),
        "calibration": described,
        "wall_s": time.monotonic() - began,
        **machine.provenance(),
    }


def answered(subject: Subject, run) -> dict:
    """Return what a row says of the answers that `run` gives to the subject's images.

    That is their score and, where an answer is one class, the answers themselves and how far their
    logits are off. `run`: images [b, 3, S, S] -> outputs [b, ...]. BadInput if these are not
    finite.
    """
    task, classes = TASKS[subject.task], subject.images.classes
    columns = judged(run, subject.images, subject.img_size, task, CPU)
    if not all(column.isfinite().all() for column in columns):
        raise BadInput("the outputs are not finite")
    score = task.objective.score(*columns, classes)
    answers = {"score": {name: value for name, value in score.items() if name.endswith("_pct")}}
    if subject.classifies:
        logits, labels = columns
        predictions = logits.argmax(1)
        answers["n_correct"] = score["n_correct"]
        answers["predictions"] = predictions.tolist()
        answers["confusion"] = confusion(labels, predictions, len(classes))
        expected = float_logits(subject)
        if expected.var() > 0:  # else nothing is relative to it
            answers["logit_noise"] = noise(logits[: len(expected)], expected)
    return answers


@functools.lru_cache(maxsize=1)  # made once for all rows of a subject
def float_logits(subject: Subject) -> Tensor:
    """Return the logits [n, K] of the float network on the first images of a subject."""
    some, task = subject.images[:NOISE_IMAGES], TASKS[subject.task]
    return judged(subject.network, some, subject.img_size, task, CPU)[0]


def prediction_text(logits: Tensor, classes) -> str:
    """Return the likeliest classes of one image and their probabilities, from its logits [K]."""
    best = logits.softmax(0).topk(min(SHOWN_CLASSES, len(logits)))
    return ", ".join(
        f"{classes[k]} {100 * p:.1f} %" for k, p in zip(best.indices.tolist(), best.values.tolist())
    )


def export_files(subject: Subject, recipe: Recipe, network, path: Path, workers: int) -> bool:
    """Write a quantized network as packed safetensors and, where ONNX can hold it, as QDQ ONNX.

    `path` is that of both files without a suffix. Prints a line for each file, and for each engine
    what it makes of the ONNX file. Returns whether every engine that can run here predicts what the
    simulation does.
    """
    written = {".safetensors": functools.partial(packing.save, network, recipe)}
    try:
        require_formats(recipe)
        require("onnx", "onnxscript")
        from ptq.export import to_onnx

        sample = subject.sample(subject.img_size)
        written[".onnx"] = functools.partial(to_onnx, network, sample, about=about(subject))
    except EngineMissing as missing:
        print(f"ONNX files are left out: {missing}")
    for suffix, write in written.items():
        file = path.with_name(path.name + suffix)
        with files.atomic(file) as tmp:
            write(tmp)
        print(f"{file}, {file.stat().st_size / files.MB:.2f} MB", flush=True)
    return ".onnx" not in written or as_simulated(subject, network, file, workers)


def about(subject: Subject) -> dict[str, str]:
    """Return what a user of an ONNX file must know of its network's images: {name: JSON}."""
    known = {"classes": list(subject.images.classes)}
    for name in ("normalize", "resize"):  # of photos
        if hasattr(subject.images, name):
            known[name] = getattr(subject.images, name)
    return {name: json.dumps(value) for name, value in known.items()}


def as_simulated(subject: Subject, network, file: Path, workers: int) -> bool:
    """Say whether each engine's predictions with an ONNX file agree with the simulated ones.

    Prints a line for each engine and setting. They agree on PARITY_SHARE of the images or more.
    """
    images, _ = subject.calibration(PARITY_IMAGES if subject.classifies else PARITY_SCENES)
    batches = EvalBatches(images, subject.img_size, CPU_BATCH)
    (expected,) = over(batches, lambda x, _: [network(x)], workers)
    agree = True
    for result in parity.check(file, [x for x, _ in batches], expected):
        print(f"  {parity.in_words(result)}", flush=True)
        agree = agree and (result.share is None or result.share >= PARITY_SHARE)
    if not agree:
        print(f"{file}: an engine does not predict what was simulated", file=sys.stderr)
    return agree
