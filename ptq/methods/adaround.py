"""AdaRound and block reconstruction: learning for each weight whether to round up or down."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ptq.graph import captured, never_ran
from ptq.layers import QuantizedLayer, Quantizer
from ptq.methods.nearest import layers_to_round, units, weight_scale
from ptq.recipe import Recipe

# Nagel et al., section 5, take 10,000 steps of 32 images at a rate of 1e-3. These take less time.
ITERATIONS = 1000  # a unit
BATCH_IMAGES = 8  # drawn anew each step
LEARNING_RATE = 1e-2
# As in BRECQ's code, where the exponent falls along a line.
WARM_UP = 0.2  # share of the steps without regularisation
BETAS = (20.0, 2.0)  # exponent of the regularisation, from after the warm-up to the end
ROUNDING_WEIGHT = 0.01  # of the regularisation


class SoftRounding(nn.Module):
    """A weight as floor(w / s) + h(v) levels, h between 0 and 1, with v to be learnt.

    Nagel et al., "Up or Down?", ICML 2020, equation 23.
    """

    def __init__(self, layer: QuantizedLayer, scale: Tensor):
        super().__init__()
        fmt, weight = layer.format, layer.layer.weight.detach()
        self.fmt = fmt
        self.scale = fmt.spread(scale, weight)
        self.floor = (weight / self.scale).floor()
        rest = (weight / self.scale - self.floor).clamp(0.01, 0.99)
        self.v = nn.Parameter(((rest + 0.1) / (1.2 - rest - 0.1)).log())  # h(v) = rest

    def h(self) -> Tensor:
        return (1.2 * self.v.sigmoid() - 0.1).clamp(0, 1)

    def codes(self) -> Tensor:
        return (self.floor + (self.h() >= 0.5)).clamp(self.fmt.qmin, self.fmt.qmax).int()

    def forward(self, weight: Tensor) -> Tensor:
        return (self.floor + self.h()).clamp(self.fmt.qmin, self.fmt.qmax) * self.scale


def adaround(model: nn.Module, reference: nn.Module, batches, recipe: Recipe) -> None:
    """Learn for each weight whether to round up or down, one unit after the other.

    A unit's output on what the quantized network feeds it is to come close to the output of the
    same unit in the float network.

    Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, where
    units are single layers; with larger units, Li et al., "BRECQ: Pushing the Limit of
    Post-Training Quantization by Block Reconstruction", ICLR 2021, without its weighting of
    outputs by Fisher information.
    """
    for name in units(model, recipe.units):
        unit, wanted = model.get_submodule(name), reference.get_submodule(name)
        if unit not in layers_to_round(model).values() and any(
            isinstance(m, Quantizer) and m.scale is not None for m in unit.modules()
        ):
            raise ValueError(
                f"the quantizers in {name} are calibrated, and no gradient passes them: calibrate "
                "after adaround"
            )
        calls = list(captured(model, unit, batches, "input"))
        if any(len(x) != 1 or x[0].shape[1:] != calls[0][0].shape[1:] for x in calls):
            raise ValueError(f"AdaRound is for units with one input of one size, not for {name}")
        inputs = torch.cat([x for (x,) in calls])
        outputs = list(captured(reference, wanted, batches, "output"))
        if not isinstance(outputs[0], Tensor):
            raise ValueError(f"AdaRound is for units that give one tensor, not for {name}")
        outputs = torch.cat(outputs)
        # Squares, as the loss is one of the outputs, and its gradient a product with the inputs.
        if not all(x.square().sum().isfinite() for x in (inputs, outputs)):
            raise ValueError(f"what goes into or comes out of {name} is not finite when squared")
        n_images = sum(len(x) for x, *_ in batches)
        n = max(1, BATCH_IMAGES * len(inputs) // n_images)
        reconstruct(unit, name, inputs, outputs, n)


def reconstruct(unit: nn.Module, name: str, inputs: Tensor, outputs: Tensor, n: int) -> None:
    """Choose the codes of all layers to round in `unit` so that it maps `inputs` to `outputs`.

    Each step looks at `n` of them. `name` is the unit's in the network.
    """
    linear = isinstance(unit, QuantizedLayer) and isinstance(unit.layer, nn.Linear)
    channels = 1 if outputs.dim() == 4 and not linear else -1
    rounded = layers_to_round(unit, name)
    scales = {name: weight_scale(layer) for name, layer in rounded.items()}
    soft = {name: SoftRounding(layer, scales[name]) for name, layer in rounded.items()}
    for name, layer in rounded.items():
        parametrize.register_parametrization(layer.layer, "weight", soft[name], unsafe=True)
    learnt = [rounding.v for rounding in soft.values()]
    optimizer = torch.optim.Adam(learnt, LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for step in range(ITERATIONS):
            drawn = torch.randint(len(inputs), (n,), generator=generator)
            error = (unit(inputs[drawn]) - outputs[drawn]).square().sum(channels).mean()
            if beta := exponent(step):
                open_ = sum((1 - (2 * r.h() - 1).abs() ** beta).sum() for r in soft.values())
                error = error + ROUNDING_WEIGHT * open_
            optimizer.zero_grad()
            error.backward(inputs=learnt)
            for name, rounding in soft.items():
                if rounding.v.grad is None:
                    raise never_ran(name)
            optimizer.step()
    for name, layer in rounded.items():
        parametrize.remove_parametrizations(layer.layer, "weight", leave_parametrized=False)
        layer.set_weight(soft[name].codes(), scales[name])


def exponent(step: int) -> float:
    """Return the exponent of the regularisation in a step: 0 for none, later less and less.

    It falls along a cosine.
    """
    began = WARM_UP * ITERATIONS
    if step < began:
        return 0.0
    way = 0.5 * (1 + math.cos(math.pi * (step - began) / (ITERATIONS - began)))
    return BETAS[1] + (BETAS[0] - BETAS[1]) * way
