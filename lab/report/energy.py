"""Modelled energy of rows, in a table: what ptq.analysis.energy says, as their files hold it."""

from lab.files import MB
from lab.report.reading import accuracy, baseline_of, in_order, title_of
from lab.report.tables import cell, markdown

PJ_PER_MJ = 1e9
SIMULATED = "torch-eager"


def energy_mj(row: dict, prices: str = "horowitz") -> float | None:
    """Return the modelled energy of an image in mJ, None where a row has none."""
    found = row.get("energy")
    return found[prices]["total"] / PJ_PER_MJ if found else None


def energy_table(rows: list[dict]) -> str:
    """Return a table of accuracy, bytes and energy by two models.

    A line is a recipe whose formats are known.
    """
    lines = []
    for row in in_order([r for r in rows if r["engine"] == SIMULATED and r.get("energy")]):
        of_prices, baseline = row["energy"], baseline_of(row, rows)
        low, high = (energy_mj(row, prices) for prices in ("horowitz", "horowitz-high"))
        weights = of_prices["horowitz"]["weights"] / of_prices["horowitz"]["total"]
        seed = "-"
        if baseline and baseline.get("energy"):
            seed = f"{of_prices['seed']['total'] / baseline['energy']['seed']['total']:.3f}"
        lines.append(
            {
                "Model": cell(row["model"]),
                "Method": cell(title_of(row["recipe"]["name"])),
                "Accuracy %": f"{accuracy(row):.2f}",
                "MB": f"{row['size_bytes'] / MB:.2f}",
                "mJ an image": f"{low:.2f} to {high:.2f}",
                "Weights' share": f"{100 * weights:.0f} %",
                "Published model, of FP32": seed,
            }
        )
    return markdown(lines)
