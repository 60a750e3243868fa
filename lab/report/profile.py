"""A profile's columns, and its table as CSV.

A profile says what quantization does to each tensor (`quantize.py --profile`); where time goes is
what `lab.bench profile` measures.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass

from lab.report.tables import cell, markdown

PRINTED = 10  # tensors


@dataclass(frozen=True)
class Column:
    """A column of the table. What it means is told in profile_page.html.

    `value(tensor)` is None where there is no such number; `text(value)` is what the table shows.
    """

    title: str
    value: Callable[[dict], object]
    text: Callable[[object], str] = str


def number(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:.{digits}f}"


def short(value: float) -> str:
    """Return a number with three digits that count."""
    return f"{value:.3g}"


def share(value: float) -> str:
    """Return a share in percent, and 0 only where there is none."""
    return "0" if value == 0 else f"{100 * value:.3g}"


def cumulative(tensor: dict, name: str):
    return tensor["cumulative"] and tensor["cumulative"][name]


COLUMNS = {
    "layer": Column("Layer", lambda t: t["layer"]),
    "role": Column("Tensor", lambda t: t["role"]),
    "format": Column("Format", lambda t: t["format"]),
    "noise": Column("Noise", lambda t: t["noise"], short),
    "qsnr_db": Column("QSNR alone, dB", lambda t: t["local"]["qsnr_db"], number(1)),
    "cumulative_db": Column("QSNR in network, dB", lambda t: cumulative(t, "qsnr_db"), number(1)),
    "worst_channel_db": Column(
        "Worst channel, dB", lambda t: t["local"]["worst_channel_db"], number(1)
    ),
    "mse": Column("MSE alone", lambda t: t["local"]["mse"], short),
    "mse_over_rounding": Column("MSE / (s²/12)", lambda t: t["mse_over_rounding"], number(2)),
    "cumulative_mse": Column("MSE in network", lambda t: cumulative(t, "mse"), short),
    "cosine": Column(
        "Cosine in network", lambda t: (t["cumulative"] or t["local"])["cosine"], number(5)
    ),
    "codes_used": Column("Codes used, %", lambda t: t["codes_used"] / t["n_codes"], share),
    "clipped": Column("Clipped, %", lambda t: t["clipped_low"] + t["clipped_high"], share),
    "outliers": Column("Outliers, %", lambda t: t["outliers"], share),
    "outliers_quantized": Column("Outliers left, %", lambda t: t["outliers_quantized"], share),
    "kurtosis": Column("Kurtosis", lambda t: t["kurtosis"], number(1)),
    "distance": Column("Divergence, σ", lambda t: t["distance_sigmas"], short),
    "fisher": Column("Fisher score", lambda t: t["fisher"], short),
    "row_sum": Column("Row sum", lambda t: t["row_sums"] and t["row_sums"]["mean"], number(4)),
}
WORDS = ("layer", "role", "format")  # columns that hold no numbers
INFINITE = ("qsnr_db", "cumulative_db", "worst_channel_db")  # where nothing was lost


def cell_text(name: str, tensor: dict) -> str:
    """Return what the table shows of a tensor in a column."""
    value = COLUMNS[name].value(tensor)
    if value is not None:
        return COLUMNS[name].text(value)
    of_weight = name == "cumulative_db" and tensor["cumulative"] is None
    return "∞" if name in INFINITE and not of_weight else "–"


def csv_text(profile: dict) -> str:
    """Return the table of a profile as CSV: a line a tensor, worst first.

    Columns are COLUMNS and what a tensor's section shows besides.
    """
    more = ("bits", "n_scales", "n_values", "n_codes", "min", "max", "mean", "sigma")
    more += ("clipped_low", "clipped_high")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    pairs = ("range", "scale", "zero_point")
    writer.writerow([*COLUMNS, *more, *(f"{p}_{end}" for p in pairs for end in ("low", "high"))])
    for tensor in profile["tensors"]:
        values = [column.value(tensor) for column in COLUMNS.values()]
        ends = [end for pair in pairs for end in tensor[pair] or (None, None)]
        writer.writerow([*values, *(tensor[name] for name in more), *ends])
    return out.getvalue()


def printed_profile(profile: dict) -> str:
    """Return the lines that quantize.py prints for a profile: accuracies, and the worst tensors."""
    scores = ", ".join(
        f"{which} {of_network['top1_pct']:.2f} % ({profile['n_changed'][which]} changed)"
        for which, of_network in profile["scores"].items()
    )
    names = ("layer", "role", "noise", "qsnr_db", "cumulative_db", "codes_used", "clipped")
    lines = [
        {COLUMNS[name].title: cell(cell_text(name, tensor)) for name in names}
        for tensor in profile["tensors"][:PRINTED]
    ]
    return f"Top-1 on {profile['split']} images: {scores}\n{markdown(lines)}"
