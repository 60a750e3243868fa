"""Optimizers, what decays, averaged weights, and the arithmetic of a forward pass to train on."""

import contextlib
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

OPTIMIZERS = ("adamw", "muon", "sgd")
# a, b and c of five steps x <- a x + b x^3 + c x^5 that drive all singular values to about 1, by
# Cesista, "Squeezing 1-2 % efficiency gains out of Muon by optimizing the Newton-Schulz
# coefficients" (leloykun.github.io, 2025).
NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
MOMENTUM = 0.95  # of Muon


def weight_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return the parameters that decay, and those that do not, as groups of an optimizer.

    Matrices and kernels of layers decay; norms, biases, class tokens and positions do not.
    """
    decays, stays = [], []
    for name, p in model.named_parameters():
        (decays if p.ndim > 1 and name.endswith("weight") else stays).append(p)
    return [
        {"params": decays, "weight_decay": weight_decay},
        {"params": stays, "weight_decay": 0.0},
    ]


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al., 2024): updates of matrices and kernels are made orthogonal.

    The averaged gradient of each is replaced by nearly the closest matrix whose singular values are
    all alike. Its elements are then as large as those of AdamW's updates at the same rate (Liu et
    al., arXiv:2502.16982, section 2.2). Depthwise kernels, whatever is no matrix, and groups with
    `matrices` False stay AdamW's.

    Matrices of one shape are made orthogonal together: a network has a hundred small ones, and one
    at a time they would cost a GPU more than the network does.
    """

    def __init__(self, groups: list[dict], lr: float):
        super().__init__(groups, lr=lr, foreach=True)

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters; the gradients of the matrices are used up by it."""
        for group in self.param_groups:
            if not group.get("matrices", True):
                continue
            matrices = [p for p in group["params"] if p.grad is not None and _is_matrix(p)]
            if matrices:
                self._step_of_matrices(matrices, group["lr"], group["weight_decay"])
            for p in matrices:
                p.grad = None  # AdamW leaves parameters without a gradient alone
        super().step()

    def _step_of_matrices(self, matrices: list[Tensor], lr: float, weight_decay: float) -> None:
        gradients = [p.grad for p in matrices]
        for p in matrices:
            if p not in self.state:  # under the names of AdamW, which loads the state of both
                self.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
        momenta = [self.state[p]["exp_avg"] for p in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        updates = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
        by_shape = defaultdict(list)
        for p, update in zip(matrices, updates):
            by_shape[p.flatten(1).shape].append((p, update.flatten(1)))
        torch._foreach_mul_(matrices, 1 - lr * weight_decay)
        for shape, alike in by_shape.items():
            parameters, flat = zip(*alike)
            steps = orthogonal(torch.stack(flat)).float() * (-0.2 * lr * max(shape) ** 0.5)
            steps = [step.view_as(p) for p, step in zip(parameters, steps)]
            torch._foreach_add_(list(parameters), steps)


def _is_matrix(p: Tensor) -> bool:
    return p.ndim > 1 and min(p.shape[:2]) > 1


def orthogonal(x: Tensor) -> Tensor:
    """Return matrices [n, rows, columns] with their singular values moved to about 1, in BF16."""
    wide = x.shape[1] <= x.shape[2]
    x = (x if wide else x.mT).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def build_optimizer(model: nn.Module, name: str, lr: float, weight_decay: float):
    """Return the optimizer `name`, one of OPTIMIZERS, of a model's parameters.

    sgd has Nesterov's momentum.
    """
    groups = weight_groups(model, weight_decay)
    if name == "muon":
        groups[1]["matrices"] = False  # class tokens and positions have dimensions, too
        return Muon(groups, lr)
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def averaged(model: nn.Module, decay: float) -> AveragedModel | None:
    """Return a copy of `model` whose weights are an exponential average of its own.

    None if `decay` is 0.
    """
    if not decay:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


@contextlib.contextmanager
def arithmetic(device_type: str, precision: str):
    """Let a forward pass to train on compute in `precision`, by autocast, while this is entered.

    In BF16 on a CPU attention runs in separate steps, because the backward pass of torch's fused
    one took 40 % of the time.
    """
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    slow = (device_type, precision) == ("cpu", "bf16")
    attention = sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext()
    with torch.autocast(device_type, dtype, enabled=precision != "fp32"), attention:
        yield
