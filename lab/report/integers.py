"""Networks of integers beside the simulations of the same recipe."""

from lab.report.reading import (
    BASELINE,
    accuracy,
    baseline_of,
    changed_predictions,
    in_order,
    simulated_row,
)
from lab.report.tables import EXACT, cell, markdown


def integers_table(rows: list[dict]) -> str:
    """Return a table of accuracy and of images that two arithmetics take for different classes.

    A line is a row of kind "integer".
    """
    lines = []
    for row in in_order([row for row in rows if row["kind"] == "integer"]):
        float32, float64 = (simulated_row(row, rows, engine) for engine in (BASELINE[1], EXACT))
        baseline = baseline_of(row, rows)
        lines.append(
            {
                "Model": cell(row["model"]),
                "Recipe": cell(row["recipe"]["name"]),
                "FP32 %": f"{accuracy(baseline):.2f}" if baseline else "-",
                "Integers %": f"{accuracy(row):.2f}",
                "Integers, float32": differing(row, float32),
                "Integers, float64": differing(row, float64),
                "float32, float64": differing(float32, float64),
            }
        )
    return markdown(lines)


def differing(row: dict | None, other: dict | None) -> str:
    return str(changed_predictions(row, other)) if row and other else "-"
