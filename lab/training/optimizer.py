"""Optimizers, what decays, averaged weights, and the arithmetic of a forward pass to train on."""

import contextlib

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lab.cli import BadInput


def weight_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and kernels of layers decay; norms, biases, class tokens and positions do not."""
    decays, stays = [], []
    for name, p in model.named_parameters():
        (decays if p.ndim > 1 and name.endswith("weight") else stays).append(p)
    return [
        {"params": decays, "weight_decay": weight_decay},
        {"params": stays, "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, name: str, lr: float, weight_decay: float):
    """The optimizer `name` of a model's parameters: adamw or muon.

    Muon is timm's (Jordan et al., 2024): its rule for matrices and kernels, but not those of
    depthwise convolutions, and NAdamW for the rest. Its updates are as large as AdamW's at the same
    rate (Liu et al., arXiv:2502.16982, section 2.2).
    """
    groups = weight_groups(model, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    try:
        from timm.optim import Muon

        groups[1]["use_fallback"] = True  # class tokens and positions have dimensions, too
        # Older versions lack the last argument: there, the rest keeps its first rate for good.
        return Muon(groups, lr=lr, nesterov=True, fallback_lr_scale=1.0)
    except (ImportError, TypeError) as error:
        raise BadInput("--optimizer muon needs timm: pip install 'timm>=1.0.27'") from error


def averaged(model: nn.Module, decay: float) -> AveragedModel | None:
    """A copy of `model` whose weights are an exponential average of its own; None without decay."""
    if not decay:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


@contextlib.contextmanager
def arithmetic(device_type: str, precision: str):
    """The context of a forward pass to train on: autocast to `precision`.

    In BF16 on a CPU attention runs in separate steps, because the backward pass of torch's fused
    one took 40 % of the time.
    """
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    slow = (device_type, precision) == ("cpu", "bf16")
    attention = sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext()
    with torch.autocast(device_type, dtype, enabled=precision != "fp32"), attention:
        yield
