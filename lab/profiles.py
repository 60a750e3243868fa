"""Profiles: what a recipe does to each tensor and to the accuracy, and which tensors to except."""

import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from lab import files, machine
from lab.cli import BadInput
from lab.engines.measure import CPU_BATCH, predict
from lab.report.profile import csv_text, printed_profile
from lab.report.profile_page import page
from lab.report.rows import setting
from lab.subject import Subject, load_subject, named
from lab.tasks.batches import EvalBatches
from lab.tasks.classification import class_scores
from ptq.analysis.compare import noise
from ptq.analysis.exceptions import WIDE, can_except, with_exceptions
from ptq.analysis.profile import IMAGES, profile
from ptq.pipeline import layer_specs
from ptq.recipe import Recipe

EXCEPTIONS = {"16-bit": WIDE, "float": None}  # what a suggestion makes of the worst: bits
ENOUGH = 0.5  # of the noise in the outputs is left when a suggestion excepts enough tensors


def profile_folder(
    subject: Subject, recipe: Recipe, output: str, force: bool, exceptions: str | None = None
) -> Path:
    """Return the folder of a profile's files; BadInput if there can be none or if it is there.

    Also if `exceptions` are asked for, and the subject's run held out no images to choose them on.
    """
    if exceptions:
        held_out_images(subject)
    if not recipe.layers:
        raise BadInput(f"--profile: recipe {recipe.name} has no quantized layers: choose --recipes")
    name = f"{recipe.name}{setting(subject.img_size, subject.seed)}"
    folder = Path(output, subject.folder, "profile", name)
    files.require_absent(folder, force)
    return folder


def write_profile(
    subject: Subject,
    recipe: Recipe,
    folder: Path,
    quantized: Callable[[Recipe], dict],
    workers: int,
    exceptions: str | None,
) -> None:
    """Write the profile of a recipe as JSON, CSV, PNG and a page; print its worst tensors.

    `quantized(recipe)` gives the network quantized by a recipe, with its calibration batches. With
    `exceptions`, a key of EXCEPTIONS, also writes a recipe that makes such exceptions of the worst
    tensors.
    """
    began = time.monotonic()
    made = quantized(recipe)
    batches = made["batches"] or subject.calibration_batches(recipe, IMAGES)[0]
    with named(recipe.name):
        found = profile(subject.network, made["network"], recipe, batches)
    outputs = {}

    def write(which: str, network: nn.Module, suggestion: dict | None) -> dict:
        """Write what is known once this network has run, too."""
        outputs[which] = outputs_on(subject.images, subject, network, workers)
        unlike = {w: y.argmax(1) != outputs["float"].argmax(1) for w, y in outputs.items()}
        report = {
            **subject.origin(recipe),
            "seed": subject.seed,
            **found,
            "classes": list(subject.images.classes),
            "scores": {w: class_scores(y, subject.images.labels) for w, y in outputs.items()},
            "n_changed": {w: int(changed.sum()) for w, changed in unlike.items()},
            "suggestion": suggestion,
            "calibration": made["calibration"],
            "wall_s": time.monotonic() - began,
            **machine.provenance(),
        }
        files.write_json(folder / "profile.json", report)
        files.write_text(folder / "tensors.csv", csv_text(report))
        files.write_text(folder / "report.html", page(report))
        return report

    outputs["float"] = outputs_on(subject.images, subject, subject.network, workers)
    report = write("quantized", made["network"], None)
    from lab.report.histograms import write_histograms  # matplotlib takes a second to import

    write_histograms(report, folder)
    print(f"{folder}, in {time.monotonic() - began:.0f} s", flush=True)
    if exceptions:  # which takes longer than the profile
        suggested, suggestion = suggest(subject, recipe, found, quantized, workers, exceptions)
        suggestion["file"] = str(folder / "suggested.json")
        report = write("suggested", quantized(suggested)["network"], suggestion)
        files.write_json(folder / "suggested.json", suggested.asdict())
    print(printed_profile(report), flush=True)


def suggest(
    subject: Subject, recipe: Recipe, found: dict, quantized, workers: int, exceptions: str
) -> tuple[Recipe, dict]:
    """Return a recipe that makes exceptions of the worst tensors, and how it was found.

    There are as many as halve the noise in the outputs on held-out images: the mean square of what
    the recipe changes in them, over their variance in float. The search starts from the number
    that the profile `found` suggests and doubles it until the noise is halved or half of all
    tensors are exceptions. BadInput if no tensor can be one.
    """
    specs = layer_specs(subject.network, recipe)
    worst = [
        t
        for t in found["tensors"]
        if can_except(subject.network.get_submodule(t["layer"]), specs[t["layer"]])
    ]
    if not worst:
        raise BadInput(f"--suggest: no tensor of recipe {recipe.name} can be an exception")
    images = held_out_images(subject)
    expected = outputs_on(images, subject, subject.network, workers)

    def tried(made: dict, n: int) -> dict:
        logits = outputs_on(images, subject, made["network"], workers)
        changed = (logits.argmax(1) != expected.argmax(1)).sum()
        lost = noise(logits, expected)
        print(f"with {n} exceptions: noise {lost:.3g} on {len(images):,} images", flush=True)
        return {
            "n_tensors": n,
            "noise": lost,
            "n_changed": int(changed),
            "top1_pct": 100 * float((logits.argmax(1) == images.labels).double().mean()),
        }

    tries = [tried(quantized(recipe), 0)]
    most = max(1, len(worst) // 2)
    n = min(enough([tensor["noise"] for tensor in worst]), most)
    while True:
        tensors = [(tensor["layer"], tensor["role"]) for tensor in worst[:n]]
        name = f"{recipe.name}-suggested"
        suggested = with_exceptions(subject.network, recipe, tensors, name, EXCEPTIONS[exceptions])
        tries.append(tried(quantized(suggested), n))
        halved = tries[-1]["noise"] <= ENOUGH * tries[0]["noise"]
        if halved or n == most:
            break
        n = min(2 * n, most)
    how = {"tensors": tensors, "exceptions": exceptions, "halved": halved, "tries": tries}
    how["n_images"] = len(images)
    return suggested, how


def enough(noises: list[float]) -> int:
    """Return how many first terms of a sum to take away so that ENOUGH of it or less is left.

    At least 1 of them.
    """
    left = sum(noises)
    limit = ENOUGH * left
    for n, of_term in enumerate(noises, 1):
        left -= of_term
        if left <= limit:
            return n
    return len(noises)


def held_out_images(subject: Subject):
    """Return the training images that the subject's run held out."""
    if subject.split == "held-out":
        return subject.images
    settings = (subject.data_dir, subject.task, subject.img_size)
    return load_subject(subject.path, *settings, held_out=True, seed=subject.seed).images


def outputs_on(images, subject: Subject, network: nn.Module, workers: int) -> Tensor:
    return predict(network, EvalBatches(images, subject.img_size, CPU_BATCH), workers)[0]
