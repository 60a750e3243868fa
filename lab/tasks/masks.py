"""Pictures with a class for every pixel, as segmentation reads them.

    DIR/classes.txt                                            the classes' names, one a line
    DIR/train/images/NAME.jpg   DIR/train/labels/NAME.png      and val, and test

or, laid out as PASCAL VOC,

    DIR/classes.txt
    DIR/JPEGImages/NAME.jpg     DIR/SegmentationClass/NAME.png
    DIR/ImageSets/Segmentation/train.txt                       and val, and test: a NAME a line

val chooses the weights, test judges them. A mask is a PNG of the image's size, gray or with a
palette, whose pixels are lines of classes.txt, from 0. Pixels of 255, and those of a class that is
called void, are neither learnt nor judged.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lab.cli import BadInput
from lab.tasks import photo, segmentation
from lab.tasks.photo import at_indices, header, read_photo, squares
from lab.tasks.segmentation import IGNORED, OUTSIDE

objective = segmentation
to_input = photo.to_input
MAX_CLASSES = 250  # of the 256 values of a pixel
_EXTENSIONS = (".jpg", ".jpeg", ".png")
_UNKNOWN = 253  # what a pixel becomes that is no line of classes.txt


@dataclass(frozen=True)
class Pictures:
    """Image files with their masks. `table` uint8 [256] turns a mask's pixels into classes."""

    files: tuple[Path, ...]
    masks: tuple[Path, ...]
    classes: tuple[str, ...]
    table: Tensor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices) -> "Pictures":
        files, masks = (at_indices(paths, indices) for paths in (self.files, self.masks))
        return replace(self, files=files, masks=masks)

    def showing(self, path) -> "Pictures":
        """Return the picture in a file in place of these, without a mask."""
        return replace(self, files=(Path(path),), masks=())

    @property
    def labels(self) -> Tensor:
        """Return the masks uint8 [N, H, W].

        Smaller ones are filled up with OUTSIDE at the right and below. The files are decoded here,
        anew with every call.
        """
        masks = [self.mask(i) for i in range(len(self))]
        height, width = (max(mask.shape[d] for mask in masks) for d in (0, 1))
        labels = torch.full((len(masks), height, width), OUTSIDE, dtype=torch.uint8)
        for row, mask in zip(labels, masks):
            row[: mask.shape[0], : mask.shape[1]] = mask
        return labels

    def mask(self, i: int) -> Tensor:
        """Return the classes of the pixels of image `i`, uint8 [H, W]; IGNORED for those of none.

        BadInput for a file that can't be read, and for pixels that are no line of classes.txt.
        """
        path = self.masks[i]
        try:
            with Image.open(path) as file:
                pixels = torch.from_numpy(np.array(file))
        except Exception as error:  # PIL's decoders raise many kinds, without a common base
            raise BadInput(f"{path} can't be read as a mask: {error}") from error
        mask = self.table[pixels.long()]
        if (mask == _UNKNOWN).any():
            unknown = int(pixels[mask == _UNKNOWN].max())
            raise BadInput(f"{path} has pixels of {unknown}, which is no line of classes.txt")
        return mask

    def inputs(self, img_size: int, device="cpu") -> Tensor:
        """Return all pictures as the network's input float32 [N, 3, S, S], stretched to squares."""
        return squares([read_photo(file) for file in self.files], img_size, device)


def load(data_dir, train: bool) -> Pictures:
    """Return the pictures to train on, or those to test on."""
    return _read(Path(data_dir), "train" if train else "test")


def load_val(data_dir) -> Pictures:
    """Return the pictures to choose weights on."""
    return _read(Path(data_dir), "val")


def _read(folder: Path, part: str) -> Pictures:
    names = _lines(folder / "classes.txt")
    if "" in names:
        raise BadInput(f"{folder / 'classes.txt'} has a blank line before its last name")
    if not 2 <= len(names) <= MAX_CLASSES or len(set(names)) < len(names):
        raise BadInput(f"{folder / 'classes.txt'} should have 2 to {MAX_CLASSES} different names")
    table = torch.full((256,), _UNKNOWN, dtype=torch.uint8)
    table[255] = IGNORED
    classes = tuple(name for name in names if name != "void")
    for line, name in enumerate(names):
        table[line] = IGNORED if name == "void" else classes.index(name)
    if (folder / "ImageSets").is_dir():
        lines = _lines(folder / "ImageSets" / "Segmentation" / f"{part}.txt")
        stems = [line for line in lines if line]
        files = tuple(folder / "JPEGImages" / f"{stem}.jpg" for stem in stems)
        masks = tuple(folder / "SegmentationClass" / f"{stem}.png" for stem in stems)
    else:
        images = folder / part / "images"
        if not images.is_dir():
            raise BadInput(f"no folder at {images}: name the one of train, val and test")
        files = tuple(sorted(p for p in images.iterdir() if p.suffix.lower() in _EXTENSIONS))
        masks = tuple(folder / part / "labels" / f"{file.stem}.png" for file in files)
    if not files:
        raise BadInput(f"{folder} has no images for {part}")
    for file, mask in zip(files, masks):
        _require_fitting(file, mask)
    return Pictures(files, masks, classes, table)


def _lines(path: Path) -> list[str]:
    """Return the lines of a text, but no blank ones at its end."""
    if not path.is_file():
        raise BadInput(f"no file at {path}: lab/tasks/masks.py says what --data-dir holds")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a text with a mark
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not text: {error}") from error
    return [line.strip() for line in text.rstrip().splitlines()]


def _require_fitting(file: Path, mask: Path) -> None:
    """Raise BadInput unless both files are there, of one size, the mask of one byte a pixel."""
    size, _ = header(file)
    mask_size, mode = header(mask)
    if mode not in ("L", "P"):
        raise BadInput(f"{mask} has pixels of kind {mode}, but a mask is gray or has a palette")
    if mask_size != size:
        raise BadInput("{} has {}x{} pixels, its image has {}x{}".format(mask, *mask_size, *size))
