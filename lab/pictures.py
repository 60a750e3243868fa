"""What detectors and segmenters see in a photo, as a picture: float beside quantized."""

from math import ceil
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from lab.cli import BadInput
from lab.files import require_absent, require_writable
from lab.report import style
from lab.subject import Subject
from lab.tasks.boxes import detections
from lab.tasks.photo import read_photo

COLUMNS = 3  # panels in a row, at most
SHOWN_SCORE = 0.5  # of a box that is drawn
PAIRS = np.array(style.plt.get_cmap("tab20").colors)  # RGB: a dark, a light of each hue in turn
COLOURS = np.concatenate((PAIRS[::2], PAIRS[1::2]))  # of classes in turn: all the dark ones first


def picture_path(subject: Subject, image, output: str, force: bool) -> Path:
    """Return where the picture of a photo goes; BadInput if there can be none or if it is there."""
    if subject.task not in DRAWN:
        raise BadInput(f"--image: nothing is drawn of what networks for {subject.task} answer")
    path = Path(output, subject.folder, "pictures", f"{Path(image).stem}.png")
    require_absent(path, force)
    require_writable(path.parent)
    return path


def write_picture(path: Path, subject: Subject, image, outputs: dict[str, Tensor]) -> None:
    """Draw a photo with what each network sees in it, a panel for each; print the path.

    `outputs`: {title of the panel: the network's outputs for the photo, [1, ...]}.
    """
    photo = read_photo(image).permute(1, 2, 0)  # [H, W, 3]
    height, width, _ = photo.shape
    columns = min(COLUMNS, len(outputs))
    rows = ceil(len(outputs) / columns)
    panel_in = style.WIDTH_IN / columns * min(2, height / width) + 0.3  # with its title
    finding = f"{subject.name}: what it sees in {Path(image).name}"
    fig, axes = style.canvas(rows, columns, rows * panel_in + 1, finding)
    seen = set()
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, of_network) in zip(axes.flat, outputs.items()):
        axis.imshow(photo)
        axis.set_title(title)
        seen |= DRAWN[subject.task](axis, of_network, height, width)
    patches = [Patch(color=colour(k), label=subject.images.classes[k]) for k in sorted(seen)]
    fig.legend(handles=patches, loc="outside lower center", ncols=6)
    style.save(fig, path, dpi=150)
    print(path)


def draw_boxes(axis, outputs: Tensor, height: int, width: int) -> set[int]:
    """Draw the boxes that a detector is sure of; return which classes these are of.

    `outputs`: [1, A, 4 + K + 4], as lab.models.ssdlite gives them. `height`, `width`: the photo's
    sides in pixels.
    """
    (found,) = detections(outputs)
    seen = set()
    for x1, y1, x2, y2, _, kind in found[found[:, 4] >= SHOWN_SCORE].tolist():
        corner, size = (x1 * width, y1 * height), ((x2 - x1) * width, (y2 - y1) * height)
        axis.add_patch(Rectangle(corner, *size, fill=False, color=colour(int(kind)), linewidth=1.5))
        seen.add(int(kind))
    return seen


def draw_classes(axis, outputs: Tensor, height: int, width: int) -> set[int]:
    """Draw the likeliest class of each pixel; return which classes these are.

    `outputs`: logits [1, K, h, w]. `height`, `width`: the photo's sides in pixels.
    """
    classes = F.interpolate(outputs, (height, width), mode="bilinear")[0].argmax(0)
    axis.imshow(COLOURS[classes.numpy() % len(COLOURS)], alpha=0.6)
    return set(classes.unique().tolist())


def colour(k: int):
    return COLOURS[k % len(COLOURS)]


DRAWN = {"detection": draw_boxes, "segmentation": draw_classes}
