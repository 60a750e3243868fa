"""The products that a network computes, the bytes that it moves for them, and their energy.

    >>> energy(model, ptq.recipe("w8a8", model), images[:1])["total"]  # pJ an image

A model, not a measurement: it says what arithmetic and memory would take at the prices of a table.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from math import ceil
from statistics import mean

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptq.formats import Log2, Uniform
from ptq.graph import running
from ptq.layers import copied
from ptq.pipeline import entry, layer_specs
from ptq.recipe import Recipe


@dataclass
class LayerCount:
    """What one layer computes and reads for one call of the network.

    `macs`: multiply-accumulates. `parameters`: {name in the network: elements}, read once.
    `activations`: elements that go into its products; those of a fused attention are q, k and v.
    """

    macs: int = 0
    activations: int = 0
    parameters: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def count(model: nn.Module, example: Tensor) -> tuple[dict[str, LayerCount], list[str]]:
    """Return {name of a layer: its count} for a call on `example`, and what was not counted.

    Counted are matrix products, convolutions and attention, by torch.utils.flop_counter (two FLOPs
    a MAC), for the innermost module that runs. The second value names all other operators, so that
    one with products of its own can't hide. The network is run on a copy, in evaluation mode.
    """
    model = copied(model).eval()
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator a layer, without a formula
    try:
        with running(model) as names, _Counter(model, names) as counter:
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return dict(counter.layers), sorted(counter.uncounted)


def _formulas() -> dict:
    """Return {operator: function from its arguments to its FLOPs}."""
    # Not above: where torch has triton, this imports it.
    from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

    def attention(q_shape, k_shape, v_shape, *_, out_shape=None, **__) -> int:
        return sdpa_flop_count(q_shape, k_shape, v_shape)

    # torch counts fused attention on GPUs alone (pytorch issue 195460).
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return {on_cpu: shape_wrapper(attention)} | flop_registry


class _Counter(TorchDispatchMode):
    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.formulas = _formulas()
        self.running, self.uncounted = names, set()
        self.layers = defaultdict(LayerCount)
        self.parameters = defaultdict(dict)  # {storage: {name: elements}}; tied ones have several
        for name, p in model.named_parameters(remove_duplicate=False):
            self.parameters[p.untyped_storage().data_ptr()][name] = p.numel()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = self.formulas.get(func._overloadpacket)
        if formula is None:
            self.uncounted.add(str(func._overloadpacket))
            return out
        name = self.running[-1]
        layer = self.layers[name]
        layer.macs += formula(*args, **kwargs, out_val=out) // 2
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                found = self.parameters.get(tensor.untyped_storage().data_ptr())
                if found:
                    own = next((n for n in found if n.startswith(f"{name}.")), next(iter(found)))
                    layer.parameters[own] = found[own]
                else:
                    layer.activations += tensor.numel()
        return out


PARTS = ("compute", "weights", "activations")  # of a layer's energy


@dataclass(frozen=True)
class Prices:
    """What operations and memory cost, each in `unit`."""

    unit: str
    multiply: float  # of two 8-bit integers; others by the product of their bits
    add: float  # to a 32-bit accumulator
    float_mac: float  # in 32 bits, wherever a factor is a float
    weight_byte: float  # read once a call
    activation_byte: float  # written once, read once: this much each

    def mac(self, a: Uniform | Log2 | None, b: Uniform | Log2 | None) -> float:
        """Return the price of a product of values in two formats, None for floats, and its sum."""
        return self.multiply * a.bits * b.bits / 64 + self.add if a and b else self.float_mac


# Horowitz, "Computing's energy problem", ISSCC 2014: 45 nm, 0.9 V; pJ. 64 bits of DRAM take 1300 to
# 2600 pJ, of a cache of 1 MB 100 pJ. Checked against others who quote the table.
_ARITHMETIC = {"multiply": 0.2, "add": 0.1, "float_mac": 3.7 + 0.9}
PRICES = {
    "horowitz": Prices("pJ", **_ARITHMETIC, weight_byte=1300 / 8, activation_byte=100 / 8),
    "horowitz-high": Prices("pJ", **_ARITHMETIC, weight_byte=2600 / 8, activation_byte=100 / 8),
    # Published with the system that this re-implements: in MACs of 8 bits, memory far too cheap.
    "seed": Prices("8-bit MACs", 1.0, 0.0, 16.0, weight_byte=10.0, activation_byte=10.0),
}


def energy(model: nn.Module, recipe: Recipe, example: Tensor, prices: str = "horowitz") -> dict:
    """Return the energy of one call on `example` of the network quantized by `recipe`.

    {"unit", "images": in `example`, "layers": {name: {"macs", "compute", "weights",
    "activations"}}, "total"}: all but MACs in the unit of `prices`, a key of PRICES. Weights are
    read from DRAM once a call, however many images it has. Activations are written to and read from
    SRAM once. Only layers with products count: norms and activation functions are left out, as
    is the attention map of fused attention, which never leaves the chip. What stays in float has 32
    bits. ValueError for prices that are not there, and for a recipe that an engine carries out by
    its own methods.
    """
    if recipe.peer:
        raise ValueError(f"recipe {recipe.name} is carried out by {recipe.peer}: no formats known")
    table = entry(PRICES, prices, "table of prices")
    specs = layer_specs(model, recipe)
    layers = {}
    for name, layer in count(model, example)[0].items():
        spec = specs.get(name)
        weight, input = (spec.weight, spec.input) if spec else (None, None)
        stored = 0.0
        for parameter, n in layer.parameters.items():
            if weight and parameter == f"{name}.weight":
                n_scales = len(weight.rows(model.get_parameter(parameter)))
                stored += ceil(n * weight.bits / 8) + 4 * n_scales
            else:
                stored += 4 * n
        if layer.parameters:
            factors = [(input, weight)]
        else:  # attention: half of its products are q k^T, half those of the softmax and v
            factors = [(input, input), (spec.attention or input if spec else None, input)]
        mac = mean(table.mac(*pair) for pair in factors)
        moved = 2 * layer.activations * (input.bits if input else 32) / 8
        layers[name] = {
            "macs": layer.macs,
            "compute": layer.macs * mac,
            "weights": stored * table.weight_byte,
            "activations": moved * table.activation_byte,
        }
    total = sum(layer[part] for layer in layers.values() for part in PARTS)
    return {"unit": table.unit, "images": len(example), "layers": layers, "total": total}


def energy_by_prices(model: nn.Module, recipe: Recipe, example: Tensor) -> dict | None:
    """Return the energy of all layers together by each table of PRICES.

    {name in PRICES: {"unit", "compute", "weights", "activations", "total"}}; None for a recipe that
    an engine carries out by its own methods.
    """
    if recipe.peer:
        return None
    of_prices = {}
    for prices in PRICES:
        found = energy(model, recipe, example, prices)
        layers = found["layers"].values()
        parts = {part: sum(layer[part] for layer in layers) for part in PARTS}
        of_prices[prices] = {"unit": found["unit"]} | parts | {"total": found["total"]}
    return of_prices
