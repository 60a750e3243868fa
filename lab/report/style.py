"""How all figures look: colours, sizes, the sentence above each, and how they are saved."""

import textwrap
from pathlib import Path

import matplotlib

from lab.files import atomic

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTH_IN = 8.5  # 850 pixels at the 100 dpi of a README column
SMALL = 9  # points; no text is smaller
TITLE, TITLE_WIDTH = 11, 92  # points; characters that fit on a line
# Okabe and Ito's palette, told apart with any colour vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE = "#56B4E9", "#CC79A7"
GREY, LIGHT, DARK = "#8A8A8A", "#DDDDDD", "#333333"
SERIES = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE)
DASHED = {"color": GREY, "linestyle": (0, (4, 3)), "linewidth": 1}

plt.rcParams |= {
    "font.size": 10,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "svg.hashsalt": "mobilevit",  # the same names inside at every run
}


def canvas(rows: int, columns: int, height_in: float, finding: str, **how):
    """Return a figure with `finding`, a sentence, above its axes, and the axes [rows, columns].

    `how`: more for plt.subplots, such as sharey.
    """
    how |= {"squeeze": False, "layout": "constrained"}
    fig, axes = plt.subplots(rows, columns, figsize=(WIDTH_IN, height_in), **how)
    n_lines = -(-len(finding) // TITLE_WIDTH)
    width = len(finding) / n_lines + 8 * (n_lines > 1)  # lines of about the same length
    fig.suptitle(
        textwrap.fill(finding, int(width)), x=0.01, ha="left", fontsize=TITLE, fontweight="bold"
    )
    return fig, axes


def note(axis, text: str, at, offset_points=(0, 0), **how) -> None:
    """Write a small text at a point of the data, moved right and up by the offset."""
    how = {"fontsize": SMALL, "textcoords": "offset points"} | how
    axis.annotate(text, at, offset_points, **how)


def colours(names) -> dict[str, str]:
    """Return {name: its colour}; the palette starts anew where it is not enough."""
    return {name: SERIES[i % len(SERIES)] for i, name in enumerate(names)}


def save(fig, *paths: Path, dpi: int = 200) -> None:
    """Write a figure to files of the kinds that their suffixes say, and close it.

    These are the same bytes at every run.
    """
    for path in paths:
        with atomic(path) as tmp:
            fig.savefig(tmp, dpi=dpi, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(fig)
