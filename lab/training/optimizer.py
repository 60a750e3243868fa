"""Optimizers, what decays, and the arithmetic of a forward pass to train on."""

import contextlib

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab.cli import BadInput


def weight_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters with two or more dimensions decay; norms and biases do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, args) -> torch.optim.Optimizer:
    """AdamW, or timm's Muon (Jordan et al., 2024) for matrices and kernels, those of depthwise
    convolutions excepted, and NAdamW for the rest. Muon's updates are as large as AdamW's at the
    same rate (Liu et al., arXiv:2502.16982, section 2.2)."""
    groups = weight_groups(model, args.weight_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=args.lr, fused=True)
    try:
        from timm.optim import Muon

        # Older versions lack the last argument: there, the rest keeps its first rate for good.
        return Muon(groups, lr=args.lr, nesterov=True, fallback_lr_scale=1.0)
    except (ImportError, TypeError) as error:
        raise BadInput("--optimizer muon needs timm: pip install 'timm>=1.0.27'") from error


@contextlib.contextmanager
def arithmetic(device_type: str, precision: str):
    """The context of a forward pass to train on: autocast to `precision` and, in BF16 on a CPU,
    attention in separate steps, as the backward pass of torch's fused one took 40 % of the time."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    slow = (device_type, precision) == ("cpu", "bf16")
    attention = sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext()
    with torch.autocast(device_type, dtype, enabled=precision != "fp32"), attention:
        yield
