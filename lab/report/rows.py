"""Rows: where they lie, which of them are published, and when one is reused."""

import csv
from pathlib import Path

from lab import files
from lab.cli import BadInput
from lab.files import read_json, sha256
from lab.report import tables
from mobilevit import MobileViT
from ptq.recipe import Recipe

FULL = {"test": 10_000, "held-out": 2_000}  # images of a split


def load_rows(folder, checkpoints) -> list[dict]:
    """The rows of shipped CIFAR-10 weights that differ from published ones at most in split, side
    of the images and seed."""
    shipped = {sha256(path) for path in Path(checkpoints).glob("*/best.pth")}
    rows = []
    for path in sorted(Path(folder).glob("*/*@*.json")):
        row = read_json(path)
        try:
            if row["checkpoint_sha256"] in shipped and is_full(row):
                rows.append(row)
        except (KeyError, TypeError) as error:
            raise BadInput(f"{path} is no row of quantize.py: it lacks {error}") from error
    return rows


def is_full(row: dict) -> bool:
    full = {
        "dataset": "cifar10",
        "n_images": FULL[row["split"]],
        "calibration_images": row["recipe"]["calibration_images"],
        "latency_runs": 100,
    }
    return all(row[name] == value for name, value in full.items())


def is_published(row: dict) -> bool:
    return (row["split"], row["img_size"], row["seed"]) == ("test", 256, 0)


def load_report(args, recipe: str) -> dict | None:
    """The report per layer that docs/quantization.md shows: of XXS, or of a run before it whose
    weights ship as well."""
    path = Path(args.results, "mobilevit_xxs", "per-layer", f"{recipe}.json")
    shipped = {sha256(p) for p in Path(args.checkpoints, "mobilevit_xxs").rglob("best.pth")}
    report = read_json(path) if path.exists() else None
    usual = report and (
        report["checkpoint_sha256"] in shipped
        and report["calibration"]["n"] == report["recipe"]["calibration_images"]
    )
    return report if usual else None


def of_engines(rows: list[dict]) -> list[dict]:
    """The rows that an engine computed as they are written, once there are other than published
    methods among them."""
    if all(tables.in_protocol(row) for row in rows):
        return []
    return [row for row in rows if not row["simulated"]]


def of_input_sizes(rows: list[dict]) -> list[dict]:
    """The rows of a sweep over input sides, for models that have more than one."""
    usual = {"split": "test", "engine": "openvino", "seed": 0}.items()
    swept = [row for row in rows if usual <= row.items()]
    swept = [row for row in swept if row["recipe"]["name"] in tables.SIZE_SWEEP]
    several = {row["model"] for row in swept if row["img_size"] != 256}
    return [row for row in swept if row["model"] in several]


def load_runs(folder) -> list[dict]:
    """All finished CIFAR-10 runs under `folder`."""
    runs = [load_run(path.parent) for path in sorted(Path(folder).glob("*/metrics.json"))]
    runs = [run for run in runs if run["config"]["dataset"] == "cifar10"]
    return sorted(runs, key=lambda run: tables.MODELS.index(run["model"]))


def load_run(folder: Path) -> dict:
    """The metrics.json of a run with its log and, from `folder`/first, the run that its weights
    came from."""
    run = read_json(folder / "metrics.json")
    try:
        with open(folder / "log.csv") as file:
            log = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"cannot read {folder / 'log.csv'}: {error}") from error
    variant, first = run["config"]["variant"], folder / "first"
    return run | {
        "log": log,
        "model": f"mobilevit_{variant}",
        "command": read_json(folder / "config.json")["command"],  # that of the start
        "parameters": sum(p.numel() for p in MobileViT(variant).parameters()),
        "first": load_run(first) if first.exists() else None,
    }


def of_variants(benchmarks: dict[str, dict], name: str) -> list[dict]:
    """The benchmarks called `name`, with {} for the variant, from small to large."""
    names = (name.format(model.removeprefix("mobilevit_")) for model in tables.MODELS)
    return [benchmarks[name] for name in names if name in benchmarks]


def comparable(recipe: dict | None) -> Recipe | None:
    """A recipe as it was saved, with the defaults of fields that it was saved without."""
    try:
        return Recipe.fromdict(recipe)
    except ValueError:
        return None


def kept(path: Path, identity: dict) -> dict | None:
    """The row at `path`, None if there is none; BadInput if it is of other weights or settings."""
    if not path.exists():
        return None
    row = files.read_json(path)
    theirs, ours = (side | {"recipe": comparable(side.get("recipe"))} for side in (row, identity))
    other = [name for name in ours if theirs.get(name) != ours[name]]
    if other:
        raise BadInput(
            f"{path} holds a row with another {', '.join(other)}: "
            "--force replaces it, --output keeps both"
        )
    return row
