"""Quantized layers, the pipeline and its corrections on small networks."""

import copy
from dataclasses import replace

import pytest
import torch
from small import Idle, draw
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ptq
from mobilevit import AttentionCore
from ptq.analysis.sensitivity import sensitivities
from ptq.formats import Uniform
from ptq.graph import captured
from ptq.layers import QuantizedAttentionCore, QuantizedLayer, Quantizer
from ptq.methods import adaround
from ptq.methods import nearest as nearest_module
from ptq.recipe import LayerSpec, Recipe
from ptq.recipes import RECIPES

W8A8 = Recipe(
    "test", layers=(LayerSpec(".*", Uniform(8, granularity="channel"), Uniform(8, False)),)
)


@pytest.mark.parametrize(
    "fmt", [Uniform(8, False), Uniform(6), Uniform(8, False, "channel", axis=1)], ids=str
)
def test_a_quantizer_gives_what_its_format_decodes(fmt):
    x = draw(2, 5, 4, 4)
    quantizer = Quantizer(fmt, "minmax")
    assert quantizer(x) is x
    quantizer.observe()
    quantizer(x)
    quantizer.freeze()
    expected = fmt.decode(fmt.encode(x, quantizer.scale, quantizer.zero_point), quantizer.scale,
                          quantizer.zero_point)  # fmt: skip
    assert torch.equal(quantizer(x), expected)
    assert fmt.nearest(x, *quantizer.grid).unique().numel() > 10


def test_every_layer_is_quantized_and_the_original_untouched(model, batches):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quantized = ptq.quantize(model, W8A8, batches)
    kinds = [type(m) for m in model.modules()]
    layers = [m for m in quantized.modules() if isinstance(m, QuantizedLayer)]
    assert len(layers) == kinds.count(nn.Conv2d) + kinds.count(nn.Linear)
    cores = [m for m in quantized.modules() if isinstance(m, QuantizedAttentionCore)]
    assert len(cores) == kinds.count(AttentionCore) == 9
    for layer in layers:
        assert layer.codes.abs().max() > 100 and layer.codes.shape == layer.layer.weight.shape
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    x = batches[0][0]
    error, spread = (quantized(x) - model(x)).square().mean(), model(x).var(0).mean()
    assert 0 < error < 0.08 * spread


def test_sixteen_bits_change_nothing_to_speak_of(model, batches):
    fine = Recipe("fine", layers=(
        LayerSpec(".*", Uniform(16, granularity="channel"), Uniform(16, False), "minmax", "minmax"),
    ))  # fmt: skip
    x = batches[0][0]
    torch.testing.assert_close(
        ptq.quantize(model, fine, batches)(x), model(x), atol=1e-3, rtol=1e-3
    )


def test_the_attention_core_in_float_is_torchs():
    core = QuantizedAttentionCore(Uniform(8), "minmax")
    assert (core.inputs["q"].format.qmin, core.inputs["attention"].format.qmin) == (-128, 0)
    q, k, v = (draw(2, 3, 7, 8, seed=i) for i in range(3))
    torch.testing.assert_close(core(q, k, v), AttentionCore()(q, k, v))


def test_patterns_decide_and_the_first_one_wins(model, batches):
    channel = {"granularity": "channel"}
    recipe = Recipe(
        "mixed",
        layers=(
            LayerSpec("classifier"),
            LayerSpec(r"stem\..*", Uniform(8, **channel)),
            LayerSpec(".*", Uniform(4, **channel)),
        ),
    )
    quantized = ptq.quantize(model, recipe, batches)
    assert quantized.classifier.codes is None
    assert torch.equal(quantized.classifier.layer.weight, model.classifier.weight)
    assert quantized.stem.conv.codes.unique().numel() > 16
    assert quantized.head.conv.codes.unique().numel() <= 16
    for hidden in ((LayerSpec("body"), LayerSpec(".*")), (LayerSpec(".*"), LayerSpec("stem.*"))):
        with pytest.raises(ValueError, match="no layer of the network is left that matches [bs]"):
            ptq.quantize(model, Recipe("r", layers=hidden), batches)


def test_pointwise_layers_compute_on_what_torch_rounds(model, batches):
    spec = LayerSpec(".*", input=Uniform(8, False), kind="pointwise")
    quantized = ptq.quantize(model, Recipe("r", layers=(spec,)), batches)
    pointwise = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm | nn.SiLU)]
    assert sum(isinstance(m, Quantizer) for m in quantized.modules()) == len(pointwise) > 2 * 9 + 3
    for name in pointwise:
        quantizer, _ = layer = quantized.get_submodule(name)
        x = draw(500, *getattr(layer[1], "normalized_shape", [9]))
        grid = quantizer.scale.item(), quantizer.zero_point.item(), 0, 255
        expected = model.get_submodule(name)(torch.fake_quantize_per_tensor_affine(x, *grid))
        # Torch multiplies by the inverse of the scale, which turns a few halves the other way.
        assert (layer(x) - expected).abs().gt(1e-4).any(1).float().mean() < 0.01
        assert (layer(x) - model.get_submodule(name)(x)).abs().gt(1e-4).any(1).float().mean() > 0.9
    assert not torch.allclose(quantized(batches[0][0]), model(batches[0][0]), rtol=1e-3, atol=1e-3)
    with_norms = ptq.quantize(model, RECIPES["w8a8-norms"], batches)
    assert isinstance(with_norms.stages[2][1].norm[0], Quantizer)
    assert isinstance(with_norms.stages[2][1].layers[0].norm1[0], Quantizer)
    assert isinstance(with_norms.stem.norm, nn.BatchNorm2d)


def test_calibration_without_use_or_with_nonsense_is_refused(model, batches):
    with pytest.raises(ValueError, match="idle.*nothing was seen"):
        ptq.quantize(Idle(), W8A8, [(draw(2, 4), None)])
    for recipe in (W8A8, RECIPES["w4-shift"], RECIPES["w4-gptq"]):
        for nothing in ([], None, iter([(draw(2, 4), None)])):
            with pytest.raises(ValueError, match="needs .*calibration (batch|image)"):
                ptq.quantize(model, recipe, nothing)
        with pytest.raises(ValueError, match="pair of its input .* and anything"):
            ptq.quantize(model, recipe, [draw(2, 3, 64, 64)])
    with pytest.raises(ValueError, match="network is on meta, the calibration images on cpu"):
        ptq.quantize(nn.Linear(4, 4, device="meta"), W8A8, [(draw(2, 4), None)])
    one, two = (draw(1, 3, 64, 64), None), (draw(2, 3, 64, 64), None)
    for uneven in ([two, one], [two, one, two]):
        with pytest.raises(ValueError, match="batches of two and more.*batch 1 has one"):
            ptq.quantize(model, RECIPES["w4-shift"], uneven)
    idle = Idle()
    with pytest.raises(ValueError, match="idle never ran"):
        list(captured(idle, idle.idle, [(draw(2, 4), None)], "input"))
    with pytest.raises(ValueError, match="idle never ran"):
        ptq.quantize(idle, replace(W8A8, steps=("gptq", "calibrate")), [(draw(2, 4), None)])


@pytest.mark.parametrize("recipe", ["w8a8", "w4-shift", "w4-biases", "w4-gptq", "w4"])
def test_calibration_images_that_are_not_numbers_are_refused(recipe, model, batches):
    for x in (torch.full((2, 3, 64, 64), torch.nan), torch.empty(0, 3, 64, 64)):
        with pytest.raises(ValueError, match="batch 2 of the calibration images is empty or not f"):
            ptq.quantize(model, RECIPES[recipe], [*batches, (x, None)])


def test_convolutions_with_other_than_zeros_around_are_refused():
    for conv in (nn.Conv2d(3, 4, 3, 1, 1, padding_mode="reflect"), nn.Conv2d(3, 4, 2, 1, "same")):
        with pytest.raises(ValueError, match="zeros around them"):
            ptq.quantize(nn.Sequential(conv), Recipe("r", layers=(LayerSpec(".*", Uniform(4)),)))


WHOLE_BLOCKS = replace(RECIPES["w4"], units=r"stages\.\d\.\d")  # MobileViT's among them


@pytest.mark.parametrize(
    "recipe", [RECIPES["w4-mixed"], RECIPES["w4"], WHOLE_BLOCKS], ids=["mixed", "w4", "blocks"]
)
def test_a_learnt_recipe_beats_its_baseline_and_takes_every_layer_once(
    recipe, model, batches, monkeypatch
):
    monkeypatch.setattr(adaround, "ITERATIONS", 50)
    learnt = ptq.quantize(model, recipe, batches)
    layers = nearest_module.layers_to_round(learnt)
    taken = [
        layer
        for unit in nearest_module.units(learnt, recipe.units)
        for layer in nearest_module.layers_to_round(learnt.get_submodule(unit)).values()
    ]
    assert len(taken) == len(layers) and set(taken) == set(layers.values())
    x = batches[0][0]
    base = ptq.quantize(model, replace(recipe, steps=("nearest",), units=None), batches)
    errors = [(network(x) - model(x)).square().mean() for network in (learnt, base)]
    assert 0 < errors[0] < errors[1]


def test_a_network_that_is_not_finite_is_refused(model, batches):
    broken = copy.deepcopy(model)
    broken.classifier.bias.data[2] = torch.nan
    for recipe in (Recipe("fp32"), RECIPES["w4-nearest"], W8A8):
        with pytest.raises(ValueError, match="classifier.bias of the network is not finite"):
            ptq.quantize(broken, recipe, batches)


def test_sensitivity_is_what_a_recipe_for_that_tensor_alone_does(model, batches):
    weight, input = Uniform(4, granularity="channel"), Uniform(4, False)
    recipe = Recipe("r", layers=(LayerSpec(".*", weight, input),))
    found = sensitivities(model, recipe, batches, lambda network: network(batches[0][0]))
    noises = found["noise"]
    assert len(noises["weights"]) == 35 + 1 + 4 * 9 and len(noises["inputs"]) == 72 + 4 * 9
    x = batches[0][0]
    expected = model(x).detach().double()
    alone = (
        ("weights", "stages.2.1.fuse.conv", LayerSpec(r"stages\.2\.1\.fuse\.conv", weight)),
        ("inputs", "classifier.input", LayerSpec("classifier", None, input)),
    )
    for kind, name, spec in alone:
        logits = ptq.quantize(model, Recipe("one", layers=(spec,)), batches)(x).double()
        noise = (logits - expected).square().mean() / expected.var()
        assert noises[kind][name] == pytest.approx(noise.item(), rel=1e-3) and noise > 0
    largest = max(max(of_kind.values()) for of_kind in noises.values())
    assert found["noise_of_all"] > largest and found["noise_of_rest"] > 0
    qkv = "stages.2.1.layers.0.attn.qkv"
    alone = Recipe("one", "", (LayerSpec(qkv, weight),), ("equalize", "nearest"))
    shared = sensitivities(model, alone, batches, lambda network: network(batches[0][0]))
    noise = shared["noise"]["weights"][qkv]
    assert noise != pytest.approx(noises["weights"][qkv], rel=1e-3)
    assert shared["noise_of_all"] == noise and shared["noise_of_rest"] == 0


def test_any_iterable_of_batches_will_do_but_no_other_numbers(model, batches):
    images = torch.cat([x for x, _ in batches])
    loader = DataLoader(TensorDataset(images, torch.zeros(len(images))), 4)
    x = batches[0][0]
    assert torch.equal(ptq.quantize(model, W8A8, loader)(x), ptq.quantize(model, W8A8, batches)(x))
    for dtype in (torch.uint8, torch.float64):
        with pytest.raises(ValueError, match=f"calibration images are {dtype}, the network"):
            ptq.quantize(model, W8A8, [(images.to(dtype), None)])
    with pytest.raises(ValueError, match="all 6 calibration images are the same"):
        ptq.quantize(model, W8A8, [(images[:1].expand(3, -1, -1, -1), None)] * 2)


@pytest.mark.parametrize("name", ["w8a8", "w4-gptq", "w4a8", "w4"])
def test_what_overflows_within_the_network_is_refused(name, model):
    large = [(1e30 * draw(4, 3, 32, 32), None)]
    with pytest.raises(ValueError, match="not finite"):
        ptq.quantize(model, RECIPES[name], large)
