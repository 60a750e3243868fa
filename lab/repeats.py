"""Rows to measure again: what each was measured with, as it is today."""

from pathlib import Path
from typing import NamedTuple

import ptq
from lab.cli import BadInput
from lab.engines.registry import ENGINES
from lab.recipes import checked_recipe
from lab.report.rows import comparable, has_predictions, read_row, row_path
from lab.subject import Subject, load_subject
from ptq import Recipe


class Repeat(NamedTuple):
    """A row of --from, and what measures it again."""

    shipped: dict
    subject: Subject
    recipe: Recipe
    engine: object


def repeat_of(path, args) -> Repeat:
    """Return what measures the row at `path` again; `args` are the options of quantize.py.

    BadInput if today's network, images, recipe or engine are others, or if the new row would
    replace one of those to compare with.
    """
    shipped = read_row(path)
    engine = ENGINES.get(shipped["engine"])
    if engine is None:
        raise BadInput(f"{path}: no engine is called {shipped['engine']}")
    held_out = shipped["split"] == "held-out"
    settings = (args.data_dir, shipped["task"], shipped["img_size"], held_out)
    n_images = min(args.test_images or shipped["n_images"], shipped["n_images"])
    subject = load_subject(shipped["checkpoint"], *settings, n_images, shipped["seed"])
    if len(subject.images) < shipped["n_images"] and not has_predictions(shipped):
        raise BadInput(f"{path} has one score for {shipped['n_images']} images: measure them all")
    if subject.sha256 != shipped["checkpoint_sha256"]:
        raise BadInput(f"{path}: {subject.path} holds other weights than were measured")
    recorded = shipped.get("images_sha256")  # rows of earlier versions have none
    if len(subject.images) == shipped["n_images"] and recorded not in (None, subject.images_sha256):
        raise BadInput(f"{path}: {subject.task} has other images or labels than were measured")
    recipe = recipe_of_row(subject, shipped, path)
    n = shipped["calibration_images"]
    same = subject.identity(recipe, engine.NAME, n, args.latency_runs)
    written = row_path(Path(args.output, subject.folder), same)
    if any(written.resolve() == Path(other).resolve() for other in args.rows):
        raise BadInput(f"{written} is a row to compare with: choose another --output")
    return Repeat(shipped, subject, recipe, engine)


def recipe_of_row(subject: Subject, row: dict, path) -> Recipe:
    """Return the recipe that a row was measured with; BadInput if today's of that name is another.

    One that no name stands for here is taken from the row: it was allocated on images, where
    machines may differ, or read from a file.
    """
    name = row["recipe"]["name"]
    try:
        todays = ptq.recipe(name, subject.model)
    except ValueError:
        return checked_recipe(row["recipe"], path)
    if comparable(todays.asdict()) != comparable(row["recipe"]):
        raise BadInput(f"{path}: recipe {name} is not what it was when the row was measured")
    return todays
