"""Benchmark files: what each kind holds, and which of their entries are of today's recipes."""

from pathlib import Path

from lab.cli import BadInput
from lab.files import read_json
from lab.report.ablations import BASE
from lab.report.rows import RECIPE, comparable
from lab.schema import integer, mapping, number, record, sequence, text

ABOVE_ZERO = number(1e-9)  # of what something is divided by
VARIANT = record(
    {
        "title": text,
        "parameters": integer(1),
        "macs": integer(1),
        "val_accuracy_pct": sequence(number(0, 100)),
    }
)
OF_RECIPES = {"model": text, "cpu": text, "recipes": mapping(RECIPE)}
SCHEMAS = {
    "engines": record(
        OF_RECIPES
        | {
            "engine_versions": mapping(text),
            "latency_ms": mapping(record({"median": ABOVE_ZERO})),
        }
    ),
    "profile": record(OF_RECIPES | {"ms": mapping(mapping(number(0)))}),
    "train": record(
        {
            "model": text,
            "img_size": integer(1),
            "precision": text,
            "hardware": text,
            "timm": text,
            "images_per_s": mapping(ABOVE_ZERO),
            "ratio": mapping(ABOVE_ZERO),
        }
    ),
    "loader": record(
        {
            "img_size": integer(1),
            "device": text,
            "loader_images_per_s": mapping(ABOVE_ZERO),
            "training_images_per_s": ABOVE_ZERO,
        }
    ),
    "abuse": record({"kinds": mapping(record({"inputs": integer(1), "faults": integer(0)}))}),
    "ablations": record(
        {
            "steps": integer(1),
            "batch_size": integer(1),
            "img_size": integer(1),
            "precision": text,
            "trained_on": sequence(text),
            "n_val": integer(1),
            "variants": mapping(VARIANT),
        }
    ),
}


def load_benchmarks(results, rows: list[dict]) -> dict[str, list[dict]]:
    """Return {kind: benchmarks of that kind} under `results`.

    The kind is the first word of a file's name. Speeds of recipes that no row has as they were
    timed are left out: these have changed since. BadInput for a file that does not fit its kind.
    """
    found = {kind: [] for kind in SCHEMAS}
    for path in sorted(Path(results, "benchmarks").glob("*.json")):
        kind = path.stem.split("-")[0]
        if kind in SCHEMAS:
            bench = read_json(path)
            SCHEMAS[kind](bench, str(path))
            check_names(kind, bench, path)
            found[kind].append(up_to_date(kind, bench, rows))
    return found


def check_names(kind: str, bench: dict, path) -> None:
    """Raise BadInput where one field of a benchmark names what another does not have."""
    if kind == "engines":
        for name in bench["latency_ms"]:
            if name.partition("@")[2] not in bench["engine_versions"]:
                raise BadInput(f"{path}: engine_versions has no engine of {name!r}")
    if kind == "train":
        missing = {"ours", *bench["ratio"]} - bench["images_per_s"].keys()
        if missing:
            raise BadInput(f"{path}: images_per_s lacks {', '.join(sorted(missing))}")
    if kind == "ablations":
        if BASE not in bench["variants"]:
            raise BadInput(f"{path}: variants lacks {BASE}")
        for name, variant in bench["variants"].items():
            if not variant["val_accuracy_pct"]:
                raise BadInput(f"{path}: {name} has no accuracy")


def up_to_date(kind: str, bench: dict, rows: list[dict]) -> dict:
    """Return the benchmark without the times of recipes that differ from those of all rows."""
    field = {"engines": "latency_ms", "profile": "ms"}.get(kind)
    if field is None:
        return bench
    of_rows = [comparable(row["recipe"]) for row in rows]
    current = {name for name, recipe in bench["recipes"].items() if comparable(recipe) in of_rows}
    times = {k: v for k, v in bench[field].items() if k.partition("@")[0] in current}
    return bench | {field: times}
