"""Rows: one recipe on one engine for one checkpoint, as a file. Path, schema, reuse, selection."""

from pathlib import Path

from lab.cli import BadInput
from lab.files import read_json, sha256
from lab.schema import (
    anything,
    flag,
    integer,
    mapping,
    maybe,
    number,
    one_of,
    percent,
    record,
    sequence,
    text,
)

MS = number(1e-6)  # milliseconds; speeds are quotients of them
LATENCY = record({name: MS for name in ("median", "p10", "p90")} | {"runs": integer(1)})
COUNTS = mapping(integer(0))
RECIPE = record(
    {
        "name": text,
        "title": text,
        "peer": maybe(text),
        "layers": sequence(mapping(anything)),
        "steps": sequence(text),
        "calibration_images": integer(0),
    }
)
ACCURACY = "accuracy_pct"
# What rows are judged by, with the names in tables: a score has one of them.
METRICS = {ACCURACY: "Accuracy", "map50_pct": "mAP@0.5", "miou_pct": "mIoU"}
PARTS = ("compute", "weights", "activations")
ENERGY = record({"unit": text, "total": number(1e-9)} | {part: number(0) for part in PARTS})
ENERGIES = record(dict.fromkeys(("horowitz", "horowitz-high", "seed"), ENERGY))
IDENTITY = {  # a row that is the same in all of these need not be measured again
    "model": text,
    "task": text,
    "split": one_of("test", "held-out"),
    "img_size": integer(1),
    "checkpoint_sha256": text,
    "recipe": RECIPE,
    "engine": text,
    "seed": integer(0),
    "calibration_images": integer(0),
    "adapt_images": maybe(integer(1)),
    "n_images": integer(1),
    "latency_runs": integer(1),
}
# Also of the identity, but rows of earlier versions have none.
LATER = {"settings": mapping(anything), "images_sha256": text}
SCORE = record(
    {},
    optional=dict.fromkeys((*METRICS, "top5_pct", "map_pct", "pixels_pct"), percent)
    | dict.fromkeys(("ap50_pct", "iou_pct"), mapping(percent)),  # of each class
)
ROW = record(
    IDENTITY
    | {
        "checkpoint": text,
        "classes": sequence(text),
        "engine_version": text,
        "kind": one_of("measured", "simulated", "integer"),
        "score": SCORE,
        "size_bytes": integer(1),
        "size_is_estimate": flag,
        "products": maybe(record({"int8": COUNTS, "float": COUNTS}, optional={"asked": COUNTS})),
        "latency_ms": LATENCY,
        "fp32_latency_ms": LATENCY,
        "cpu": text,
        "command": text,
        "wall_s": number(0),
    },
    optional=LATER | {"energy": maybe(ENERGIES), "logit_noise": number(0)},
)
ANSWERS = record(
    {
        "n_correct": integer(0),
        "predictions": sequence(integer(0)),
        "confusion": maybe(sequence(sequence(integer(0)))),
    }
)
FULL = {"test": 10_000, "held-out": 2_000}  # images of a split of CIFAR-10
# Of the rows in the main tables: at the side that the network was trained at.
MAIN_TABLES = {"split": "test", "adapt_images": None, "seed": 0}
USUAL_SIDE = 256  # pixels; file names tell others


def read_row(path) -> dict:
    """Return a row that quantize.py wrote; BadInput says which field is not as it should be."""
    row = read_json(path)
    ROW(row, str(path))
    if METRICS.keys().isdisjoint(row["score"]):
        raise BadInput(f"{path}: score lacks {' or '.join(METRICS)}")
    if not has_predictions(row):
        return row
    ANSWERS(row, str(path))
    n, classes = row["n_images"], len(row["classes"])
    if len(row["predictions"]) != n or max(row["predictions"]) >= classes:
        raise BadInput(f"{path}: predictions should be {n} numbers below {classes}")
    lengths = [len(line) for line in row["confusion"] or ()]
    many = "top5_pct" in row["score"]  # so many that the file holds no confusion
    if lengths != [classes] * classes and not (many and row["confusion"] is None):
        raise BadInput(f"{path}: confusion should be {classes} lines of {classes} numbers")
    return row


def metric(row: dict) -> str:
    """Return the name in METRICS of what the row is judged by."""
    return next(name for name in METRICS if name in row["score"])


def has_predictions(row: dict) -> bool:
    """Say whether the answer to an image is one class: such answers can be counted and compared."""
    return metric(row) == ACCURACY


def setting(img_size: int, seed: int) -> str:
    """Return what a file's name says of image size and seed where they are not the usual ones."""
    size = "" if img_size == USUAL_SIDE else f"-{img_size}"
    return size + (f"-seed{seed}" if seed else "")


def row_path(folder: Path, identity: dict) -> Path:
    """Return the path of the row of this identity in `folder`, that of its network."""
    name = f"{identity['recipe']['name']}{setting(identity['img_size'], identity['seed'])}"
    ablation = "ablation" if identity["split"] == "held-out" else ""
    return folder / ablation / f"{name}@{identity['engine']}.json"


def reusable_row(path: Path, identity: dict) -> dict | None:
    """Return the row at `path`, None if there is none.

    BadInput if it is of other weights, images or settings than `identity`, or no row.
    """
    if not path.exists():
        return None
    row = read_row(path)
    there = [name for name in identity if name in row or name not in LATER]
    differing = [name for name in there if comparable(row[name]) != comparable(identity[name])]
    if differing:
        raise BadInput(
            f"{path} holds a row with another {', '.join(differing)}: "
            "--force replaces it, --output keeps both"
        )
    return row


def comparable(value):
    """Return a field of a row to be compared, a recipe without its title, which may change."""
    return {k: v for k, v in value.items() if k != "title"} if isinstance(value, dict) else value


def row_files(folder) -> list[Path]:
    """Return the files of all rows, also of those that are not shown."""
    return sorted((*Path(folder).glob("*/*@*.json"), *Path(folder).glob("*/ablation/*@*.json")))


def load_rows(folder, checkpoints) -> list[dict]:
    """Return the rows measured with the usual numbers of calibration images and timed calls.

    Of CIFAR-10, they are those of shipped weights on all images, at any image size and seed. Of
    detection and segmentation, they are those on test images with seed 0, at the side that the
    network was trained at.
    """
    shipped = {sha256(path) for path in Path(checkpoints).glob("*/best.pth")}

    def belongs(row):
        if not has_predictions(row):
            return in_main_tables(row)
        return row["checkpoint_sha256"] in shipped and is_full(row)

    rows = [read_row(path) for path in row_files(folder)]
    return [row for row in rows if is_usual(row) and belongs(row)]


def is_full(row: dict) -> bool:
    """Say whether a row was measured on all images of CIFAR-10."""
    return row["task"] == "cifar10" and row["n_images"] == FULL[row["split"]]


def is_usual(row: dict) -> bool:
    """Say whether a row was measured with the usual numbers of calibration images and calls."""
    usual = {"calibration_images": row["recipe"]["calibration_images"], "latency_runs": 100}
    return all(row[name] == value for name, value in usual.items())


def in_main_tables(row: dict) -> bool:
    """Say whether a row belongs in the main tables."""
    return all(row[name] == value for name, value in MAIN_TABLES.items())
