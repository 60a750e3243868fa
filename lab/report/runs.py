"""Training runs, reports per layer and benchmarks, as their files hold them."""

import csv
from pathlib import Path

from lab.cli import BadInput
from lab.files import read_json, sha256
from lab.schema import integer, mapping, maybe, number, record, text

CONFIG = record(
    {"resolutions": text, "precision": text},
    # Earlier runs lack these.
    optional={"optimizer": text, "widen": maybe(text), "teacher": maybe(text)},
)
METRICS = record(
    {
        "model": text,
        "task": text,
        "parameters": integer(1),
        "epoch": integer(1),
        "val_accuracy_pct": number(0, 100),
        "test_accuracy_pct": number(0, 100),
        "train_s": number(0),
        "hardware": text,
        "printed": text,
        "config": CONFIG,
    }
)
LOG = (
    *("epoch", "img_size", "window", "train_loss", "train_accuracy_pct"),
    *("val_loss", "val_accuracy_pct", "images_per_s", "seconds"),
)
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
    """All finished CIFAR-10 runs under `folder`; others are judged by other metrics."""
    runs = []
    for path in sorted(Path(folder).glob("*/metrics.json")):
        metrics = read_json(path)
        record({"task": text})(metrics, str(path))
        if metrics["task"] == "cifar10":
            runs.append(load_run(path.parent))
    return runs


def load_run(folder: Path) -> dict:
    """The metrics.json of a run with its log, the command that repeats it, and the runs before.

    Those are the runs that its weights came from. They lie in `folder`/history/run1, run2 and so
    on, and are the field "before", oldest first.
    """
    run = read_json(folder / "metrics.json")
    METRICS(run, str(folder / "metrics.json"))
    config = read_json(folder / "config.json")
    record({})(config, str(folder / "config.json"))
    # Of shipped runs "command" is what was run then, "command_now" the same in today's options.
    command = config.get("command_now", config.get("command"))
    text(command, f"{folder / 'config.json'}: command")
    before = sorted(folder.glob("history/run*"), key=lambda path: (len(path.name), path.name))
    return run | {
        "log": read_log(folder / "log.csv"),
        "command": command,
        "before": [load_run(path) for path in before],
    }


def read_log(path: Path) -> list[dict]:
    """The lines of a log.csv as numbers; BadInput for anything else."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            log = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    line = record({name: number() for name in LOG})
    for i, row in enumerate(log):
        line(row, f"{path}, line {i + 2}")
    if not log:
        raise BadInput(f"{path} has no epoch")
    return log


def load_report(results, checkpoints, model: str, recipe: str) -> dict | None:
    """The report per layer of a recipe on shipped weights, or on weights that they came from."""
    path = Path(results, model, "per-layer", f"{recipe}.json")
    if not path.exists():
        return None
    report = read_json(path)
    REPORT(report, str(path))
    shipped = {sha256(p) for p in Path(checkpoints, model).rglob("best.pth")}
    usual = report["calibration"]["n"] == report["recipe"]["calibration_images"]
    return report if usual and report["checkpoint_sha256"] in shipped else None
