"""Quantized layers, the pipeline and its corrections on small networks."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from small import Idle, draw
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ptq
from mobilevit import AttentionCore, MobileViT
from ptq.analysis.sensitivity import sensitivities
from ptq.formats import Uniform
from ptq.graph import captured, linears_after_norms, norms_after, watched
from ptq.layers import QuantizedAttentionCore, QuantizedLayer, Quantizer, fake_quantize
from ptq.methods import adaround
from ptq.methods import nearest as nearest_module
from ptq.methods.equalize import equalize
from ptq.methods.norms import replace_norms, statistics
from ptq.observers import OBSERVERS
from ptq.pipeline import attach, layer_specs
from ptq.recipe import LayerSpec, Recipe
from ptq.recipes import RECIPES

W8A8 = Recipe(
    "test", layers=(LayerSpec(".*", Uniform(8, granularity="channel"), Uniform(8, False)),)
)


@pytest.fixture(scope="module")
def batches():
    return [(draw(4, 3, 64, 64, seed=i), None) for i in range(2)]


@pytest.fixture(scope="module")
def model(batches):
    """With the statistics of its images, without which all logits of a fresh network are alike."""
    torch.manual_seed(0)
    model = MobileViT("xxs").eval()
    replace_norms(model, None, batches, None)
    return model


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
    assert fake_quantize(x, fmt, quantizer.scale, quantizer.zero_point).unique().numel() > 10


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
            with pytest.raises(
                ValueError, match="needs .*calibration (batch|image)"
            ):
                ptq.quantize(model, recipe, nothing)
        with pytest.raises(ValueError, match="pair of its input and anything"):
            ptq.quantize(model, recipe, [draw(2, 3, 64, 64)])
    with pytest.raises(ValueError, match="network is on meta, the calibration images on cpu"):
        ptq.quantize(nn.Linear(4, 4, device="meta"), W8A8, [(draw(2, 4), None)])
    one, two = (draw(1, 3, 64, 64), None), (draw(2, 3, 64, 64), None)
    for uneven in ([two, one], [two, one, two]):
        with pytest.raises(ValueError, match="batches of two and more.*batch 1 has one"):
            ptq.quantize(model, RECIPES["w4-shift"], uneven)
    with pytest.raises(ValueError, match="never ran"):
        list(captured(Idle(), Idle().idle, [(draw(2, 4), None)], "input"))


@pytest.mark.parametrize("recipe", ["w8a8", "w4-shift", "w4-biases", "w4-gptq", "w4"])
def test_calibration_images_that_are_not_numbers_are_refused(recipe, model, batches):
    for x in (torch.full((2, 3, 64, 64), torch.nan), torch.empty(0, 3, 64, 64)):
        with pytest.raises(ValueError, match="batch 2 of the calibration images is empty or not f"):
            ptq.quantize(model, RECIPES[recipe], [*batches, (x, None)])


def test_convolutions_with_other_than_zeros_around_are_refused():
    for conv in (nn.Conv2d(3, 4, 3, 1, 1, padding_mode="reflect"), nn.Conv2d(3, 4, 3, 1, "same")):
        with pytest.raises(ValueError, match="zeros around them"):
            ptq.quantize(nn.Sequential(conv), Recipe("r", layers=(LayerSpec(".*", Uniform(4)),)))


@pytest.mark.parametrize("inputs", [None, Uniform(3, symmetric=False)], ids=["w4", "w4a3"])
def test_norms_follow_the_statistics_of_quantized_layers(inputs, model, batches):
    trained = copy.deepcopy(model)
    trained.stem.norm.running_mean += 0.25
    trained.stem.norm.running_var *= 9
    x = batches[0][0]
    for norms in ("replace", "shift"):
        layers = (LayerSpec(".*", Uniform(4, granularity="channel"), inputs),)
        steps = ("nearest", f"{norms}_norms", "calibrate", f"{norms}_norms")
        quantized = ptq.quantize(trained, Recipe("w4", "", layers, steps), batches[:1])
        before, after = trained.stem.conv(x), quantized.stem.conv(x)
        mean, variance = after.mean((0, 2, 3)), after.var((0, 2, 3))
        if norms == "shift":
            eps = trained.stem.norm.eps
            mean += trained.stem.norm.running_mean - before.mean((0, 2, 3))
            variance = trained.stem.norm.running_var * (variance + eps)
            variance /= before.var((0, 2, 3)) + eps
        torch.testing.assert_close(quantized.stem.norm.running_mean, mean)
        torch.testing.assert_close(quantized.stem.norm.running_var, variance)
        assert not quantized.training


def test_statistics_are_means_over_images_of_batches_of_any_size(model):
    batches = [(draw(6, 3, 64, 64), None), (1 + 2 * draw(2, 3, 64, 64, seed=1), None)]
    outputs = [model.stem.conv(x).detach() for x, _ in batches]
    mean, variance = statistics(model, batches)["stem.norm"]
    for got, of in ((mean, torch.mean), (variance, torch.var)):
        six, two = (of(y, (0, 2, 3)) for y in outputs)
        assert not torch.allclose(six, two, rtol=0.1)
        torch.testing.assert_close(got, (6 * six + 2 * two) / 8)


def test_norms_of_a_network_that_does_not_change_stay(model, batches):
    layers = (LayerSpec(".*", Uniform(16, granularity="channel")),)
    quantized = ptq.quantize(model, Recipe("fine", "", layers, ("nearest", "shift_norms")), batches)
    for name, buffer in model.named_buffers():
        if "running" in name:
            got = quantized.get_buffer(name)
            torch.testing.assert_close(got, buffer, atol=1e-3, rtol=1e-3)


def test_norms_do_not_follow_the_chance_of_dropout():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Dropout(0.5), conv, norm).eval()
    x = draw(8, 3, 4, 4)
    mean, _ = statistics(net, [(x, None)])["2"]
    torch.testing.assert_close(mean, conv(x).mean((0, 2, 3)).detach())


def test_an_adapted_network_has_the_statistics_of_its_new_size(model, batches):
    trained = copy.deepcopy(model)
    replace_norms(trained, None, batches, None)
    smaller = [(nn.functional.avg_pool2d(x, 2), y) for x, y in batches]
    wanted, adapted = copy.deepcopy(trained), ptq.adapted(trained, smaller, batches)
    replace_norms(wanted, None, smaller, None)
    for name in ("stem.norm", "stages.2.1.fuse.norm", "head.norm"):
        for of in ("running_mean", "running_var"):
            got, now, before = (
                network.get_buffer(f"{name}.{of}") for network in (adapted, wanted, trained)
            )
            torch.testing.assert_close(got, now, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(got, before, rtol=1e-2)


OUTPUT_AXES = {"stem.conv": (0, 2, 3), "stages.2.1.layers.0.attn.qkv": (0, 1), "classifier": 0}


def mean_by_hand(network, name, batches):
    outputs = torch.cat(list(captured(network, network.get_submodule(name), batches, "output")))
    return outputs.mean(OUTPUT_AXES[name])


def test_corrected_biases_restore_mean_outputs(model, batches):
    layers = (LayerSpec(".*", Uniform(4, granularity="channel")),)
    recipe = Recipe("w4", "", layers, ("nearest", "correct_biases"))
    quantized = ptq.quantize(model, recipe, batches)
    for name in OUTPUT_AXES:
        wanted, got = (mean_by_hand(network, name, batches) for network in (model, quantized))
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


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
        (Recipe("r", layers=(replace(weights, kind="odd"),)), "no kind of layers is called odd"),
        (Recipe("r", "", (weights,), ("gptq",), units="block"), "is called block"),
    ):
        with pytest.raises(ValueError, match=says):
            ptq.quantize(model, recipe, batches)


WHOLE_BLOCKS = replace(RECIPES["w4"], units=r"stages\.\d\.\d")  # MobileViT's among them


@pytest.mark.parametrize(
    "recipe", [RECIPES["w4-mixed"], RECIPES["w4"], WHOLE_BLOCKS], ids=["mixed", "w4", "blocks"]
)
def test_a_learnt_recipe_beats_its_baseline_and_takes_every_layer_once(
    recipe, model, batches, monkeypatch
):
    monkeypatch.setattr(adaround, "STEPS", 50)
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


@pytest.mark.parametrize("plain", [None, "w8a8", {"type": "Uniform", "bits": 4}], ids=str)
def test_what_is_no_recipe_is_refused(plain):
    with pytest.raises(ValueError, match="not a recipe"):
        Recipe.fromdict(plain)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_recipes_are_data(recipe):
    assert Recipe.fromdict(recipe.asdict()) == recipe
    with pytest.raises(ValueError, match="not a recipe"):
        Recipe.fromdict(recipe.asdict() | {"surprise": 1})


def test_the_worked_example_runs(model, batches):
    text = (ROOT / "ptq" / "README.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[2:]]
    assert len(blocks) == 3 and len(blocks[0].splitlines()) < 30
    names = {}
    try:
        for block in blocks:
            exec(block, names)
        names["test_three_sigma_of_normal_numbers"]()
        quantized = ptq.quantize(model, names["recipe"], batches)
    finally:
        OBSERVERS.pop("three-sigma", None)
    x = batches[0][0]
    assert quantized.stem.conv.input.scale * 255 < x.max() - x.min()  # it clipped
    assert torch.isfinite(quantized(x)).all()


def test_equalized_ranges_meet_and_the_float_network_stays(model, batches):
    model = copy.deepcopy(model)
    x, before = batches[0][0], model(batches[0][0]).detach()
    after = linears_after_norms(model)
    assert len(after) == 18  # two in each of nine transformer layers
    equalize(copy.deepcopy(model), model, batches, None)
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-3, atol=1e-5)
    for name, (linear,) in after.items():
        outputs = torch.cat(list(captured(model, model.get_submodule(name), batches, "output")))
        weight = model.get_submodule(linear).weight.abs().amax(0)
        torch.testing.assert_close(outputs.abs().flatten(0, -2).amax(0), weight)


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


def test_biases_leave_to_norms_what_norms_have_taken_in(model, batches):
    layers = (LayerSpec(".*", Uniform(4, granularity="channel")),)
    recipe = Recipe("r", "", layers, ("nearest", "shift_norms", "correct_biases"))
    quantized = ptq.quantize(model, recipe, batches)
    assert quantized.stem.conv.layer.bias is None
    for name in ("stages.2.1.layers.0.attn.qkv", "classifier"):
        got, wanted = (mean_by_hand(network, name, batches) for network in (quantized, model))
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)


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


def test_a_network_that_runs_shows_the_same_pairs_as_its_graph(model, batches):
    traced = norms_after(model)
    modules = dict(model.named_modules())
    seen = {
        fed[0]: producer
        for producer, fed in watched(model, batches).items()
        if isinstance(modules[producer], nn.Conv2d) and len(fed) == 1 and fed[0] in traced
    }
    assert seen == traced and len(traced) == 32


class TwoReaders(nn.Module):
    """Control flow that torch.fx can't trace; the first norm's input is read once more."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        y = self.convs[0](x)
        x = self.norms[0](y) + y
        x = self.norms[1](self.convs[1](x))
        return self.norms[2](self.convs[2](self.convs[2](x)))


def test_pairs_of_an_untraceable_network_are_seen_in_a_call():
    network = TwoReaders().eval()
    assert norms_after(network) == {}
    assert norms_after(network, [(draw(2, 3, 4, 4), None)]) == {"norms.1": "convs.1"}
