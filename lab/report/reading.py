"""What rows say: what was done to which network, how well it does, and beside which others."""

from collections import Counter

from lab.report.rows import has_predictions, metric

MODELS = ("mobilevit_xxs", "mobilevit_xs", "mobilevit_s")  # first and in this order; then others
KINDS = ("measured", "integer", "simulated")
TITLES = {  # the published protocol
    "fp32": "FP32",
    "fp16": "FP16 weights",
    "int8-fx": "INT8, torch FX",
    "int4-percentile": "INT4 weights, 1-99 percentile",
}
BASELINE = ("fp32", "torch-eager")
SIZE_SWEEP = ("fp32", "w8a8")  # recipes of the sweep over input sides, on OpenVINO


def order(name: str, known) -> tuple[int, str]:
    """Return a key that sorts names as in `known`; others follow by name."""
    known = list(known)
    return known.index(name) if name in known else len(known), name


def model_order(model: str) -> tuple[int, str]:
    return order(model, MODELS)


def short_name(model: str) -> str:
    """Return a model as figures and columns call it: XXS for mobilevit_xxs."""
    return model.removeprefix("mobilevit_").upper() if model in MODELS else model


def title_of(recipe: str) -> str:
    return TITLES.get(recipe, recipe)


def in_order(rows: list[dict]) -> list[dict]:
    """Sort rows by model from small to large, by image size, by kind, then as in TITLES."""

    def key(row):
        return (
            model_order(row["model"]),
            row["img_size"],
            KINDS.index(row["kind"]),
            order(row["recipe"]["name"], TITLES),
            not is_baseline(row),
        )

    return sorted(rows, key=key)


def models_of(rows: list[dict]) -> list[str]:
    return sorted({row["model"] for row in rows}, key=model_order)


def accuracy(row: dict) -> float:
    """Return in percent the accuracy or, of a detector or segmenter, what it is judged by."""
    return row["score"][metric(row)]


def baseline_of(row: dict, rows: list[dict]) -> dict | None:
    """Return the FP32 row of the same checkpoint in torch, None if it is not among `rows`."""
    same = (r for r in rows if r["checkpoint_sha256"] == row["checkpoint_sha256"])
    return next((r for r in same if is_baseline(r)), None)


def method(row: dict) -> tuple[str, str]:
    """Return what was done, and by which engine."""
    return row["recipe"]["name"], row["engine"]


def is_baseline(row: dict) -> bool:
    return method(row) == BASELINE


def in_protocol(row: dict) -> bool:
    """Say whether it is one of the published re-implementation's four rows, all of classifiers."""
    recipe, engine = method(row)
    ran = engine in (BASELINE[1], "torch-fx", "published")
    return recipe in TITLES and ran and has_predictions(row)


def changed_predictions(row: dict, baseline: dict) -> int:
    """Count the images whose predicted class differs between two rows of the same images."""
    return sum(a != b for a, b in zip(row["predictions"], baseline["predictions"], strict=True))


def simulated_row(row: dict, rows: list[dict], engine: str = BASELINE[1]) -> dict | None:
    """Return the row of the same recipe on the same images, simulated by `engine`, or None.

    GPTQ's codes depend on the CPU, so it is one from a CPU of the same name.
    """

    def setting(of):
        same = ("checkpoint_sha256", "split", "img_size", "seed", "n_images", "cpu")
        return of["recipe"]["name"], *(of[name] for name in same)

    others = (r for r in rows if (r["kind"], r["engine"]) == ("simulated", engine) and r is not row)
    return next((other for other in others if setting(other) == setting(row)), None)


def agreement_pct(row: dict, other: dict) -> float:
    """Return the percentage of images on which two rows predict the same."""
    return 100 - 100 * changed_predictions(row, other) / row["n_images"]


def speed_up(row: dict) -> float:
    """Return how many times as fast as FP32 in torch at the side the network was trained for.

    The two were timed in turn.
    """
    return row["fp32_latency_ms"]["median"] / row["latency_ms"]["median"]


def cpu_kind(row: dict) -> str:
    """Return the instructions of a row's CPU. Speed-ups compare only between rows of one kind."""
    return row["cpu"].rpartition(", ")[2]


def has_vnni(row: dict) -> bool:
    return "VNNI" in cpu_kind(row)


def on_usual_cpu(rows: list[dict]) -> list[dict]:
    """Return the rows from the kind of CPU that most are from."""
    counts = Counter(map(cpu_kind, rows))
    return [row for row in rows if cpu_kind(row) == max(counts, key=counts.get)]


def by_side(rows: list[dict]) -> dict[tuple[str, int], dict[str, dict]]:
    """Return {(model, side of the image): {recipe: row}}, in the order of `rows`."""
    found = {}
    for row in rows:
        found.setdefault((row["model"], row["img_size"]), {})[row["recipe"]["name"]] = row
    return found
