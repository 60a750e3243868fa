"""A row that was measured again beside the shipped one, and whether the two agree."""

from lab.files import MB
from lab.report.reading import accuracy, changed_predictions, speed_up
from lab.report.rows import METRICS, has_predictions, metric

POINTS, CHANGED_PCT, SIZE_PCT = 0.5, 2.0, 1.0  # how far the two may be apart
TOLERANCE = (
    f"Agree: accuracy within {POINTS} points, at most {CHANGED_PCT:g} % of the predictions "
    f"changed, size within {SIZE_PCT:g} %."
)


def compare_rows(shipped: dict, measured: dict, labels: list[int]) -> tuple[dict[str, str], bool]:
    """Return a line of a table, shipped value before measured one, and whether the two agree.

    They are compared on the images that were measured, the first of the shipped row's, whose
    `labels` these are. They agree if accuracy is within POINTS, all but CHANGED_PCT of the
    predictions are the same, and size is within SIZE_PCT. Rows without predictions are of the same
    images. Speed is shown, not judged.
    """
    n = measured["n_images"]
    shipped_pct, changed_pct, changed = accuracy(shipped), 0.0, "-"
    if has_predictions(shipped):
        theirs = shipped["predictions"][:n]
        shipped_pct = 100 * sum(a == b for a, b in zip(theirs, labels, strict=True)) / n
        changed_pct = 100 * changed_predictions(measured, {"predictions": theirs}) / n
        changed = f"{changed_pct:.2f} %"
    measured_pct = accuracy(measured)
    size_pct = 100 * (measured["size_bytes"] / shipped["size_bytes"] - 1)
    agree = (
        abs(shipped_pct - measured_pct) <= POINTS
        and changed_pct <= CHANGED_PCT
        and abs(size_pct) <= SIZE_PCT
    )
    line = {
        "Model": shipped["model"],
        "Row": f"{shipped['recipe']['name']}@{shipped['engine']}",
        f"{METRICS[metric(shipped)]} %": f"{shipped_pct:.2f} / {measured_pct:.2f}",
        "Changed": changed,
        "MB": f"{shipped['size_bytes'] / MB:.2f} / {measured['size_bytes'] / MB:.2f}",
        "Faster": f"{speed_up(shipped):.2f}x / {speed_up(measured):.2f}x",
        "Agree": "yes" if agree else "NO",
    }
    return line, agree
