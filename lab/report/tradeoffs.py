"""What less noise in the logits costs in bytes and in energy, by the way that widths are chosen.

Near FP32, accuracies and changed predictions differ by a few images, by chance.
"""

import re

from lab.files import MB
from lab.report import style
from lab.report.energy import SIMULATED, energy_mj
from lab.report.reading import models_of, short_name
from lab.report.results import Results

MIXED = r"mixed-[^-]+(-.*)?"  # the name of a recipe, with what it has besides a budget
UNIFORM = ("w4a8", "w5a8", "w6a8", "w8a8")  # the same inputs, one width for all weights
PEERS = {"int8-nncf": "NNCF", "int8-nncf-control": "NNCF, accuracy-aware"}
SAME_BYTES = 1.01  # sizes that differ by no more than this factor count as equal


def series_of(row: dict) -> str | None:
    """Return the line or kind of points that a row belongs to in the figure, None if to none."""
    name, engine = row["recipe"]["name"], row["engine"]
    if "logit_noise" not in row:
        return None
    if name in PEERS:
        return PEERS[name]
    if engine != SIMULATED:
        return None
    if mixed := re.fullmatch(MIXED, name):
        return "a width for each layer" + (f" (mixed{mixed[1]})" if mixed[1] else "")
    return "one width for all" if name in UNIFORM else None


def tradeoffs(found: Results):
    """Draw noise in the logits by size and energy: a line a way to choose widths, a row a model."""
    rows = [row for row in found.rows if series_of(row)]
    models = models_of([r for r in rows if re.fullmatch(MIXED, r["recipe"]["name"])])
    if not models:
        return None
    rows = [row for row in rows if row["model"] in models]
    series = list(dict.fromkeys(map(series_of, sorted(rows, key=series_order))))
    colour = style.colours(series)
    costs = {
        "size of the file, MB": lambda row: row["size_bytes"] / MB,
        "energy of an image by the model, mJ": energy_mj,
    }
    height = 0.9 + 2.6 * len(models)
    fig, axes = style.canvas(len(models), 2, height, finding(found.rows), sharey="row")
    for model, panels in zip(models, axes):
        for axis, (label, cost) in zip(panels, costs.items()):
            for name in series:
                points = sorted(
                    (cost(row), row["logit_noise"])
                    for row in rows
                    if (row["model"], series_of(row)) == (model, name) and cost(row) is not None
                )
                line = "o" if name in PEERS.values() else "o-"
                if points:
                    axis.plot(*zip(*points), line, color=colour[name], ms=5)
            axis.set_xlabel(label)
        panels[0].set_ylabel(f"{short_name(model)}, noise in the logits")
        panels[0].set_yscale("log")
    handles = [axes[0][0].plot([], [], "o", color=colour[name], label=name)[0] for name in series]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return fig


def series_order(row: dict) -> tuple:
    return (row["recipe"]["name"] in PEERS, row["recipe"]["name"] in UNIFORM, series_of(row))


def gains(rows: list[dict]) -> list[float]:
    """Return how many times less noise the best mixed recipe has than each width, at its bytes.

    A mixed recipe counts if its file is at most SAME_BYTES times as large. The least and the
    largest width are left out: mixed recipes lie between them.
    """
    found = []
    rows = [row for row in rows if series_of(row)]
    for row in rows:
        if row["recipe"]["name"] not in UNIFORM[1:-1]:
            continue
        mixed = [
            other["logit_noise"]
            for other in rows
            if other["model"] == row["model"]
            and re.fullmatch(MIXED, other["recipe"]["name"])
            and other["size_bytes"] <= SAME_BYTES * row["size_bytes"]
        ]
        if mixed:
            found.append(row["logit_noise"] / min(mixed))
    return found


def finding(rows: list[dict]) -> str:
    """Say what a width for each layer gives at the bytes of one for all."""
    times = gains(rows)
    if not times:
        return "Noise in the logits by size and energy, by how widths are chosen"
    span = " to ".join(dict.fromkeys(f"{t:.2f}" for t in (min(times), max(times))))
    return f"At the bytes of one width for all layers, a width for each has {span} times less noise"
