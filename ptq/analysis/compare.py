"""How far two networks are apart on the same images."""

import torch
from torch import Tensor, nn


@torch.inference_mode()
def compare_models(model: nn.Module, other: nn.Module, batches) -> dict[str, float]:
    """Return how far the logits of two networks are apart, and how often their classes agree.

    {"mse", "mae", "top1_agreement_pct", "n_images"}. `batches`: (input [b, ...], anything) pairs.
    Both networks give logits [b, K], or something that holds them as `logits`, as transformers do.
    ValueError for a network in training mode, for no images, for other outputs, and for logits that
    are not finite or of different shapes.
    """
    if model.training or other.training:
        raise ValueError("networks are compared in evaluation mode: call eval() first")
    squares = absolutes = n_logits = n_agree = n_images = 0
    for x, *_ in batches:
        a, b = logits_of(model(x)).double(), logits_of(other(x)).double()
        if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError("logits can't be compared: not finite, or of different shapes")
        if a.dim() != 2:
            raise ValueError(f"classes are compared by logits [b, K], not {list(a.shape)}")
        squares += (a - b).square().sum().item()
        absolutes += (a - b).abs().sum().item()
        n_agree += int((a.argmax(1) == b.argmax(1)).sum())
        n_logits, n_images = n_logits + a.numel(), n_images + len(a)
    if not n_images:
        raise ValueError("there are no images to compare on")
    return {
        "mse": squares / n_logits,
        "mae": absolutes / n_logits,
        "top1_agreement_pct": 100 * n_agree / n_images,
        "n_images": n_images,
    }


def noise(outputs: Tensor, expected: Tensor) -> float:
    """Return the mean square of what `outputs` are off, over the variance of what was `expected`.

    Tensors of one shape. The signal-to-quantization-noise ratio in dB is -10 log10 of it.
    ValueError where all that was expected is one number: nothing is relative to it.
    """
    expected = expected.double()
    variance = expected.var()
    if not variance > 0:
        raise ValueError("all outputs of the float network are the same number")
    return ((outputs.double() - expected).square().mean() / variance).item()


def logits_of(output) -> Tensor:
    """Return the logits [b, K] in what a network puts out; ValueError if there are none."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        kind = type(output).__name__
        raise ValueError(f"a network gives logits, or holds them as `logits`: this gives a {kind}")
    return logits
