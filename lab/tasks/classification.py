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
    """Return images uint8 [b, 3, w, w] to train on, and their labels.

    The images are random windows of w pixels a side, the stage's `window`. Labels are int64 [b] or,
    where `augment` mixes images, class probabilities float32 [b, K].
    """
    x, labels = data.images[indices], data.labels[indices]
    x = augment.images(x, draws, stage.window if stage else x.shape[-1])
    if not augment.mixes:
        return x, labels
    return augment.mixed(x, F.one_hot(labels, len(data.classes)).float(), rng)


def loss(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of logits [b, K] with labels, and how many are right.

    Labels are int64 [b] or probabilities [b, K]: of mixed images, the likeliest label counts.
    """
    likeliest = labels if labels.dim() == 1 else labels.argmax(1)
    right = (logits.detach().argmax(1) == likeliest).sum()
    return F.cross_entropy(logits, labels, label_smoothing=smoothing), right


def judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Return what `score` needs of a batch: all of it."""
    return logits, labels


def score(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict:
    """Return the mean loss, and the accuracy in percent, of logits [N, K] with labels [N].

    {"loss", METRIC, "n_correct", "n_images"}, and of more than FEW_CLASSES classes "top5_pct": the
    percent of the images whose class is among the five likeliest.
    """
    n, n_correct = len(labels), int((logits.argmax(1) == labels).sum())
    loss = F.cross_entropy(logits, labels, reduction="sum").item() / n
    found = {"loss": loss, METRIC: 100 * n_correct / n, "n_correct": n_correct, "n_images": n}
    return found | ({"top5_pct": top_pct(logits, labels, 5)} if len(classes) > FEW_CLASSES else {})


def written(score: dict) -> str:
    """Return a score as the last line of a run shows it."""
    return f"{score[METRIC]:.2f} % ({score['n_correct']} of {score['n_images']})"


def top_pct(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Return the percent of the images whose class is among the `k` likeliest.

    `logits` are [N, K], `labels` [N].
    """
    likeliest = logits.topk(min(k, logits.shape[1])).indices
    return 100 * int((likeliest == labels[:, None]).any(1).sum()) / len(labels)


def pairs(labels: Tensor, predictions: Tensor, n: int) -> Tensor:
    """Return how many images of each of `n` true classes (rows) were given each class: [n, n]."""
    return torch.bincount(n * labels + predictions, minlength=n**2).view(n, n)


def confusion(labels: Tensor, predictions: Tensor, n: int) -> list[list[int]] | None:
    """Return `pairs` as lists, for a file; None for more than FEW_CLASSES classes."""
    return pairs(labels, predictions, n).tolist() if n <= FEW_CLASSES else None


def class_scores(logits: Tensor, labels: Tensor) -> dict:
    """Return accuracy, and precision, recall and F1 of each class and their means, all in percent.

    `logits` are [N, K], `labels` [N]. Accuracy is top-1 and top-5, which is None for fewer than six
    classes. A class without images has none of the three others and is left out of the means. One
    that is never predicted has a precision of 0.
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
