"""Ranking-aware quantization: the loss against a loop over pairs, correlation against numpy, the
search against its own start and against every choice."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import draw, small_network
from torch import nn

import ptq
from ptq.formats import Uniform
from ptq.graph import captured
from ptq.layers import QuantizedAttentionCore, QuantizedLayer
from ptq.methods import ranking
from ptq.methods.ranking import (
    FACTORS,
    Attention,
    descend,
    dissimilarity,
    inverted_share,
    mean_ranking_loss,
    ranking_loss,
)
from ptq.packing import load, save
from ptq.recipe import LayerSpec, Recipe
from ptq.recipes.ranking import RANKING

# The losses.


def by_pairs(scores, quantized, theta):
    """Sum over pairs of one row, in a double loop."""
    total = 0.0
    for i, j in itertools.combinations(range(len(scores)), 2):
        sign = (scores[i] > scores[j]) * 1 - (scores[i] < scores[j]) * 1
        total += max(0.0, theta - (quantized[i] - quantized[j]) * sign)
    return total


def test_the_vector_of_three_scores():
    a, b = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.45, 0.25, 0.30]])
    assert ranking_loss(a, b, 0.2, "sum").item() == pytest.approx(0.3)
    assert ranking_loss(a, b, 0.2, "mean").item() == pytest.approx(0.1)
    assert ranking_loss(a, a, 0.2, "sum").item() == pytest.approx(0.1)
    assert inverted_share(a, b) == pytest.approx(1 / 3) and inverted_share(a, a) == 0


@pytest.mark.parametrize("chunk", [1, 300, 2**21])
def test_the_loss_is_that_of_a_loop_over_pairs(chunk, monkeypatch):
    monkeypatch.setattr(ranking, "CHUNK", chunk)
    scores = (4 * draw(7, 12)).round() / 4  # with ties, which cost theta
    quantized = scores + 0.5 * draw(7, 12, seed=1)
    expected = [by_pairs(s, q, 0.2) for s, q in zip(scores.tolist(), quantized.tolist())]
    found = ranking_loss(scores, quantized, 0.2, "sum")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(ranking_loss(scores, quantized, 0.2) * 66, expected, rtol=1e-5)
    mean = np.mean(expected)
    assert mean_ranking_loss(scores, quantized, "mean") == pytest.approx(mean / 66, rel=1e-5)
    assert mean_ranking_loss(scores, quantized, "sum") == pytest.approx(mean * 12, rel=1e-5)


def test_inverted_pairs_are_those_whose_order_turns():
    scores, quantized = draw(5, 9), draw(5, 9, seed=1)
    pairs = list(itertools.combinations(range(9), 2))
    turned = [
        (s[i] - s[j]) * (q[i] - q[j]) < 0 for s, q in zip(scores, quantized) for i, j in pairs
    ]
    assert inverted_share(scores, quantized) == pytest.approx(np.mean(turned))
    assert inverted_share(scores, -scores) == 1


def test_dissimilarity_is_what_numpys_correlation_lacks_of_one():
    x = torch.tensor([[1.0, 2, 3, 4]])
    y = torch.tensor([[1.1, 1.9, 3.2, 3.9]])
    assert 1 - dissimilarity(x, y).item() == pytest.approx(0.993371, abs=1e-6)
    x, y = draw(3, 4, 5), draw(3, 4, 5) + 0.01 * draw(3, 4, 5, seed=1)
    expected = [1 - np.corrcoef(a.double().ravel(), b.double().ravel())[0, 1] for a, b in zip(x, y)]
    np.testing.assert_allclose(dissimilarity(x, y).numpy(), expected, rtol=1e-3)
    np.testing.assert_allclose(dissimilarity(x, 3 * x + 5).numpy(), 0, atol=1e-6)
    for other in (x, torch.ones_like(x)):
        assert dissimilarity(other, torch.ones_like(x)).tolist() == pytest.approx([1, 1, 1])


# The search.


def test_factors_hold_the_start_and_the_ends_of_the_paper():
    assert 1.0 in FACTORS and FACTORS[0] == 0.5 and FACTORS[-1] == 1.2


def test_the_search_ends_where_no_single_change_is_better():
    def loss(f):  # with a valley that lies across both axes
        return (f[0] + f[1] - 1.5) ** 2 + 0.1 * (f[0] - 0.7) ** 2

    found = descend(loss, 2)
    assert loss(found) < loss((1.0, 1.0))
    alone = [loss((f, found[1])) for f in FACTORS] + [loss((found[0], f)) for f in FACTORS]
    assert loss(found) == min(alone)
    assert descend(lambda f: 0.0, 2) == (1.0, 1.0)


def test_the_search_stops_after_so_many_rounds(monkeypatch):
    monkeypatch.setattr(ranking, "ROUNDS", 1)
    found = descend(lambda f: (f[0] - f[1]) ** 2 + (f[0] - 0.5) ** 2, 2)
    assert found != (0.5, 0.5)


FORMATS = {"weight": Uniform(4), "input": Uniform(4, symmetric=False)}


def searched(network, x, *steps, **formats):
    spec = LayerSpec(
        ".*", **(formats or FORMATS), weight_observer="minmax", input_observer="minmax"
    )
    return ptq.quantize(network, Recipe("r", "", (spec,), steps), [(x[:8], None), (x[8:], None)])


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (16, 7, 6)),
    "conv": (lambda: nn.Conv2d(6, 5, 3, bias=False), (16, 6, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (16, 6, 6, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_of_all_pairs_of_factors_none_next_to_the_found_one_is_better(kind):
    """By an independent way through all factors of one scale, the other as it was found."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make(), draw(*shape) ** 3  # with outliers, which clipping pays for
    start = searched(nn.Sequential(layer), x, "nearest", "calibrate")[0]
    found = searched(nn.Sequential(layer), x, "similarity")[0]
    factor_w = (found.scale / start.scale).item()
    factor_x = (found.input.scale / start.input.scale).item()
    assert {round(factor_w * 20, 3), round(factor_x * 20, 3)} <= set(range(10, 25))

    def correlation(fw, fx):
        w_format, x_format = FORMATS["weight"], FORMATS["input"]
        sw, sx, z = start.scale * fw, start.input.scale * fx, start.input.zero_point
        weight = w_format.decode(w_format.encode(layer.weight, sw), sw)
        rounded = x_format.decode(x_format.encode(x, sx, z), sx, z)
        if kind == "linear":
            y = F.linear(rounded, weight, layer.bias)
        else:
            y = F.conv2d(rounded, weight, layer.bias, groups=layer.groups)
        with torch.no_grad():
            pairs = zip(layer(x).flatten(1).numpy(), y.detach().flatten(1).numpy())
        return np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])

    best = correlation(factor_w, factor_x)
    assert best > correlation(1, 1) + 1e-4
    assert best > max(correlation(f, factor_x) for f in FACTORS) - 1e-6
    assert best > max(correlation(factor_w, f) for f in FACTORS) - 1e-6
    torch.testing.assert_close(
        found.layer.weight, FORMATS["weight"].decode(found.codes, found.scale)
    )


def test_scales_of_channels_share_a_factor():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), draw(16, 6) ** 3
    formats = {"weight": Uniform(4, granularity="channel")}
    start = searched(nn.Sequential(layer), x, "nearest", **formats)[0]
    found = searched(nn.Sequential(layer), x, "similarity", **formats)[0]
    ratio = found.scale / start.scale
    assert ratio.numel() == 5
    torch.testing.assert_close(ratio, ratio[:1].expand(5))


# Attention.


class SeparateHeads(nn.Module):
    """Attention as others write it: three layers, no core of ours, a norm of the queries."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(8, 8)

    def forward(self, x):
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in layers)
        y = F.scaled_dot_product_attention(query=self.norm(q), key=k, value=v)
        return self.out(y.transpose(1, 2).flatten(2))


def test_scores_depend_on_queries_and_keys_and_on_no_other_layer():
    network = nn.Sequential(nn.Linear(8, 8), SeparateHeads(), nn.Linear(8, 3)).eval()
    names = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    batches = [(draw(3, 5, 8), None)]
    (found,) = Attention.all_in(network, names, batches)
    assert found.unit is network[1] and found.feeders == ["1.query", "1.key"]
    x = network[0](batches[0][0])
    q, k = (
        layer(x).unflatten(-1, (2, 4)).transpose(1, 2)
        for layer in (network[1].query, network[1].key)
    )
    scores = (network[1].norm(q) @ k.mT).flatten(0, 2)  # [B * h * N, N]
    assert found.scores().shape == (30, 5)  # fewer than ROWS, so all of them
    assert {tuple(row) for row in found.scores().tolist()} == {
        tuple(row) for row in scores.tolist()
    }
    doubled = found.scores("1.key", [2 * network[1].key(x)])
    torch.testing.assert_close(doubled, 2 * found.scores())


class Sized(SeparateHeads):
    """Attention that is told a size besides, which it can't do without."""

    def forward(self, x, size):
        return super().forward(x.view(len(x), *size))


@pytest.mark.parametrize("by_name", [True, False])
def test_attention_may_take_more_than_a_tensor(by_name):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Sized()

        def forward(self, x):
            return self.attn(x, size=(5, 8)) if by_name else self.attn(x, (5, 8))

    layers = ["attn.query", "attn.key", "attn.value", "attn.out"]
    (found,) = Attention.all_in(Outer().eval(), layers, [(draw(3, 40), None)])
    assert found.feeders == ["attn.query", "attn.key"]


def test_a_part_of_the_rows_is_drawn_alike_each_time(monkeypatch):
    monkeypatch.setattr(ranking, "ROWS", 8)
    network = nn.Sequential(SeparateHeads())
    batches = [(draw(3, 5, 8), None), (draw(2, 5, 8, seed=1), None)]
    (found,) = Attention.all_in(network, ["0.query", "0.key"], batches)
    assert found.scores().shape == (8, 5) and torch.equal(found.scores(), found.scores())


BATCHES = [(draw(4, 3, 32, 32, seed=i), None) for i in range(2)]
PLACE = "body.2.layers.0.attn.core"  # of the one attention in a small network


def of_attention(steps, bits=4):
    """MobileViT's kinds of layers in the formats of the paper."""
    spec = LayerSpec(
        ".*", Uniform(bits), Uniform(bits), weight_observer="minmax", input_observer="minmax"
    )
    return Recipe("r", "", (spec,), steps)


def scores_of(network, quantized):
    """q k^T [R, N] of the one attention of a network, in float and quantized."""
    rounded = quantized.get_submodule(PLACE).inputs
    scores = {network: [], quantized: []}
    with torch.no_grad():
        for model, of_model in scores.items():
            for q, k, _ in captured(model, model.get_submodule(PLACE), BATCHES, "input"):
                if model is quantized:
                    q, k = rounded["q"](q), rounded["k"](k)
                of_model.append((q @ k.mT).flatten(0, -2))
    return [torch.cat(of_model) for of_model in scores.values()]


def test_ranking_alone_leaves_all_else_and_keeps_attention_in_better_order():
    network = small_network()
    network.body[2].layers[0].attn.qkv.weight.data *= 20  # so that scores differ by more than theta
    start = ptq.quantize(network, of_attention(("nearest", "calibrate")), BATCHES)
    found = ptq.quantize(network, of_attention(("ranking_alone",)), BATCHES)
    changed = {
        name
        for name, module in found.named_modules()
        if isinstance(module, QuantizedLayer)
        and not torch.equal(module.scale, start.get_submodule(name).scale)
    }
    assert changed <= {"body.2.layers.0.attn.qkv"}
    core, before = (m.get_submodule("body.2.layers.0.attn.core") for m in (found, start))
    assert isinstance(core, QuantizedAttentionCore)
    for name in ("attention", "v"):
        assert torch.equal(core.inputs[name].scale, before.inputs[name].scale)
    losses = [mean_ranking_loss(*scores_of(network, made), "mean") for made in (found, start)]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("step", ["similarity", "ranking", "ranking_sum"])
def test_outputs_come_closer_than_from_the_start(step):
    network = small_network()
    start = ptq.quantize(network, of_attention(("nearest", "calibrate")), BATCHES)
    found = ptq.quantize(network, of_attention((step,)), BATCHES)

    def off(made):
        maps = [[model.body(model.stem(x)) for x, _ in BATCHES] for model in (network, made)]
        return torch.cat(list(map(dissimilarity, *maps))).mean().item()

    assert 0 < off(found) < off(start)


@pytest.mark.parametrize("recipe", RANKING, ids=[r.name for r in RANKING])
def test_a_network_without_attention_is_refused_where_it_is_ranked(recipe):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    batches = [(draw(8, 3, 4, 4), None)]
    own = ptq.recipe(recipe.name, network)
    if "similarity" in recipe.steps:
        assert ptq.quantize(network, own, batches)(batches[0][0]).shape == (8, 3)
        return
    with pytest.raises(ValueError, match=f"recipe {recipe.name} ranks attention scores, and") as e:
        ptq.quantize(network, own, batches)
    assert "\n" not in str(e.value)


def test_attention_behind_layers_in_float_is_refused():
    cores = Recipe("r", layers=(LayerSpec(r".*\.core", input=Uniform(8)),), steps=("ranking",))
    with pytest.raises(ValueError, match="behind a layer that is quantized"):
        ptq.quantize(small_network(), cores, [(draw(4, 3, 32, 32), None)])


@pytest.mark.parametrize("name", ["w4a8-ranking", "w6a6-ranking-published"])
def test_a_recipe_is_saved_and_comes_back(name, tmp_path):
    network = small_network()
    recipe = ptq.recipe(name, network)
    made = ptq.quantize(network, recipe, BATCHES)
    save(made, recipe, tmp_path / "a")
    loaded, again = load(tmp_path / "a", network)
    x = BATCHES[0][0]
    assert again == recipe and torch.equal(loaded(x), made(x))
    if name.endswith("published"):
        for module in made.modules():
            if isinstance(module, QuantizedLayer):
                assert module.format == Uniform(6) and module.scale.shape == (1,)
            if isinstance(module, QuantizedAttentionCore):
                assert module.inputs["attention"].zero_point == 0  # all codes for what is positive
