"""Detection: SSD's augmentation, its loss, and mean average precision as COCO defines it.

SSD is that of Liu et al., ECCV 2016 (arXiv:1512.02325), section 2.2, as MobileViT's authors train
it. Targets are the `labels` of lab.tasks.coco.Scenes, outputs those of lab.models.ssdlite.
"""

import contextlib
import functools
import io

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.cli import BadInput
from lab.tasks import boxes
from lab.tasks.augment import Augmentation, seeded
from lab.tasks.photo import read_photo

METRIC, TRAIN_METRIC = "map50_pct", "matched_pct"
AUGMENT = ("none", "ssd")
NEGATIVES = 3  # anchors of the background that are learnt, for each that stands for an object
_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the intersection over union: COCO's


def batch(
    data, indices: Tensor, draws: Tensor, rng: np.random.Generator, augment: Augmentation, stage
) -> tuple[Tensor, Tensor]:
    """Return pictures uint8 [b, 3, S, S] of the stage's side S, and their objects [b, n, 6]."""
    images, labels = [], torch.zeros(len(indices), data.labels.shape[1], 6)
    labels[..., 4] = -1
    samples = (_sample(read_photo(data.files[i]), data.labels[i]) for i in indices.tolist())
    transformed = seeded(_transform(augment.policy, stage.side), samples, draws[:, 0])
    for row, (image, objects) in zip(labels, transformed):
        images.append(image.as_subclass(Tensor))
        n = len(objects["labels"])
        row[:n, :4] = objects["boxes"].as_subclass(Tensor) / stage.side
        row[:n, 4:] = objects["labels"]
    return torch.stack(images), labels


@functools.cache
def _transform(policy: str, side: int):
    """Return SSD's augmentation, or none, and behind it the resize to squares.

    SSD crops a picture so that it keeps some intersection with an object, to sides of 0.3 to 1 of
    the image's and a ratio of 0.5 to 2. It changes brightness, contrast, saturation and hue, each
    in every second picture, and flips. There is no zooming out, as in the authors' code.
    """
    from torchvision.transforms import v2  # two seconds, see cifar10

    jitters = ({"brightness": 0.2}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.05})
    ssd = [
        v2.RandomIoUCrop(),
        *(v2.RandomApply([v2.ColorJitter(**jitter)], p=0.5) for jitter in jitters),
        v2.RandomHorizontalFlip(),
    ]
    resize = v2.Resize((side, side), antialias=True)
    return v2.Compose([*(ssd if policy == "ssd" else []), resize, v2.SanitizeBoundingBoxes()])


def _sample(image: Tensor, objects: Tensor):
    """Return a picture uint8 [3, H, W] and its objects, but crowds, as torchvision takes them."""
    from torchvision import tv_tensors

    height, width = image.shape[1:]
    objects = objects[(objects[:, 4] >= 0) & (objects[:, 5] == 0)]
    corners = objects[:, :4] * torch.tensor([width, height, width, height])
    corners = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
    return tv_tensors.Image(image), {"boxes": corners, "labels": objects[:, 4:]}


def loss(outputs: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return SSD's loss, and the share of matched anchors that are right, summed over the images.

    They are right where their class is the likeliest. `smoothing` is not used: the paper has none.
    """
    sums, positives, right = _losses(outputs, targets)
    return sums.sum() / positives.sum().clamp(min=1), (right / positives.clamp(min=1)).sum()


def _losses(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of SSD's losses, the matched anchors and those that are right, of each image.

    All are [b]. The losses are smooth L1 of the offsets of the matched anchors, and cross-entropy
    of these and of NEGATIVES times as many others: those of the image that look least like
    background. A matched anchor is right where its class is the likeliest.
    """
    offsets, logits, anchors = outputs[..., :4], outputs[..., 4:-4], outputs[0, :, -4:].detach()
    real = (targets[..., 4] >= 0) & (targets[..., 5] == 0)
    matched = boxes.match(targets[..., :4], real, anchors)  # [b, A]
    positive = matched >= 0
    image, _ = positive.nonzero(as_tuple=True)
    objects = targets[image, matched[positive]]  # [m, 6]
    wanted = boxes.encode(objects[:, :4], anchors.expand_as(offsets)[positive])
    of_offsets = F.smooth_l1_loss(offsets[positive], wanted, reduction="none").sum(1)

    kinds = torch.zeros_like(matched)
    kinds[positive] = objects[:, 4].long() + 1
    of_classes = F.cross_entropy(logits.transpose(1, 2), kinds, reduction="none")  # [b, A]
    n = positive.sum(1)
    hardness = of_classes.detach().masked_fill(positive, -torch.inf)
    rank = hardness.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    learnt = positive | (rank < NEGATIVES * n[:, None])
    sums = (of_classes * learnt).sum(1).index_add(0, image, of_offsets)
    right = ((logits.argmax(2) == kinds) & positive).sum(1)
    return sums, n, right


def judge(outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Return what `score` needs of a batch: what was found, what is there, and the loss."""
    sums, positives, _ = _losses(outputs, targets)
    return boxes.detections(outputs), targets, sums, positives


def score(found: Tensor, targets: Tensor, sums: Tensor, positives: Tensor, classes) -> dict:
    """Return the mean average precision in percent of what was `found` [N, n, 6] in images.

    `targets` is what is there. {"loss", METRIC at an intersection over union of 0.5, "map_pct" as
    the mean of 0.5 to 0.95, "ap50_pct" as the former of each class, "n_images"}. Classes without an
    object are left out. BadInput if no image has one.
    """
    precision = average_precision(found, targets, len(classes))
    there = [k for k, of_class in enumerate(precision.tolist()) if of_class[0] >= 0]
    if not there:
        raise BadInput("no picture that is judged has an object")
    mean = 100 * precision[there].mean(0)
    return {
        "loss": (sums.sum() / positives.sum().clamp(min=1)).item(),
        METRIC: mean[0].item(),
        "map_pct": mean.mean().item(),
        "ap50_pct": {classes[k]: 100 * precision[k, 0].item() for k in there},
        "n_images": len(targets),
    }


def average_precision(found: Tensor, targets: Tensor, n_classes: int) -> Tensor:
    """Return COCO's average precision [n_classes, 10] at overlaps of 0.5, 0.55 to 0.95.

    It is from 0 to 1, and -1 for classes without an object.
    """
    coco, evaluation = pycocotools()
    truth, seen = coco(), coco()
    of_images = [{"id": i} for i in range(len(targets))]
    categories = [{"id": k} for k in range(n_classes)]
    image, row = (targets[..., 4] >= 0).nonzero(as_tuple=True)
    truths = _annotations(image, targets[image, row], {"iscrowd": 5})
    image, row = (found[..., 4] > 0).nonzero(as_tuple=True)
    # Score and class stand in the other order there.
    seens = _annotations(image, found[image, row][:, [0, 1, 2, 3, 5, 4]], {"score": 5})
    with contextlib.redirect_stdout(io.StringIO()):  # its chatter
        for part, annotations in ((truth, truths), (seen, seens)):
            part.dataset = {"images": of_images, "categories": categories}
            part.dataset["annotations"] = annotations
            part.createIndex()
        judged = evaluation(truth, seen, "bbox")
        judged.params.areaRng, judged.params.areaRngLbl = [[0, 1e10]], ["all"]
        judged.params.iouThrs, judged.params.maxDets = _THRESHOLDS, [100]
        judged.evaluate()
        judged.accumulate()
    precision = judged.eval["precision"][:, :, :, 0, 0]  # [10, 101 recalls, n_classes]
    return torch.from_numpy(precision.mean(1)).T


def _annotations(image: Tensor, rows: Tensor, last: dict[str, int]) -> list[dict]:
    """Return objects as pycocotools takes them; in fractions, as the measure knows no pixels."""
    x1, y1, x2, y2 = rows[:, :4].double().unbind(1)
    bboxes = torch.stack((x1, y1, x2 - x1, y2 - y1), 1)
    return [
        {
            "id": i + 1,
            "image_id": where,
            "category_id": int(row[4]),
            "bbox": bbox,
            "area": bbox[2] * bbox[3],
            "iscrowd": 0,
            **{name: row[column] for name, column in last.items()},
        }
        for i, (where, row, bbox) in enumerate(zip(image.tolist(), rows.tolist(), bboxes.tolist()))
    ]


def pycocotools():
    """Return what judges detectors: pycocotools' COCO and COCOeval.

    BadInput if it is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise BadInput(
            "--task detection is judged by pycocotools: pip install pycocotools"
        ) from error
    return COCO, COCOeval


def written(score: dict) -> str:
    """Return a score as the last line of a run shows it."""
    each = ", ".join(f"{name} {pct:.2f}" for name, pct in score["ap50_pct"].items())
    return (
        f"{score[METRIC]:.2f} % mAP@0.5 ({each}; {score['map_pct']:.2f} % from 0.5 to 0.95; "
        f"{score['n_images']} images)"
    )
