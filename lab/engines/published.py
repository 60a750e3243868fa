"""FP16 and INT4 weights as the published CIFAR-10 re-implementation makes them, run in float32.

Both write a network's tensors in their format and read them back; nothing is computed in few bits.
The grids, sizes and choice of tensors are those of the re-implementation that the rows follow.
"""

import copy

import torch
from torch import Tensor

from lab.cli import BadInput
from lab.engines import Loaded
from ptq.packing import written_bytes

NAME = "published"
BITS, LOW_PCT, HIGH_PCT = 4, 1.0, 99.0  # of the published INT4


def version() -> str:
    return torch.__version__


def load(model, recipe, calibration, example) -> Loaded:
    """Return `model` with the values of the published format that has the recipe's name.

    BadInput if a value is too large for FP16.
    """
    model = copy.deepcopy(model).eval()
    return {"fp16": _float16, "int4-percentile": _int4}[recipe.name](model)


def _float16(model) -> Loaded:
    state = model.state_dict()
    halves = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    for name, half in halves.items():
        if not half.isfinite().all():
            largest = state[name].abs().max().item()
            raise BadInput(f"{name} reaches {largest:.3g}, beyond the 65504 of float16")
    model.load_state_dict(halves)  # which copies into float32
    return Loaded(model, size_bytes=written_bytes(lambda path: torch.save(halves, path)))


def _int4(model) -> Loaded:
    size_bits = 0
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.dim() >= 2:
                # As published: codes, and per channel a float32 scale and a zero-point as wide as
                # a code. A file would need 32 bits for the offset, which is not on the grid.
                size_bits += BITS * tensor.numel() + (32 + BITS) * tensor.shape[0]
                tensor.copy_(percentile_levels(tensor))
            else:
                size_bits += 32 * tensor.numel()
    return Loaded(model, size_bytes=-(-size_bits // 8), size_is_estimate=True)


def percentile_levels(x: Tensor) -> Tensor:
    """Return `x` [C, ...] on 2**BITS evenly spaced levels between two percentiles of each channel.

    The grid starts at the lower percentile and need not contain 0. A channel whose percentiles
    coincide becomes that one value.
    """
    flat, shape = x.flatten(1), (-1, *[1] * (x.dim() - 1))
    low, high = (flat.quantile(pct / 100, dim=1).view(shape) for pct in (LOW_PCT, HIGH_PCT))
    scale = (high - low) / (2**BITS - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return ((x.clamp(low, high) - low) / scale).round() * scale + low
