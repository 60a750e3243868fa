"""Boxes of objects: coded against anchors, matched with them, and chosen among many.

A box is (x1, y1, x2, y2), an anchor (cx, cy, w, h), all in fractions of the image's sides.
"""

import torch
from torch import Tensor

# What offsets are divided by: SSD's "variances" (Liu et al., ECCV 2016, in its authors' code).
VARIANCES = (0.1, 0.1, 0.2, 0.2)
MATCHED = 0.5  # intersection over union from which an anchor stands for an object
MIN_SCORE, MOST_OF_A_CLASS, MAX_IOU, MOST_OF_AN_IMAGE = 0.01, 400, 0.5, 200


def _ops():
    """Return torchvision's operators; to import them takes two seconds, spent only where needed."""
    from torchvision import ops

    return ops


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return the offsets [..., 4] of boxes [..., 4] from `anchors` that a network learns."""
    boxes = _ops().box_convert(boxes, "xyxy", "cxcywh")
    centres = (boxes[..., :2] - anchors[..., :2]) / anchors[..., 2:]
    sizes = (boxes[..., 2:] / anchors[..., 2:]).log()
    return torch.cat((centres, sizes), -1) / boxes.new_tensor(VARIANCES)


def decode(offsets: Tensor, anchors: Tensor) -> Tensor:
    """Return the boxes [..., 4] of `offsets` from `anchors`, cut off at the image's edges.

    It is the inverse of `encode`.
    """
    centres, sizes = (offsets * offsets.new_tensor(VARIANCES)).split(2, -1)
    centres = centres * anchors[..., 2:] + anchors[..., :2]
    sizes = sizes.exp() * anchors[..., 2:]
    return torch.cat((centres - sizes / 2, centres + sizes / 2), -1).clamp(0, 1)


def match(boxes: Tensor, real: Tensor, anchors: Tensor) -> Tensor:
    """Return the number of the object that each anchor stands for, int64 [b, A], or -1.

    Objects are those of `boxes` [b, n, 4] that are `real` [b, n]. One of `anchors` [A, 4] stands
    for the one that it overlaps most, if by MATCHED or more. Each object also gets the anchor that
    overlaps it most; where several objects would get the same one, the last of them does.
    """
    b, n = real.shape
    if n == 0:
        return anchors.new_full((b, len(anchors)), -1, dtype=torch.int64)
    corners = _ops().box_convert(anchors, "cxcywh", "xyxy")
    iou = _ops().box_iou(boxes.reshape(-1, 4), corners).view(b, n, -1)
    iou = iou.masked_fill(~real[:, :, None], -1)
    best, matched = iou.max(1)  # [b, A]
    matched = matched.masked_fill(best < MATCHED, -1)
    objects = torch.arange(n, device=boxes.device).expand(b, n).masked_fill(~real, -1)
    forced = torch.full_like(matched, -1).scatter_reduce(1, iou.argmax(2), objects, "amax")
    return torch.where(forced >= 0, forced, matched)


def detections(outputs: Tensor) -> Tensor:
    """Return the objects that a detector sees, [b, MOST_OF_AN_IMAGE, 6]: box, score, class from 0.

    `outputs` [b, A, 4 + K + 4] are those of lab.models.ssdlite. Rows of score 0 stand for nothing.
    Of each class, the MOST_OF_A_CLASS best boxes with a score above MIN_SCORE are looked at, and
    those that overlap a better one by more than MAX_IOU are dropped.
    """
    boxes = decode(outputs[..., :4], outputs[..., -4:])  # [b, A, 4]
    scores = outputs[..., 4:-4].softmax(-1)[..., 1:]  # [b, A, classes]
    found = outputs.new_zeros(len(outputs), MOST_OF_AN_IMAGE, 6)
    for i in range(len(outputs)):
        score, anchor = scores[i].topk(min(MOST_OF_A_CLASS, scores.shape[1]), 0)
        rank, kind = (score > MIN_SCORE).nonzero(as_tuple=True)
        score, box = score[rank, kind], boxes[i, anchor[rank, kind]]
        kept = _ops().batched_nms(box, score, kind, MAX_IOU)[:MOST_OF_AN_IMAGE]
        found[i, : len(kept)] = torch.cat((box, score[:, None], kind[:, None]), 1)[kept]
    return found
