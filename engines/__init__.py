"""Running a model for real: every engine gives `run(images [b, 3, S, S]) -> logits [b, K]`, and the
functions here judge and time any of them alike."""

import torch
from torch import Tensor
from tqdm import tqdm


def predict(run, batches, total=None) -> tuple[Tensor, Tensor]:
    """Logits [N, K] and labels [N], on the CPU, of `run` over (input, labels) batches."""
    logits, labels = [], []
    with torch.inference_mode():
        for x, y in tqdm(batches, "evaluating", total=total, leave=False, disable=None):
            logits.append(run(x).float().cpu())
            labels.append(y.cpu())
    return torch.cat(logits), torch.cat(labels)
