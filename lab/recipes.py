"""Recipes by name for a subject; those of mixed precision are allocated on its images."""

import functools
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import ptq
from lab.cli import BadInput, shortened
from lab.engines import EngineMissing, openvino_cpu, require
from lab.files import read_json
from lab.subject import Subject, named
from lab.tasks.batches import EvalBatches
from ptq import Recipe
from ptq.analysis import costs, mixed
from ptq.packing import check_patterns

LATENCY_CALLS = 30  # that what a layer takes is averaged over


def recipe_of(subject: Subject, name: str) -> Recipe:
    """Return the recipe of this name for the subject's network, or the one in this JSON file.

    Bits of a mixed one are allocated on some of the images to calibrate on. BadInput if there is no
    such recipe, or none within the budget.
    """
    if name.endswith(".json"):
        return read_recipe(name)
    with named(name):
        if not name.startswith(mixed.PREFIX):
            return ptq.recipe(name, subject.network)
        budget = mixed.parse_name(name)
        if budget.cost == "fisher" and subject.task == "detection":
            raise ValueError("Fisher information is of logits: a detector's outputs hold boxes too")
        batches = cost_batches(subject, budget.base)
        of_layers = layer_costs(subject, budget.cost, budget.base)
        latency_ms = layer_latencies(subject, budget.base) if budget.unit == "ms" else None
        return mixed.mixed_recipe(name, subject.network, batches, of_layers, latency_ms)


def calibration_images(recipe: Recipe, asked: int | None) -> int:
    """Return how many images the recipe calibrates on: as many as were `asked` for, if it does.

    BadInput if steps of the recipe look at images, but it names none.
    """
    if recipe.calibrates and not recipe.calibration_images:
        raise BadInput(f"recipe {recipe.name} has steps that look at images, but calibrates on 0")
    return recipe.calibration_images and (asked or recipe.calibration_images)


def read_recipe(path) -> Recipe:
    """Return the recipe in a JSON file, such as `quantize.py --suggest` writes.

    BadInput if there is none, or one without layers, with a name that files can't have, or with
    that of another recipe.
    """
    recipe = checked_recipe(read_json(path), path)
    if not re.fullmatch(r"[\w.-]{1,60}", recipe.name) or not recipe.layers:
        raise BadInput(
            f"{shortened(path)}: a recipe in a file has layers and a name of at most 60 letters, "
            "digits, dots, hyphens and underscores: files of results are called by it"
        )
    if ptq.RECIPES.get(recipe.name, recipe) != recipe or _names_budget(recipe.name):
        raise BadInput(f"{shortened(path)}: {recipe.name} is another recipe: choose a new name")
    return recipe


def _names_budget(name: str) -> bool:
    try:
        return bool(mixed.parse_name(name))
    except ValueError:
        return False


def checked_recipe(value, path) -> Recipe:
    """Return the recipe that is stored as `value` in the file `path`; BadInput if it is none."""
    try:
        recipe = Recipe.fromdict(value)
        check_patterns(recipe)
    except ValueError as error:
        raise BadInput(f"{shortened(path)}: {error}") from error
    return recipe


@functools.lru_cache(maxsize=1)  # for many budgets
def layer_costs(subject: Subject, cost: str, base: str) -> dict:
    """Return {name of a layer: {bits: cost}}, as ptq.analysis.mixed takes them."""
    return mixed.layer_costs(subject.network, cost_batches(subject, base), cost, base)


@functools.lru_cache(maxsize=1)
def layer_latencies(subject: Subject, base: str) -> tuple[dict, float]:
    """Return {name of a layer: {bits: ms}} on OpenVINO and one thread, and the ms of all else.

    BadInput if OpenVINO is missing.
    """
    try:
        require("openvino", "onnx", "onnxscript")
    except EngineMissing as missing:
        raise BadInput(f"a budget in ms is measured on OpenVINO: {missing}") from missing
    from ptq.export import to_onnx

    batches, _ = subject.calibration_batches(ptq.RECIPES[base], costs.IMAGES)  # any will do
    example = subject.sample(subject.img_size)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for bits, recipe in mixed.uniform_recipes(subject.network, base).items():
            files[bits] = Path(folder, f"{bits}.onnx")
            network = ptq.quantize(subject.network, to_nearest(recipe), batches)
            to_onnx(network, example, files[bits])
        times = openvino_cpu.layers_ms(files, example, LATENCY_CALLS)
    names = sorted(set().union(*times.values()) - {openvino_cpu.NO_LAYER})
    prices = {name: {bits: ms.get(name, 0.0) for bits, ms in times.items()} for name in names}
    fixed = [ms[openvino_cpu.NO_LAYER] for ms in times.values()]
    return prices, sum(fixed) / len(fixed)


def cost_batches(subject: Subject, base: str) -> EvalBatches:
    """Return the images that costs are taken from.

    They are as many as the recipe `base` calibrates on, and costs.IMAGES at least.
    """
    recipe = ptq.RECIPES[base]
    return subject.calibration_batches(recipe, max(recipe.calibration_images, costs.IMAGES))[0]


def to_nearest(recipe: Recipe) -> Recipe:
    """Return the same formats with every weight at its nearest code.

    The network is as fast to run, and soon made.
    """
    return replace(recipe, steps=(), units=None)
