"""Classification: batches of images under augmentation, cross-entropy, accuracy.

Images of CIFAR-10 stay uint8 [N, 3, 32, 32] until a batch is needed: they are augmented at that
size in the loader's workers, then normalised and resized on the network's device, a whole batch at
a time.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.tasks.augment import POLICIES, Augmentation

METRIC = TRAIN_METRIC = "accuracy_pct"
AUGMENT = POLICIES  # the last is the default
FEW_CLASSES = 100  # up to so many, a row holds who was taken for whom; beyond, the top five count


def batch(
    data, indices: Tensor, draws: Tensor, rng: np.random.Generator, augment: Augmentation, stage
) -> tuple[Tensor, Tensor]:
    """Images uint8 [b, 3, w, w], random windows of the stage's side w of them, and their labels
    int64 [b] or, where `augment` mixes images, class probabilities float32 [b, K]."""
    x, labels = data.images[indices], data.labels[indices]
    x = augment.images(x, draws, stage.window if stage else x.shape[-1])
    if not augment.mixes:
        return x, labels
    return augment.mixed(x, F.one_hot(labels, len(data.classes)).float(), rng)


def loss(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of logits [b, K] with labels int64 [b] or probabilities [b, K], and how
    many are right: of mixed images, the likeliest label counts."""
    likeliest = labels if labels.dim() == 1 else labels.argmax(1)
    right = (logits.detach().argmax(1) == likeliest).sum()
    return F.cross_entropy(logits, labels, label_smoothing=smoothing), right


def judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """What `score` needs of a batch: all of it."""
    return logits, labels


def score(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict:
    """Mean loss and accuracy in percent of logits [N, K] with labels [N]; of many classes, also the
    percent of the images whose class is among the five likeliest."""
    n, n_correct = len(labels), int((logits.argmax(1) == labels).sum())
    loss = F.cross_entropy(logits, labels, reduction="sum").item() / n
    found = {"loss": loss, METRIC: 100 * n_correct / n, "n_correct": n_correct, "n_images": n}
    return found | ({"top5_pct": top_pct(logits, labels, 5)} if len(classes) > FEW_CLASSES else {})


def written(score: dict) -> str:
    """A score as the last line of a run shows it."""
    return f"{score[METRIC]:.2f} % ({score['n_correct']} of {score['n_images']})"


def top_pct(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Percent of the images whose class is among the `k` likeliest: logits [N, K], labels [N]."""
    likeliest = logits.topk(min(k, logits.shape[1])).indices
    return 100 * int((likeliest == labels[:, None]).any(1).sum()) / len(labels)


def pairs(labels: Tensor, predictions: Tensor, n: int) -> Tensor:
    """Images of each of `n` true classes (rows) that were given each class, int64 [n, n]."""
    return torch.bincount(n * labels + predictions, minlength=n**2).view(n, n)


def confusion(labels: Tensor, predictions: Tensor, n: int) -> list[list[int]] | None:
    """`pairs` for a file; None for more classes than it should hold pairs of."""
    return pairs(labels, predictions, n).tolist() if n <= FEW_CLASSES else None


def class_scores(logits: Tensor, labels: Tensor) -> dict:
    """Top-1 and top-5 accuracy, and precision, recall and F1 of each class and their means, in %.

    A class without images has none of the three and is left out of the means. One that is never
    predicted has a precision of 0. Top-5 is None for fewer than six classes.
    """
    n, n_classes = logits.shape
    matrix = pairs(labels, logits.argmax(1), n_classes).double()
    right, given, of_class = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
    scores = {
        "precision_pct": 100 * right / given.clamp(min=1),
        "recall_pct": 100 * right / of_class.clamp(min=1),
        "f1_pct": 200 * right / (given + of_class).clamp(min=1),
    }
    present = of_class > 0
    return {
        "n_images": n,
        "top1_pct": 100 * float(right.sum()) / n,
        "top5_pct": top_pct(logits, labels, 5) if n_classes > 5 else None,
        **{name: float(of_each[present].mean()) for name, of_each in scores.items()},
        "n_absent": int((~present).sum()),
        "classes": [
            {"n_images": int(of_class[k])}
            | {name: float(of_each[k]) if present[k] else None for name, of_each in scores.items()}
            for k in range(n_classes)
        ],
    }
