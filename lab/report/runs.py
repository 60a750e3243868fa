"""Training runs, reports per layer and benchmarks, as their files hold them."""

import csv
from pathlib import Path

from lab.cli import BadInput
from lab.files import read_json, sha256
from lab.report.rows import ACCURACY, METRICS
from lab.schema import integer, mapping, maybe, number, record, text

CONFIG = record(
    {"resolutions": text, "precision": text},
    # Earlier runs lack these.
    optional={"optimizer": text, "widen": maybe(text), "teacher": maybe(text)},
)
FINISHED_RUN = {
    "model": text,
    "task": text,
    "parameters": integer(1),
    "epoch": integer(1),
    "train_s": number(0),
    "hardware": text,
    "printed": text,
    "config": CONFIG,
}
ACCURACIES = dict.fromkeys((f"val_{ACCURACY}", f"test_{ACCURACY}"), number(0, 100))
LOG = ("epoch", "img_size", "window", "train_loss", "val_loss", "images_per_s", "seconds")
REPORT = record(
    {
        "checkpoint_sha256": text,
        "recipe": record({"name": text, "calibration_images": integer(0)}),
        "calibration": record({"n": integer(0)}),
        "noise": mapping(mapping(number(0))),
        "noise_of_rest": number(0),
        "noise_of_all": number(0),
        "largest": integer(1),
    }
)


def load_runs(folder) -> list[dict]:
    """Return all finished runs under `folder`, of any task."""
    return [load_run(path.parent) for path in sorted(Path(folder).glob("*/metrics.json"))]


def load_run(folder: Path) -> dict:
    """Return the metrics.json of a run with its log, the command that repeats it, and runs before.

    Those are the runs that its weights came from. They lie in `folder`/history/run1, run2 and so
    on, and are the field "before", oldest first.
    """
    run = read_metrics(folder)
    config = read_json(folder / "config.json")
    record({})(config, str(folder / "config.json"))
    # Of shipped runs "command" is what was run then, "command_now" the same in today's options.
    command = config.get("command_now", config.get("command"))
    text(command, f"{folder / 'config.json'}: command")
    log = read_log(folder / "log.csv", classifies(run))
    if run["epoch"] not in [line["epoch"] for line in log]:
        raise BadInput(f"{folder / 'log.csv'} lacks epoch {run['epoch']}, which was chosen")
    before = sorted(folder.glob("history/run*"), key=lambda path: (len(path.name), path.name))
    return run | {
        "log": log,
        "command": command,
        "before": [load_run(path) for path in before],
    }


def read_metrics(folder: Path) -> dict:
    """Return the metrics.json of a finished run; BadInput says which field is wrong."""
    path = folder / "metrics.json"
    metrics = read_json(path)
    record(FINISHED_RUN)(metrics, str(path))
    judged_by = [f"val_{name}" for name in METRICS]
    if not any(name in metrics for name in judged_by):
        raise BadInput(f"{path} lacks {' or '.join(judged_by)}")
    if classifies(metrics):
        record(ACCURACIES)(metrics, str(path))
    return metrics


def classifies(metrics: dict) -> bool:
    """Say whether a run is judged by accuracy."""
    return f"val_{ACCURACY}" in metrics


def read_log(path: Path, accuracies: bool) -> list[dict]:
    """Return the lines of a log.csv as numbers; BadInput for anything else."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            log = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    more = ("train_accuracy_pct", "val_accuracy_pct") if accuracies else ()
    line = record({name: number() for name in (*LOG, *more)})
    for i, row in enumerate(log):
        line(row, f"{path}, line {i + 2}")
    if not log:
        raise BadInput(f"{path} has no epoch")
    return log


def load_report(results, checkpoints, model: str, recipe: str) -> dict | None:
    """Return the report per layer of a recipe on shipped weights, or on weights they came from.

    None without such a report, or if another number of images than the recipe's calibrated it.
    """
    path = Path(results, model, "per-layer", f"{recipe}.json")
    if not path.exists():
        return None
    report = read_json(path)
    REPORT(report, str(path))
    shipped = {sha256(p) for p in Path(checkpoints, model).rglob("best.pth")}
    usual = report["calibration"]["n"] == report["recipe"]["calibration_images"]
    return report if usual and report["checkpoint_sha256"] in shipped else None
