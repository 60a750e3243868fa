"""Your own photos: a folder with one sub-folder for each class, as torchvision's ImageFolder reads.

    DIR/cat/1.jpg  DIR/cat/2.png  DIR/dog/1.jpg ...                one folder, which `load` splits
    DIR/train/cat/1.jpg ...  and  DIR/test/cat/1.jpg ...           split already; val is test too

Classes are the sub-folders' names, sorted. Their images may lie in folders further down. Files
whose names do not end as an image's (.jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp) and
files and folders whose names begin with a dot are ignored.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lab.cli import BadInput
from lab.tasks import classification
from lab.tasks.batches import split
from lab.tasks.photo import at_indices, read_photo

objective = classification
CALIBRATION_SHARE = 5  # every fifth image
MAX_CALIBRATION = 1000  # images
# How a photo becomes a square of side S, as MobileViT is evaluated (its paper, section 4.1, and its
# code): the short side becomes S / crop, the middle is cut out. With `stretch` both sides do.
RESIZE = {"crop": 256 / 288, "interpolation": "bilinear", "stretch": False}
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Photos:
    """Image files, their labels int64 [N] and the names of the classes.

    What makes them the network's input: `resize`, as RESIZE says, and the mean and standard
    deviation per RGB channel of pixels in [0, 1], by default the pixels themselves.
    """

    files: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]
    normalize: dict = field(default_factory=lambda: {"mean": [0.0] * 3, "std": [1.0] * 3})
    resize: dict = field(default_factory=lambda: RESIZE)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices) -> "Photos":
        return replace(self, files=at_indices(self.files, indices), labels=self.labels[indices])

    def showing(self, path) -> "Photos":
        """Return the picture in a file in place of these; its label is -1."""
        return replace(self, files=(Path(path),), labels=torch.tensor([-1]))

    def inputs(self, img_size: int, device="cpu") -> Tensor:
        """Return all photos as the network's input, float32 [N, 3, S, S], channels-last.

        The files are decoded here, anew with every call.
        """
        photos = (read_photo(file) for file in self.files)
        images = torch.stack([_middle(photo, img_size, **self.resize) for photo in photos])
        images = images.to(device).contiguous(memory_format=torch.channels_last)
        mean, std = (
            torch.tensor(self.normalize[name], device=device).view(3, 1, 1)
            for name in ("mean", "std")
        )
        return (images / 255 - mean) / std


def _middle(image: Tensor, img_size: int, crop: float, interpolation: str, stretch: bool) -> Tensor:
    """Return an image uint8 [3, H, W] resized with antialiasing, then cropped: uint8 [3, S, S]."""
    from torchvision.transforms import v2  # two seconds, see cifar10
    from torchvision.transforms.v2.functional import center_crop, resize

    if not stretch:  # a strip's ends would be cut off anyway, but only after they had been enlarged
        image = center_crop(image, [min(n, 4 * min(image.shape[1:])) for n in image.shape[1:]])
    side = [int(img_size / crop)] * (2 if stretch else 1)
    image = resize(image, side, v2.InterpolationMode(interpolation), antialias=True)
    return center_crop(image, [img_size, img_size])


def load(data_dir, train: bool) -> Photos:
    """Return the photos to calibrate on (`train`) or the disjoint ones to evaluate on.

    With DIR/train and DIR/test (or else DIR/val) these are the two. Otherwise a fifth of DIR's
    images, at most 1,000, are for calibration and all others for evaluation: drawn at random, the
    same in every run, and from each class the same number (+-1) as far as it has as many.

    Raises BadInput for a folder that is not laid out like this.
    """
    folder = Path(data_dir)
    if _folders(folder / "train"):
        evaluation = _evaluation(folder)
        photos = {part: _scan(part) for part in (folder / "train", evaluation)}
        _require_equal_classes(*photos.items())
        return photos[folder / "train" if train else evaluation]
    photos = _scan(folder)
    n = min(len(photos) // CALIBRATION_SHARE, MAX_CALIBRATION)
    if n == 0:
        raise BadInput(f"{folder} has {len(photos)} images, but needs {CALIBRATION_SHARE} or more")
    evaluation, calibration = split(photos.labels, n)
    return photos[calibration if train else evaluation]


def load_all(data_dir) -> Photos:
    """Return all photos of a folder of classes, or those of its test or val folder."""
    folder = Path(data_dir)
    return _scan(_evaluation(folder) if _folders(folder / "train") else folder)


def _evaluation(folder: Path) -> Path:
    """Return the folder of photos to evaluate on beside DIR/train."""
    for part in (folder / "test", folder / "val"):
        if _folders(part):
            return part
    raise BadInput(f"{folder} has a train folder of classes, but no such test or val")


def _scan(folder: Path) -> Photos:
    """Return all photos of a folder with one sub-folder for each class.

    First comes the first of each class, then the second: any first so many have all classes alike.
    """
    if not folder.is_dir():
        raise BadInput(f"no folder at {folder}: name the one with a sub-folder for each class")
    classes = _folders(folder)
    if len(classes) < 2:
        there = f"only {classes[0]}" if classes else "none"
        raise BadInput(f"{folder} should have a sub-folder for each class, but has {there}")
    files = {name: _images(folder / name) for name in classes}
    empty = [name for name in classes if not files[name]]
    if empty:
        raise BadInput(
            f"{folder / empty[0]} has no image ({' '.join(_EXTENSIONS)}): "
            f"each sub-folder is a class, {len(empty)} of {len(classes)} have none"
        )
    order = sorted((i, k) for k, name in enumerate(classes) for i in range(len(files[name])))
    labels = torch.tensor([k for _, k in order])
    return Photos(tuple(files[classes[k]][i] for i, k in order), labels, tuple(classes))


def _folders(folder: Path) -> list[str]:
    """Return the names of a folder's sub-folders, sorted; none if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and e.name[0] != ".")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(error) from error


def _images(folder: Path) -> list[Path]:
    """Return the image files in a folder and below it, sorted."""

    def stop(error: OSError):  # os.walk leaves out what it can't read unless told otherwise
        raise _unreadable(error)

    found = []
    for place, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if name[0] != "."]
        images = [name for name in names if name.lower().endswith(_EXTENSIONS)]
        found += [Path(place, name) for name in images if name[0] != "."]
    return sorted(found)


def _unreadable(error: OSError) -> BadInput:
    return BadInput(f"cannot read {error.filename}: {error.strerror}")


def _require_equal_classes(train: tuple[Path, Photos], evaluation: tuple[Path, Photos]) -> None:
    for (here, ours), (there, theirs) in ((train, evaluation), (evaluation, train)):
        missing = [name for name in theirs.classes if name not in ours.classes]
        if missing:
            raise BadInput(f"{here} lacks the class {missing[0]}, which {there} has")
