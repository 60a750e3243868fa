"""Semantic segmentation: random crops, cross-entropy of pixels, mean intersection over union.

Outputs are logits [b, K, S, S]. Targets are masks uint8 [b, H, W]: a pixel's class, or IGNORED, or
OUTSIDE beyond the edges of a picture that is smaller than others of its batch. Augmentation and
loss are those of MobileViT's authors.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.cli import BadInput
from lab.tasks import classification
from lab.tasks.augment import Augmentation, fractions
from lab.tasks.photo import read_photo

METRIC, TRAIN_METRIC = "miou_pct", "pixels_pct"
AUGMENT = ("none", "scale-crop")
IGNORED, OUTSIDE = 255, 254
SHORT_SIDE = (0.5, 2.0)  # of a scaled picture, over the side of the crop


def batch(
    data, indices: Tensor, draws: Tensor, rng: np.random.Generator, augment: Augmentation, stage
) -> tuple[Tensor, Tensor]:
    """Return pictures uint8 [b, 3, S, S] of the stage's side S, and their masks uint8 [b, S, S]."""
    pairs = []
    for i, draw in zip(indices.tolist(), fractions(draws).tolist()):
        image, mask = read_photo(data.files[i]), data.mask(i)
        if augment.policy == "none":
            pairs.append(_resized(image, mask, (stage.side, stage.side)))
        else:
            pairs.append(scaled_crop(image, mask, draw, stage.side))
    images, masks = zip(*pairs)
    return torch.stack(images), torch.stack(masks)


def scaled_crop(image: Tensor, mask: Tensor, draw, side: int) -> tuple[Tensor, Tensor]:
    """Return a square of `side` pixels of a picture [3, H, W] and of its mask [H, W].

    The first four numbers of `draw`, in [0, 1), say how both are scaled, where the square lies, and
    whether it is flipped. The scaled picture's short side is drawn uniformly from SHORT_SIDE times
    `side`. Where it would be too short for the square, it is that of the square.
    """
    low, high = SHORT_SIDE
    scale = side * max(1.0, low + (high - low) * draw[0]) / min(mask.shape)
    height, width = (max(side, round(scale * n)) for n in mask.shape)
    image, mask = _resized(image, mask, (height, width))
    top, left = int(draw[1] * (height - side + 1)), int(draw[2] * (width - side + 1))
    inside = (..., slice(top, top + side), slice(left, left + side))
    image, mask = image[inside], mask[inside]
    return (image.flip(-1), mask.flip(-1)) if draw[3] < 0.5 else (image, mask)


def _resized(image: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    from torchvision.transforms.v2.functional import resize  # two seconds, see cifar10

    image = resize(image, list(size), antialias=True)
    return image, F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]


def loss(logits: Tensor, masks: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy over the pixels that have a class, and the share that is right.

    The share is that of an image's pixels with a class, summed over the images. `logits` are
    [b, K, S, S], `masks` uint8 [b, S, S]. `smoothing` is not used: the paper has none.
    """
    masks = masks.long()
    known = masks != IGNORED
    total = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum")
    right = ((logits.detach().argmax(1) == masks) & known).sum((1, 2))
    return total / known.sum().clamp(min=1), (right / known.sum((1, 2)).clamp(min=1)).sum()


def judge(logits: Tensor, masks: Tensor) -> tuple[Tensor, ...]:
    """Return what `score` needs of a batch: counts int64 [b, K, K] and the sum of the losses [b].

    Counted are each image's pixels of every class (rows) that were given each class (columns).
    Logits are resized to the size of the mask, so that it is the pixels of the file that count. The
    authors resize the predicted classes, by nearest neighbours.
    """
    k = logits.shape[1]
    counts, losses = [], []
    for y, mask in zip(logits, masks):
        inside = mask != OUTSIDE
        height, width = int(inside[:, 0].sum()), int(inside[0].sum())
        mask = mask[:height, :width].long()
        y = F.interpolate(y[None], (height, width), mode="bilinear")
        known = mask != IGNORED
        counts.append(classification.pairs(mask[known], y[0].argmax(0)[known], k))
        losses.append(F.cross_entropy(y, mask[None], ignore_index=IGNORED, reduction="sum"))
    return torch.stack(counts), torch.stack(losses)


def score(counts: Tensor, losses: Tensor, classes: tuple[str, ...]) -> dict:
    """Return the mean loss of a pixel, and the intersection over union of every class in percent.

    It is that of all images' pixels together. Its mean is METRIC, and TRAIN_METRIC is the percent
    of the pixels that are right. Classes that are nowhere, neither in the masks nor in the answers,
    are left out. BadInput if no pixel has a class.
    """
    total = counts.sum(0).double()
    if not total.sum():
        raise BadInput("no pixel of the masks has a class to judge")
    both = total.diagonal()
    union = total.sum(0) + total.sum(1) - both
    iou_pct = {c: 100 * (b / u).item() for c, b, u in zip(classes, both, union) if u}
    return {
        "loss": (losses.double().sum() / total.sum()).item(),
        METRIC: sum(iou_pct.values()) / len(iou_pct),
        TRAIN_METRIC: 100 * (both.sum() / total.sum()).item(),
        "iou_pct": iou_pct,
        "n_images": len(counts),
    }


def written(score: dict) -> str:
    """Return a score as the last line of a run shows it."""
    each = ", ".join(f"{name} {pct:.2f}" for name, pct in score["iou_pct"].items())
    return (
        f"{score[METRIC]:.2f} % mIoU ({each}; {score[TRAIN_METRIC]:.2f} % of pixels; "
        f"{score['n_images']} images)"
    )
