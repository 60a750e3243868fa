"""What fewer changed predictions cost in bytes and in energy, by the way that widths are chosen.

Near FP32, accuracies differ by a few images, by chance; how many predictions change is less noisy.
"""

import re

from lab.files import MB
from lab.report import style
from lab.report.energy import SIMULATED, energy_mj
from lab.report.results import Results
from lab.report.tables import baseline_of, changed_predictions, models_of, short_name

MIXED = r"mixed-[^-]+(-.*)?"  # the name of a recipe, with what it has besides a budget
UNIFORM = ("w4a8", "w5a8", "w6a8", "w8a8")  # the same inputs, one width for all weights
PEERS = {"int8-nncf": "NNCF", "int8-nncf-control": "NNCF, accuracy-aware"}
SAME_BYTES = 1.01  # sizes that differ by no more than this factor count as equal


def series_of(row: dict) -> str | None:
    """The line or kind of points that a row belongs to in the figure."""
    name, engine = row["recipe"]["name"], row["engine"]
    if name in PEERS:
        return PEERS[name]
    if engine != SIMULATED:
        return None
    if mixed := re.fullmatch(MIXED, name):
        return "a width for each layer" + (f" (mixed{mixed[1]})" if mixed[1] else "")
    return "one width for all" if name in UNIFORM else None


def tradeoffs(found: Results):
    """Changed predictions by size and by energy, a line a way to choose widths, a row a model."""
    rows = [row for row in found.rows if series_of(row) and baseline_of(row, found.rows)]
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
                    (cost(row), changes(row, found.rows))
                    for row in rows
                    if (row["model"], series_of(row)) == (model, name) and cost(row) is not None
                )
                line = "o" if name in PEERS.values() else "o-"
                if points:
                    axis.plot(*zip(*points), line, color=colour[name], ms=5)
            axis.set_xlabel(label)
        panels[0].set_ylabel(f"{short_name(model)}, changed predictions")
        panels[0].set_ylim(bottom=0)
    handles = [axes[0][0].plot([], [], "o", color=colour[name], label=name)[0] for name in series]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return fig


def series_order(row: dict) -> tuple:
    return (row["recipe"]["name"] in PEERS, row["recipe"]["name"] in UNIFORM, series_of(row))


def changes(row: dict, rows: list[dict]) -> int:
    """How many predictions of a row are not those of FP32."""
    return changed_predictions(row, baseline_of(row, rows))


def gains(rows: list[dict]) -> list[int]:
    """How many predictions fewer the best mixed recipe of no more bytes changes than each width.

    The least and the largest width are left out: mixed recipes lie between them.
    """
    found = []
    for row in rows:
        if row["recipe"]["name"] not in UNIFORM[1:-1]:
            continue
        mixed = [
            changes(other, rows)
            for other in rows
            if other["model"] == row["model"]
            and re.fullmatch(MIXED, other["recipe"]["name"])
            and other["size_bytes"] <= SAME_BYTES * row["size_bytes"]
        ]
        if mixed:
            found.append(changes(row, rows) - min(mixed))
    return found


def finding(rows: list[dict]) -> str:
    """What a width for each layer gives at the bytes of one for all."""
    fewer = gains(rows)
    if not fewer:
        return "Changed predictions by size and energy, by how widths are chosen"
    least, most = min(fewer), max(fewer)
    if least < 0 < most:
        span = f"from {-least} predictions more to {most} fewer"
    else:
        ends = sorted(map(abs, (least, most)))
        span = " to ".join(dict.fromkeys(map(str, ends)))
        span += " predictions " + ("more" if least < 0 else "fewer")
    return f"At the bytes of one width for all layers, a width for each changes {span}"
