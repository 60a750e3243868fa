"""Mixed precision: allocations against brute force, costs against their definitions, and recipes
that are ordinary ones."""

import builtins
import copy
import dataclasses
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from small import draw, small_network
from torch import nn

import ptq
from ptq import packing
from ptq.analysis import costs as costs_module
from ptq.analysis.costs import nuclear_norms
from ptq.analysis.energy import energy
from ptq.analysis.mixed import (
    BITS,
    allocation,
    energies,
    file_bytes,
    layer_costs,
    mixed_recipe,
    parse_name,
    uniform_recipes,
    with_bits,
)
from ptq.layers import QuantizedLayer
from ptq.methods import STEPS
from ptq.pipeline import layer_specs

BATCHES = [(draw(6, 3, 8, 8, seed=i), None) for i in range(2)]


def network():
    """Large enough that codes matter beside the header of a file, and quick."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    ).eval()


NAMES = ("0", "3", "6", "8")


@pytest.fixture(scope="module")
def costs():
    return layer_costs(network(), BATCHES)


def brute_force(costs, prices, budget):
    """The least cost of all allocations, None if none is within the budget."""
    return min(
        (
            sum(c[i] for c, i in zip(costs, picked))
            for picked in itertools.product(*(range(len(group)) for group in costs))
            if sum(p[i] for p, i in zip(prices, picked)) <= budget
        ),
        default=None,
    )


def allocate(costs, prices, budget, **more):
    """The options picked of tables whose rows are groups."""
    tables = ({i: dict(enumerate(row)) for i, row in enumerate(rows)} for rows in (costs, prices))
    picked = allocation(*tables, budget, **more)
    assert list(picked) == list(range(len(costs)))
    return tuple(picked.values())


def test_the_vector_of_three_layers():
    costs = [[9, 3, 1], [4, 2, 1], [20, 2, 1]]
    prices = [[10, 15, 20], [20, 30, 40], [5, 7.5, 10]]
    assert allocate(costs, prices, 54) == (2, 0, 2)
    assert allocate(costs, prices, 54 + 7, fixed=7) == (2, 0, 2)


@pytest.mark.parametrize("seed", range(25))
def test_no_allocation_costs_less(seed):
    rng = random.Random(seed)
    groups = rng.randint(1, 8)
    costs = [[rng.lognormvariate(0, 4) for _ in BITS] for _ in range(groups)]  # over many decades
    n = [rng.randint(10, 10**6) for _ in range(groups)]
    prices = [[-(-m * bits // 8) for bits in BITS] for m in n]
    low, high = (sum(group[i] for group in prices) for i in (0, -1))
    budget = rng.uniform(low, high)
    picked = allocate(costs, prices, budget)
    assert sum(p[i] for p, i in zip(prices, picked)) <= budget
    small = [[1e-9 * price for price in group] for group in prices]  # bytes are many, and mJ few
    assert allocate(costs, small, 1e-9 * budget) == picked
    cost = sum(c[i] for c, i in zip(costs, picked))
    assert cost == pytest.approx(brute_force(costs, prices, budget), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_of_twelve_layers_no_allocation_near_the_best_is_taken_for_it(seed):
    rng = random.Random(seed)
    costs = [[rng.uniform(1, 1.5) * 0.5**bits for bits in BITS] for _ in range(12)]
    prices = [[n * bits for bits in BITS] for n in (rng.randint(10, 100) for _ in range(12))]
    budget, best = sum(group[2] for group in prices), {0: 0.0}  # {price: its least cost}
    for group in zip(costs, prices):
        reached = {}
        for (before, so_far), (cost, price) in itertools.product(best.items(), zip(*group)):
            if (total := before + price) <= budget:
                reached[total] = min(so_far + cost, reached.get(total, 1.0))
        best = reached
    picked = allocate(costs, prices, budget)
    found = sum(c[i] for c, i in zip(costs, picked))
    assert found == pytest.approx(min(best.values()), rel=1e-6)


def test_budgets_that_nothing_or_everything_fits_are_refused(costs):
    tables = [[2, 1]], [[10, 20]]
    with pytest.raises(ValueError, match="of 9 kB is below the smallest allocation, 10"):
        allocate(*tables, 9, unit="kB")
    with pytest.raises(ValueError, match="of 21 kB is above the largest allocation, 20"):
        allocate(*tables, 21, unit="kB")
    for unit in ("bytes", "bits", "mJ"):
        for amount, where in (("1e-9", "below the smallest"), ("1e12", "above the largest")):
            with pytest.raises(ValueError, match=f"a budget of 1e.* {unit} is {where}"):
                mixed_recipe(f"mixed-{amount}{unit}", network(), BATCHES, costs)
    with pytest.raises(ValueError, match="recipe fp32 has no weights"):
        mixed_recipe("mixed-5bits-fp32", network(), BATCHES)


def test_a_name_says_budget_cost_and_base():
    assert parse_name("mixed-5bits") == (5, "bits", "noise", "w4a8")
    assert parse_name("mixed-700000bytes-fisher") == (700000, "bytes", "fisher", "w4a8")
    assert parse_name("mixed-0.25mJ-w4-gptq") == (0.25, "mJ", "noise", "w4-gptq")
    assert parse_name("mixed-2e1ms-nuclear-w4") == (20, "ms", "nuclear", "w4")
    for name in ("mixed-5", "mixed-5MB", "mixed--5bits", "mixed-5.5.5bits", "mixed-bits", "w4"):
        with pytest.raises(ValueError, match=f"{name} names no budget: write mixed-5bits"):
            parse_name(name)
    with pytest.raises(ValueError, match="starts from taste, which is no recipe"):
        parse_name("mixed-5bits-taste")


def file_sizes(model, base):
    """Of the smallest and of the largest allocation."""
    uniform = uniform_recipes(model, base)
    return [file_bytes(model, uniform[bits], BATCHES) for bits in (4, 8)]


@pytest.mark.parametrize("norms", ["shift_norms", "norms"])
def test_bytes_are_those_of_the_file_where_biases_grow_after_norms(norms, monkeypatch):
    monkeypatch.setitem(STEPS, "norms", STEPS["shift_norms"])  # as a step of one's own
    steps = ("nearest", "calibrate", norms, "correct_biases")
    recipe = dataclasses.replace(ptq.recipe("w4a8", network()), steps=steps)
    made = ptq.quantize(network(), recipe, BATCHES)
    assert made[0].layer.bias is None  # of a convolution that had none, before a norm
    assert file_bytes(network(), recipe, BATCHES) == packing.size_bytes(made, recipe)


@pytest.mark.parametrize("base", ["w4a8", "w4-gptq"])
def test_a_mixed_recipe_is_an_ordinary_one(base, costs, tmp_path):
    model = network()
    recipe = mixed_recipe(f"mixed-5.5bits-{base}", model, BATCHES, costs)
    assert recipe.name == f"mixed-5.5bits-{base}"
    start = ptq.recipe(base, model)
    assert recipe.steps == start.steps and recipe.exportable
    assert ptq.Recipe.fromdict(recipe.asdict()) == recipe
    made = ptq.quantize(model, recipe, BATCHES)
    bits = {n: m.format.bits for n, m in made.named_modules() if isinstance(m, QuantizedLayer)}
    assert set(bits) == set(NAMES) and len(set(bits.values())) > 1
    packing.save(made, recipe, tmp_path / "a")
    loaded, again = packing.load(tmp_path / "a", model)
    x = BATCHES[0][0]
    assert again == recipe and torch.equal(loaded(x), made(x))
    low, high = file_sizes(model, base)
    assert low < (tmp_path / "a").stat().st_size <= low + (high - low) * 1.5 / 4 + 64


def test_a_base_whose_softmax_has_a_format_of_its_own_is_a_base_like_others():
    images = [(draw(4, 3, 32, 32), None)]
    recipe = mixed_recipe("mixed-5bits-w8a8-tensorrt", small_network(), images)
    assert any(spec.attention for spec in recipe.layers)


def test_the_file_is_within_a_budget_of_bytes_and_no_smaller_one_is_better(costs):
    model = network()
    low, high = file_sizes(model, "w4a8")
    budget = (low + high) // 2
    recipe = mixed_recipe(f"mixed-{budget}bytes", model, BATCHES, costs)
    made = ptq.quantize(model, recipe, BATCHES)
    assert packing.size_bytes(made, recipe) <= budget
    picked = [made.get_submodule(n).format.bits for n in NAMES]
    cost = sum(costs[n][b] for n, b in zip(NAMES, picked))
    numbers = [model.get_submodule(n).weight.numel() for n in NAMES]
    tables = (
        [[costs[n][b] for b in BITS] for n in NAMES],
        [[m * b / 8 for b in BITS] for m in numbers],
    )
    codes = sum(numbers) * 4 / 8 + budget - low
    # Several widths take a longer header, of less than 1000 bytes here.
    assert brute_force(*tables, codes) <= cost <= brute_force(*tables, codes - 1000)


def test_the_ends_of_the_budget_are_uniform(costs):
    for bits in (4, 8):
        recipe = mixed_recipe(f"mixed-{bits}bits", network(), BATCHES, costs)
        assert {spec.weight.bits for spec in recipe.layers} == {bits}


def test_a_budget_of_energy_is_kept_and_spent_best(costs):
    model, image = network(), BATCHES[0][0][:1]
    uniform = uniform_recipes(model, "w4a8")
    budget = energy(model, uniform[6], image)["total"] / 1e9  # pJ
    recipe = mixed_recipe(f"mixed-{budget!r}mJ", model, BATCHES, costs)
    assert energy(model, recipe, image)["total"] / 1e9 <= budget * (1 + 1e-9)
    prices, fixed = energies(model, uniform, image, NAMES)
    assert fixed + sum(of[6] for of in prices.values()) == pytest.approx(budget)
    tables = ([[table[n][b] for b in BITS] for n in NAMES] for table in (costs, prices))
    made = ptq.quantize(model, recipe, BATCHES)
    found = sum(costs[n][made.get_submodule(n).format.bits] for n in NAMES)
    assert found == pytest.approx(brute_force(*tables, budget - fixed + 1e-12))


def test_a_budget_of_measured_latency_takes_what_is_fast(costs):
    model = network()
    ms = {name: {4: 1.0, 5: 2.0, 6: 3.0, 7: 3.0, 8: 1.5} for name in NAMES}
    recipe = mixed_recipe("mixed-7ms", model, BATCHES, costs, (ms, 1.0))
    assert {spec.weight.bits for spec in recipe.layers} == {8}  # slower than 4, better than 6
    with pytest.raises(ValueError, match="what 0 takes with each of"):
        mixed_recipe("mixed-7ms", model, BATCHES, costs, ({"0": {4: 1.0}}, 1.0))


def test_without_scipy_one_line_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="^mixed precision needs scipy: pip install scipy$"):
        mixed_recipe("mixed-5bits", network(), BATCHES)


# Costs.


@pytest.mark.parametrize("kind", ["noise", "fisher", "nuclear"])
def test_fewer_bits_cost_more(kind):
    found = layer_costs(network(), BATCHES, kind)
    assert list(found) == list(NAMES)
    for name in NAMES:
        assert found[name][4] > found[name][6] > found[name][8] > 0


def rounded(model, name, bits, step="nearest"):
    """The network with the weight of one layer rounded, and what rounding added to it."""
    spec = ptq.LayerSpec(name, ptq.Uniform(bits, granularity="channel"))
    made = ptq.quantize(model, ptq.Recipe("r", layers=(spec,), steps=(step,)), BATCHES)
    return made, made.get_submodule(name).layer.weight.detach() - model.get_submodule(name).weight


@pytest.mark.parametrize("base", ["w4a8-nearest", "w4a8"])
def test_noise_is_the_change_of_the_logits_over_their_variance(base):
    model, x = network(), torch.cat([x for x, _ in BATCHES])
    costs = layer_costs(model, BATCHES, "noise", base)
    with torch.no_grad():
        exact = model(x)
        for name, bits in (("0", 4), ("6", 6)):
            made, _ = rounded(model, name, bits, "gptq" if base == "w4a8" else "nearest")
            if base == "w4a8" and name == "0":  # which shifts norms; of these, one is behind it
                norm, (before, after) = made[1], (m[0](x) for m in (model, made))
                norm.running_mean += after.mean((0, 2, 3)) - before.mean((0, 2, 3))
                variances = (y.var((0, 2, 3)) + norm.eps for y in (after, before))
                norm.running_var *= next(variances) / next(variances)
            expected = (made(x) - exact).square().mean() / exact.var()
            assert costs[name][bits] == pytest.approx(expected.item(), rel=1e-3)


def test_noise_of_a_weight_that_is_hardly_rounded_is_hardly_any():
    """Also behind several batch norms, which are shifted."""
    model = small_network()
    start = ptq.recipe("w4a8", model)
    names = [name for name, spec in layer_specs(model, start).items() if spec.weight]
    recipes = {bits: with_bits(model, start, dict.fromkeys(names, bits), "r") for bits in (4, 16)}
    costs = costs_module.noise_costs(model, recipes, [(draw(8, 3, 32, 32), None)])
    assert len(costs) == len(names) > 10
    for cost in costs.values():
        assert cost[16] < 1e-4 * cost[4]


def test_fisher_is_the_expected_rise_of_the_divergence(monkeypatch):
    """Of what the network predicts: KL(p || p + change) is half the change in F's metric."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 2)).eval()
    x = draw(400, 3)
    monkeypatch.setattr(costs_module, "IMAGES", 400)
    monkeypatch.setattr(costs_module.first_images, "__defaults__", (400,))
    found = layer_costs(model, [(x, None)], "fisher", "w4a8-nearest")["0"]
    p = model(x).detach().softmax(1)  # of two classes: E[g g^T] = p (1 - p) x x^T for each output
    diagonal = (p.prod(1)[:, None] * x.square()).mean(0)
    _, off = rounded(model, "0", 4)
    assert found[4] == pytest.approx((diagonal * off.square()).sum().item() / 2, rel=0.2)


def test_nuclear_is_the_norm_times_the_error_of_the_output():
    model = network()
    found = layer_costs(model, BATCHES, "nuclear", "w4a8-nearest")
    with torch.no_grad():
        x = torch.cat([x for x, _ in BATCHES])
        first, off = F.conv2d(x, model[0].weight, padding=1), rounded(model, "0", 4)[1]
        error = F.conv2d(x, off, padding=1).square().sum((1, 2, 3))
        norms = torch.linalg.matrix_norm(first.flatten(2), "nuc")
        assert found["0"][4] == pytest.approx((norms * error).mean().item(), rel=1e-4)
        flat = model[:6](x)
        error = F.linear(flat, rounded(model, "6", 6)[1]).square().sum(1)
        norms = F.linear(flat, model[6].weight, model[6].bias).norm(dim=1)
        assert found["6"][6] == pytest.approx((norms * error).mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["noise", "fisher", "nuclear"])
def test_weights_that_a_recipe_leaves_in_float_have_no_cost(kind):
    weights = ptq.LayerSpec(".*", ptq.Uniform(4))
    recipe = ptq.Recipe("r", layers=(ptq.LayerSpec("0"), weights))
    found = costs_module.COSTS[kind](network(), {4: recipe}, BATCHES)
    assert list(found) == [name for name in NAMES if name != "0"]


@pytest.mark.parametrize("shape", [(3, 7, 4), (3, 4, 7), (2, 5, 5)])
def test_nuclear_norms_are_those_of_torch(shape):
    y = draw(*shape)
    expected = torch.linalg.matrix_norm(y.double(), "nuc")
    torch.testing.assert_close(nuclear_norms(y), expected)


@pytest.mark.parametrize("kind", ["noise", "fisher", "nuclear"])
def test_the_network_stays_as_it_is(kind):
    model = network()
    before = copy.deepcopy(model.state_dict())
    layer_costs(model, BATCHES, kind)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
