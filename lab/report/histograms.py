"""Histograms of a profile's tensors as sheets of PNG."""

from pathlib import Path

import numpy as np

from lab.report import style

SHEET_ROWS, SHEET_COLUMNS = 6, 4  # histograms on one sheet


def write_histograms(profile: dict, folder: Path) -> list[Path]:
    """Write sheets of histograms as PNG into `folder`, worst tensors first; return their paths.

    Values in float fill an area, quantized ones are a line. Heights are logarithms of counts.
    """
    tensors, per_sheet = profile["tensors"], SHEET_ROWS * SHEET_COLUMNS
    paths = []
    for first in range(0, len(tensors), per_sheet):
        shown = tensors[first : first + per_sheet]
        path = folder / f"histograms-{first // per_sheet + 1:02}.png"
        style.save(histogram_sheet(shown), path, dpi=100)
        paths.append(path)
    return paths


def histogram_sheet(tensors: list[dict]):
    size = (4 * SHEET_COLUMNS, 2 * SHEET_ROWS)
    fig, axes = style.plt.subplots(SHEET_ROWS, SHEET_COLUMNS, figsize=size)
    fig.subplots_adjust(0.02, 0.03, 0.98, 0.96, wspace=0.08, hspace=0.55)
    for axis in axes.flat[len(tensors) :]:
        axis.axis("off")
    for axis, tensor in zip(axes.flat, tensors):
        picture = tensor["histogram"]
        edges = np.linspace(picture["low"], picture["high"], len(picture["float"]) + 1)
        axis.stairs(np.log1p(picture["float"]), edges, fill=True, color=style.SKY)
        axis.stairs(np.log1p(picture["quantized"]), edges, color=style.VERMILION, linewidth=0.8)
        axis.set_yticks([])
        axis.set_title(f"{tensor['layer']}, {tensor['role']}", fontsize=style.SMALL, loc="left")
    return fig
