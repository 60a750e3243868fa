"""Classification: batches of images under augmentation, cross-entropy, accuracy.

Images of CIFAR-10 stay uint8 [N, 3, 32, 32] until a batch is needed: they are augmented at that
size in the loader's workers, then normalised and resized on the network's device, a whole batch at
a time.
"""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from lab.tasks.augment import POLICIES, Augmentation

METRIC = TRAIN_METRIC = "accuracy_pct"
AUGMENT = POLICIES  # the last is the default


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
    """Mean loss and accuracy in percent of logits [N, K] with labels [N]."""
    n, n_correct = len(labels), int((logits.argmax(1) == labels).sum())
    loss = F.cross_entropy(logits, labels, reduction="sum").item() / n
    accuracy_pct = 100 * n_correct / n
    return {"loss": loss, METRIC: accuracy_pct, "n_correct": n_correct, "n_images": n}


def written(score: dict) -> str:
    """A score as the last line of a run shows it."""
    return f"{score[METRIC]:.2f} % ({score['n_correct']} of {score['n_images']})"
