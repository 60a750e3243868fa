"""Mixed precision: a width for each layer's weight, so that all of them keep within a budget.

>>> recipe = mixed_recipe("mixed-5bits", model, batches)  # the bytes of 5 bits a weight
>>> quantized = ptq.quantize(model, recipe, batches)
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import ceil, isinf
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ptq.analysis.costs import COSTS
from ptq.analysis.energy import PARTS, energy
from ptq.graph import never_ran
from ptq.packing import size_bytes
from ptq.pipeline import entry, layer_specs, quantize
from ptq.recipe import Recipe, by_names
from ptq.recipes import RECIPES
from ptq.recipes import recipe as recipe_of

# That a layer's weights may take. With 4, 6 and 8 alone, no layer gets the 5 bits that suit it: a
# ViT then had more noise than with 5 bits throughout.
BITS = (4, 5, 6, 7, 8)
COST, BASE = "noise", "w4a8"  # where a name has none: of COSTS, and of RECIPES
PREFIX = "mixed-"
PJ_PER_MJ = 1e9
_NAME = re.compile(
    rf"{PREFIX}([\d.]+(?:e[+-]?\d+)?)(bits|bytes|mJ|ms)(?:-({'|'.join(COSTS)}))?(?:-(.+))?"
)


class Budget(NamedTuple):
    """What the name of a mixed recipe asks for.

    `unit` of `amount`: "bytes" of the file that ptq.packing writes; "bits", the bytes of a file
    whose weights take so many each; "mJ" an image by Horowitz's prices; "ms", the sum of what
    single layers were measured to take. `cost`: a key of COSTS. `base`: the recipe that ranges,
    inputs and steps come from.
    """

    amount: float
    unit: str
    cost: str
    base: str


def parse_name(name: str) -> Budget:
    """Return the budget in mixed-5bits, mixed-700000bytes-fisher or mixed-0.4mJ-noise-w4-gptq.

    Cost and base may be left out. ValueError for other names, and for budgets that no network has.
    """
    found = _NAME.fullmatch(name)
    try:
        amount = float(found[1])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name[:60]} names no budget: write mixed-5bits, mixed-700000bytes, mixed-0.4mJ or "
            f"mixed-9ms, and behind it -{', -'.join(COSTS)} or a recipe such as -w4-gptq"
        ) from error
    budget = Budget(amount, found[2], found[3] or COST, found[4] or BASE)
    if budget.unit == "bits":
        _check_budget(amount, BITS[0], BITS[-1], "bits")
    if isinf(amount):
        raise ValueError(f"{name[:60]} names no finite budget")
    if budget.base not in RECIPES:
        raise ValueError(f"{name[:60]} starts from {budget.base}, which is no recipe")
    return budget


def mixed_recipe(
    name: str,
    model: nn.Module,
    batches,
    costs: Mapping | None = None,
    latency_ms: tuple[Mapping, float] | None = None,
) -> Recipe:
    """Return the recipe of least cost within the budget that `name` asks for.

    It is the one that the name starts from, with 4 to 8 bits for each layer's weight.
    `batches`: sequence of (images, anything), for costs; those for `ptq.quantize` will do.
    `costs`: what `layer_costs` gave, to try many budgets. `latency_ms`, for a budget in ms:
    {name of a layer: {bits: measured ms}}, and the ms of all that has no weights.

    The result is quantized with, saved, packed and exported as any other recipe. ValueError for a
    budget below the smallest or above the largest allocation, and as `ptq.quantize` raises it;
    ImportError if scipy is missing.
    """
    import_milp()  # before long work
    amount, unit, cost, base = parse_name(name)
    uniform = uniform_recipes(model, base)
    if costs is None:
        costs = layer_costs(model, batches, cost, base)

    def named(bits: Mapping[str, int]) -> Recipe:
        title = f"{recipe_of(base, model).title}, 4 to 8 bits a layer"
        return with_bits(model, uniform[BITS[0]], bits, name, title)

    if unit in ("bits", "bytes"):
        return named(within_bytes(model, batches, costs, amount, unit, named))
    if unit == "mJ":
        prices, fixed = energies(model, uniform, next(iter(batches))[0][:1], costs)
    else:
        prices, fixed = latency_ms or ({}, 0.0)
    _check_prices(prices, costs)
    return named(allocation(costs, prices, amount, fixed, unit))


def layer_costs(model: nn.Module, batches, cost: str = COST, base: str = BASE) -> dict:
    """Return {name of a layer: {bits: cost}} by one of COSTS, for the weights `base` quantizes."""
    return entry(COSTS, cost, "cost of bits")(model, uniform_recipes(model, base), batches)


def uniform_recipes(model: nn.Module, base: str) -> dict[int, Recipe]:
    """Return {bits: recipe `base` with so many for every weight}; ValueError without weights."""
    start = recipe_of(base, model)
    names = [name for name, spec in layer_specs(model, start).items() if spec.weight]
    if not names:
        raise ValueError(f"recipe {base} has no weights to give bits to")
    return {b: with_bits(model, start, dict.fromkeys(names, b), f"{base}-{b}") for b in BITS}


def with_bits(
    model: nn.Module, recipe: Recipe, bits: Mapping[str, int], name: str, title: str = ""
) -> Recipe:
    """Return the recipe with so many bits for the weights of the layers of these names."""
    specs = layer_specs(model, recipe)
    for layer, n in bits.items():
        specs[layer] = replace(specs[layer], weight=replace(specs[layer].weight, bits=n))
    return replace(recipe, name=name, title=title, layers=by_names(specs))


# The budget.


def within_bytes(model, batches, costs: Mapping, budget: float, unit: str, named) -> dict:
    """Return {name: bits} of least cost whose file is no larger than the budget in bytes.

    A file holds, besides codes, scales, floats and a header whose length depends on the recipe,
    so the files of the smallest, the largest and the chosen allocation are written to find out.
    """
    smallest, largest = (dict.fromkeys(costs, bits) for bits in (BITS[0], BITS[-1]))
    low, high = (file_bytes(model, named(bits), batches) for bits in (smallest, largest))
    if unit == "bits":
        budget = low + (high - low) * (budget - BITS[0]) / (BITS[-1] - BITS[0])
    _check_budget(budget, low, high, "bytes")
    if budget == high:
        return largest
    n_weights = {name: model.get_submodule(name).weight.numel() for name in costs}
    prices = {name: {b: ceil(n * b / 8) for b in BITS} for name, n in n_weights.items()}
    least, most = (sum(prices[name][b] for name in costs) for b in (BITS[0], BITS[-1]))
    limit = min(budget - low, most - least)  # for codes, beyond those of the smallest
    while limit > 0:
        bits = allocation(costs, prices, least + limit, unit="bytes")
        over = file_bytes(model, named(bits), batches) - budget
        if over <= 0:
            return bits
        limit -= over
    return smallest


def file_bytes(model: nn.Module, recipe: Recipe, batches) -> int:
    """Return the bytes of the file of a network quantized by `recipe`, without its slow steps."""
    # Which biases grow, these decide.
    kept = [s for s in recipe.steps if s == "correct_biases" or s in recipe.norm_steps]
    fast = replace(
        recipe,
        layers=tuple(
            replace(spec, weight_observer="minmax", input_observer="minmax")
            for spec in recipe.layers
        ),
        steps=("nearest", "calibrate", *kept),
        units=None,
    )
    x, *_ = next(iter(batches))
    two = torch.rand((2, *x.shape[1:]), generator=torch.Generator().manual_seed(0))  # any will do
    return size_bytes(quantize(model, fast, [(two.to(x), None)]), recipe)


def energies(model: nn.Module, uniform: Mapping[int, Recipe], image, names) -> tuple[dict, float]:
    """Return {name: {bits: mJ}} of layers whose bits are chosen, and the mJ of all others."""
    found = {bits: energy(model, recipe, image) for bits, recipe in uniform.items()}

    def price(layers: dict, name: str) -> float:
        if name not in layers:
            raise never_ran(name)
        return sum(layers[name][part] for part in PARTS) / PJ_PER_MJ

    prices = {n: {b: price(of["layers"], n) for b, of in found.items()} for n in names}
    of_lowest = sum(of_layer[BITS[0]] for of_layer in prices.values())
    return prices, found[BITS[0]]["total"] / PJ_PER_MJ - of_lowest


def _check_prices(prices: Mapping, costs: Mapping) -> None:
    for name in costs:
        if any(b not in prices.get(name, ()) for b in costs[name]):
            raise ValueError(f"what {name} takes with each of {BITS} bits is not given")


def _check_budget(budget: float, low: float, high: float, unit: str) -> None:
    if low <= budget <= high:
        return
    where, end = ("below the smallest", low) if budget < low else ("above the largest", high)
    raise ValueError(f"a budget of {budget:.12g} {unit} is {where} allocation, {end:.12g}")


# The allocation.


def allocation(costs: Mapping, prices: Mapping, budget: float, fixed=0.0, unit="") -> dict:
    """Return {name: key} of least cost whose prices, with `fixed`, are within the budget.

    Both tables are {name: {key: number}}. It is a multiple-choice knapsack problem, solved to its
    optimum by scipy's HiGHS. ValueError for a budget below the cheapest or above the dearest of all
    allocations, with `fixed` added to both.
    """
    milp, Bounds, LinearConstraint = import_milp()
    options = [(name, key) for name in costs for key in costs[name]]
    of_groups = {name: [prices[name][key] for key in costs[name]] for name in costs}
    low, high = (fixed + sum(map(end, of_groups.values())) for end in (min, max))
    _check_budget(budget, low, high, unit)
    # What every option of a group costs plays no part, nor what the cheapest takes; the rest is
    # scaled to the solver's tolerances.
    cost = np.array([costs[name][key] - min(costs[name].values()) for name, key in options])
    price = np.array([prices[name][key] - min(of_groups[name]) for name, key in options])
    whole = price.max() or 1.0
    one_each = np.array([[float(name == of) for of, _ in options] for name in costs])
    within = LinearConstraint(1000 * price / whole, ub=1000 * (budget - low) / whole)
    solved = milp(
        1000 * cost / (cost.max() or 1.0),
        integrality=np.ones_like(cost),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), within],
        options={"mip_rel_gap": 0},
    )
    if solved.status != 0:
        raise ValueError(f"no allocation was found: {solved.message}")
    return {name: key for (name, key), share in zip(options, solved.x) if share > 0.5}


def import_milp():
    """Return scipy's solver and what it takes; ImportError that says what to install."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ModuleNotFoundError as error:
        raise ImportError("mixed precision needs scipy: pip install scipy") from error
    return milp, Bounds, LinearConstraint
