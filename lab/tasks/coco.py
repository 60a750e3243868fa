"""Pictures with boxes: COCO's annotation files, as detection reads them.

    DIR/train.json  DIR/val.json  DIR/test.json            COCO instances
    DIR/train/...   DIR/val/...   DIR/test/...             the files that they name

val chooses the weights, test judges them. Classes are the categories by rising id, the same in all
three files; a category that no box has is a class, too. A box is cut off at the edges of its image;
one that has no area then, or lies outside, is left out, as is an image of train without any box
that is left. Boxes of crowds are not learnt; when a detector is judged, what lies within one counts
neither for nor against it. Everything else that is not as COCO's format says ends in one line.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lab.cli import BadInput
from lab.files import read_json
from lab.schema import integer, number, one_of, record, sequence, text
from lab.tasks import detection, photo
from lab.tasks.photo import at_indices, header, read_photo, squares

objective = detection
to_input = photo.to_input
MAX_SIDE = 10**5  # pixels of an image

COCO = record(
    {
        "images": sequence(
            record(
                {
                    "id": integer(),
                    "file_name": text,
                    "width": integer(1, MAX_SIDE),
                    "height": integer(1, MAX_SIDE),
                }
            )
        ),
        "annotations": sequence(
            record(
                {"image_id": integer(), "category_id": integer(), "bbox": sequence(number(), 4)},
                optional={"iscrowd": one_of(0, 1)},
            )
        ),
        "categories": sequence(record({"id": integer(), "name": text})),
    }
)


@dataclass(frozen=True)
class Scenes:
    """Image files with the objects in them.

    `labels`: float32 [N, n, 6], for each object its box (x1, y1, x2, y2) in fractions of the
    image's sides, its class from 0, and 1 if it is a crowd. Rows of class -1 stand for nothing.
    """

    files: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices) -> "Scenes":
        return replace(self, files=at_indices(self.files, indices), labels=self.labels[indices])

    def showing(self, path) -> "Scenes":
        """Return the picture in a file in place of these, with no object in it."""
        return replace(self, files=(Path(path),), labels=torch.zeros(1, 0, 6))

    @property
    def has_objects(self) -> Tensor:
        """Say whether there is anything to learn in a picture, bool [N]."""
        return ((self.labels[..., 4] >= 0) & (self.labels[..., 5] == 0)).any(1)

    def inputs(self, img_size: int, device="cpu") -> Tensor:
        """Return all pictures as the network's input float32 [N, 3, S, S], stretched to squares.

        The files are decoded here, anew with every call.
        """
        return squares([read_photo(file) for file in self.files], img_size, device)


def load(data_dir, train: bool) -> Scenes:
    """Return the scenes to train on, or those to test on."""
    if not train:
        return _read(data_dir, "test")
    scenes = _read(data_dir, "train")
    return scenes[scenes.has_objects.nonzero().flatten()]


def load_val(data_dir) -> Scenes:
    """Return the scenes to choose weights on."""
    return _read(data_dir, "val")


def _read(data_dir, part: str) -> Scenes:
    detection.pycocotools()  # before any work: it may be missing
    path, folder = Path(data_dir, f"{part}.json"), Path(data_dir, part)
    if not path.is_file():
        raise BadInput(f"no annotations at {path}: name the folder of train.json with --data-dir")
    content = read_json(path)
    COCO(content, str(path))
    images, names = content["images"], {c["id"]: c["name"] for c in content["categories"]}
    if not images or not names:
        raise BadInput(f"{path} has {len(images)} images and {len(names)} categories")
    for what in ("images", "categories"):
        ids = [entry["id"] for entry in content[what]]
        if len(set(ids)) < len(ids):
            raise BadInput(f"{path}: two {what} have the same id")
    if len(set(names.values())) < len(names):
        raise BadInput(f"{path}: two categories have the same name")
    place = {image["id"]: i for i, image in enumerate(images)}
    number = {category: k for k, category in enumerate(sorted(names))}
    objects = [[] for _ in images]
    for k, annotation in enumerate(content["annotations"]):
        for field, known in (("image_id", place), ("category_id", number)):
            if annotation[field] not in known:
                raise BadInput(f"{path}: annotations[{k}] has {field} {annotation[field]}, no such")
        i = place[annotation["image_id"]]
        box = _fractions(annotation["bbox"], images[i]["width"], images[i]["height"])
        if box:
            kind = number[annotation["category_id"]]
            objects[i].append((*box, kind, annotation.get("iscrowd", 0)))
    files = tuple(folder / image["file_name"] for image in images)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise BadInput(f"no image at {missing[0]}, which {path} names ({len(missing)} are missing)")
    for file, image in zip(files, images):
        (size, _), said = header(file), (image["width"], image["height"])
        if size != said:
            what = "{} has {}x{} pixels, its annotations say {}x{}"
            raise BadInput(what.format(file, *size, *said))
    labels = torch.zeros(len(images), max(map(len, objects)), 6)
    labels[..., 4] = -1
    for row, found in zip(labels, objects):
        if found:
            row[: len(found)] = torch.tensor(found)
    scenes = Scenes(files, labels, tuple(names[category] for category in sorted(names)))
    if not scenes.has_objects.any():
        raise BadInput(f"{path} has no box of any area that is no crowd's")
    return scenes


def _fractions(bbox: list[float], width: int, height: int) -> tuple[float, ...] | None:
    """Return the corners of a box in fractions of the image, cut off at its edges.

    `bbox` is (x, y, width, height) in pixels. None if nothing is left, in float32 as labels are.
    """
    x, y, w, h = bbox
    left, right, top, bottom = (
        float(np.float32(min(max(value, 0.0), 1.0)))
        for value in (x / width, (x + w) / width, y / height, (y + h) / height)
    )
    return (left, top, right, bottom) if left < right and top < bottom else None
