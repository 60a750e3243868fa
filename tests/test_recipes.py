"""Recipes as data: what they say of layers, and what is refused."""

from dataclasses import replace
from itertools import product

import pytest
from small import draw, small_network
from torch import nn

import ptq
from mobilevit import MobileViT
from ptq.formats import Uniform
from ptq.layers import QuantizedAttentionCore, QuantizedLayer, Quantizer
from ptq.pipeline import attach, layer_specs
from ptq.recipe import LayerSpec, Recipe
from ptq.recipes import RECIPES

W8A8 = Recipe(
    "test", layers=(LayerSpec(".*", Uniform(8, granularity="channel"), Uniform(8, False)),)
)


RANGED = list(product(["w8a8", "fq-vit", "i-bert", "i-vit"], ["minmax", "ema", "percentile", "kl"]))
RANGED += [("i-bert-published", observer) for observer in ("ema", "percentile", "kl")]


@pytest.mark.parametrize("base, observer", RANGED)
def test_a_name_may_end_in_an_observer_and_in_one_scale_a_weight(base, observer):
    model = small_network()
    spoken = ptq.recipe(f"{base}-{observer}-tensor", model)
    assert spoken.name == f"{base}-{observer}-tensor" and spoken.steps == RECIPES[base].steps
    batches = [(draw(4, 3, 64, 64, seed=k), None) for k in range(2)]
    quantized = ptq.quantize(model, spoken, batches)
    layers = [layer for layer in quantized.modules() if isinstance(layer, QuantizedLayer)]
    assert layers and all(layer.scale.shape == (1,) for layer in layers)
    seen = {m.observer_name for m in quantized.modules() if isinstance(m, Quantizer)}
    assert seen - {"factors"} == {observer}  # FQ-ViT's norms have ranges with factors


VAIN = ["w4-kl", "w8a8-mse", "fp32-tensor", "i-bert-taste", "-kl", "i-bert-published-minmax"]
VAIN += ["w4-kl-tensor", "w8a8-mse-tensor", "uniform8-tensor-tensor"]


@pytest.mark.parametrize("name", VAIN)
def test_names_whose_end_changes_nothing_are_refused(name):
    with pytest.raises(ValueError, match="would be in vain|no recipe is called"):
        ptq.recipe(name)


def test_one_scale_may_follow_a_recipe_whose_own_name_ends_in_an_observer():
    (spec,) = ptq.recipe("w4-minmax-tensor").layers
    assert spec == LayerSpec(".*", Uniform(4), weight_observer="minmax")


def test_only_where_each_channel_has_its_own_filter_has_each_its_own_scale():
    convolutions = (nn.Conv2d(4, 8, 3, groups=groups) for groups in (1, 2, 4))
    network = nn.Sequential(*convolutions, nn.Conv2d(1, 4, 3))
    specs = layer_specs(network, ptq.recipe("w8a8", network))
    scales = [specs[name].input.granularity for name in "0123"]
    assert scales == ["tensor", "tensor", "channel", "tensor"]


@pytest.mark.parametrize("name", ["w8a8-minmax", "w8a8-percentile", "w8a8-kl", "w8a8-tensor"])
def test_ranges_and_scales_of_the_ablation_are_there_for_other_networks(name):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4))
    specs = layer_specs(network, ptq.recipe(name, network))
    assert specs["1"].input.granularity == "channel"
    if name == "w8a8-tensor":
        assert {spec.weight for spec in specs.values()} == {Uniform(8)}
    else:
        assert {spec.input_observer for spec in specs.values()} == {name.removeprefix("w8a8-")}


def test_recipes_that_contradict_themselves_are_refused():
    layers = W8A8.layers
    with pytest.raises(ValueError, match="has a peer, which takes no layers"):
        Recipe("r", layers=layers, peer="torch-fx")
    with pytest.raises(ValueError, match="r has steps, but no layers"):
        Recipe("r", steps=("nearest",))
    with pytest.raises(ValueError, match="r has units, but rounds to nearest"):
        Recipe("r", layers=layers, steps=("nearest",), units="stem")
    with pytest.raises(ValueError, match="pointwise layers keep their weights"):
        LayerSpec(".*", weight=Uniform(4), kind="pointwise")


def test_names_and_patterns_of_nothing_are_refused(model, batches):
    weights = LayerSpec(".*", Uniform(4))
    for recipe, says in (
        (Recipe("r", "", (weights,), ("up",)), "no step is called up: there are nearest, gptq"),
        (Recipe("r", "", (weights,), ("gptq", "keep")), "no step is called keep"),
        (Recipe("r", "", (weights,), ("shift_norms",)), "no step of recipe r rounds the weight of"),
        (Recipe("r", "", W8A8.layers, ("nearest",)), "no step of recipe r calibrates the input"),
        (Recipe("r", layers=(replace(weights, weight_observer="l1"),)), "no observer is called l1"),
        (Recipe("r", layers=(LayerSpec(".*", kind="odd"),)), "no kind of layers is called odd"),
        (Recipe("r", "", (weights,), ("gptq",), units="block"), "is called block"),
    ):
        with pytest.raises(ValueError, match=says):
            ptq.quantize(model, recipe, batches)


@pytest.mark.parametrize("plain", [None, "w8a8", {"type": "Uniform", "bits": 4}], ids=str)
def test_what_is_no_recipe_is_refused(plain):
    with pytest.raises(ValueError, match="not a recipe"):
        Recipe.fromdict(plain)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_recipes_are_data(recipe):
    assert Recipe.fromdict(recipe.asdict()) == recipe
    with pytest.raises(ValueError, match="not a recipe"):
        Recipe.fromdict(recipe.asdict() | {"surprise": 1})


def test_recipes_for_convolutions_leave_linear_layers_and_products_their_inputs():
    network = MobileViT("xxs")
    attach(network, layer_specs(network, RECIPES["w7a8-convs"]))
    layers = {n: m for n, m in network.named_modules() if isinstance(m, QuantizedLayer)}
    for name, layer in layers.items():
        linear = isinstance(layer.layer, nn.Linear)
        early = name.startswith(
            ("stem", "stages.0.0.e", "stages.0.0.d", "stages.1.0.e", "stages.1.0.d")
        )
        assert isinstance(layer.input, Quantizer) == (not linear and not early), name
        assert layer.format.bits == (8 if linear else 7), name
    assert not any(isinstance(m, QuantizedAttentionCore) for m in network.modules())


def test_a_softmax_of_more_than_eight_bits_is_not_exported():
    for bits in (8, 16):
        core = LayerSpec(".*core", input=Uniform(8), attention=Uniform(bits, symmetric=False))
        assert Recipe("r", layers=(core,)).exportable == (bits == 8)


@pytest.mark.parametrize("name", ["w7a8", "w7a8-convs"])
def test_pairs_of_products_of_seven_bits_fit_sixteen(name):
    network = MobileViT("xxs")
    attach(network, layer_specs(network, RECIPES[name]))
    for module in network.modules():
        if isinstance(module, QuantizedAttentionCore):
            pairs = [("q", "k"), ("attention", "v")]
            factors = [tuple(module.inputs[n].format for n in pair) for pair in pairs]
        elif isinstance(module, QuantizedLayer) and isinstance(module.input, Quantizer):
            factors = [(module.input.format, module.format)]
        else:
            continue
        for first, second in factors:
            largest = first.qmax + 128 * first.symmetric  # kernels move signed codes up to unsigned
            assert 2 * largest * max(-second.qmin, second.qmax) < 2**15
