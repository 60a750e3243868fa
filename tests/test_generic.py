"""Recipes on networks that are not ours: timm's, torchvision's, a user's own."""

import onnxruntime
import pytest
import small_vits
import timm
import torch
from small import draw
from torch import nn

import ptq
from lab.models import build
from mobilevit import AttentionCore, MobileViT
from ptq import packing
from ptq.export import to_onnx
from ptq.folding import make_norms_positive
from ptq.graph import norms_after
from ptq.integer.layers import IntegerActivation
from ptq.layers import QuantizedAttentionCore, QuantizedLayer, Quantizer
from ptq.methods.norms import replace_norms
from ptq.observers import OBSERVERS
from ptq.recipes.generic import GENERIC
from ptq.recipes.uniform import UNIFORM


def own():
    """A network as a user writes one, with a norm that has a negative factor."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    network[1].weight.data[2] = -0.7
    return network


# name -> network, side of its images
NETWORKS = {
    "timm mobilevit_xxs": (lambda: timm.create_model("mobilevit_xxs", num_classes=7), 64),
    "resnet18": (lambda: build("resnet18", num_classes=7), 32),
    "vit_cifar of two layers": (small_vits.ours, 32),
    "own Sequential": (own, 64),
}


def network_of(name):
    """With the statistics of its images, without which all logits of a fresh network are alike."""
    torch.manual_seed(0)
    build_network, side = NETWORKS[name]
    model = build_network().eval()
    replace_norms(model, None, batches(side), None)
    return model, side


def batches(side):
    return [(draw(8, 3, side, side, seed=i), None) for i in range(2)]


@pytest.mark.parametrize(
    "of, name", [*((of, "w8a8") for of in NETWORKS), ("own Sequential", "w4-shift")]
)
def test_any_network_is_quantized_exported_and_run(of, name, tmp_path):
    network, side = network_of(of)
    recipe = ptq.recipe(name, network)
    assert recipe.name == name and recipe.steps == ptq.RECIPES[name].steps
    quantized = ptq.quantize(network, recipe, batches(side))
    kinds = [type(module) for module in network.modules()]
    layers = [m for m in quantized.modules() if isinstance(m, QuantizedLayer)]
    assert len(layers) == kinds.count(nn.Conv2d) + kinds.count(nn.Linear)
    cores = [m for m in quantized.modules() if isinstance(m, QuantizedAttentionCore)]
    assert len(cores) == (kinds.count(AttentionCore) if name == "w8a8" else 0)
    for layer in layers:
        conv = isinstance(layer.layer, nn.Conv2d)
        depthwise = conv and layer.layer.groups == layer.layer.in_channels
        if isinstance(layer.input, Quantizer):
            assert layer.input.format.granularity == ("channel" if depthwise else "tensor")
    x = draw(4, 3, side, side, seed=9)
    with torch.no_grad():
        simulated, exact = quantized(x), network(x)
    assert 0 < (simulated - exact).square().mean() < exact.var()
    run = run_by_onnx_runtime(quantized, x, tmp_path / "a.onnx")
    apart = (run - simulated).square().mean() / simulated.var()
    assert apart < 0.01 and run.argmax(1).equal(simulated.argmax(1))


def run_by_onnx_runtime(quantized, x, path):
    to_onnx(quantized, x[:1], path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def test_mobilevit_keeps_its_own_recipes_and_others_get_none_that_name_its_layers():
    ours, other = MobileViT("xxs"), own()
    for name in GENERIC:
        assert ptq.recipe(name, ours) is ptq.RECIPES[name]
        assert ptq.recipe(name, other).layers != ptq.RECIPES[name].layers
    assert ptq.recipe("fp32", other) is ptq.RECIPES["fp32"]
    with pytest.raises(ValueError, match="w4-mixed names layers of MobileViT: for other networks"):
        ptq.recipe("w4-mixed", other)
    with pytest.raises(ValueError, match="no recipe is called w5: there are fp32"):
        ptq.recipe("w5", ours)
    with pytest.raises(ValueError, match="no nn.Conv2d and no nn.Linear"):
        ptq.recipe("w8a8", nn.ReLU())


def test_timms_mobilevit_is_not_taken_for_ours_when_its_attention_is_open():
    model = ptq.open_attention(timm.create_model("mobilevit_xxs", num_classes=10))
    recipe = ptq.recipe("w8a8", model)
    assert recipe.layers != ptq.RECIPES["w8a8"].layers
    quantized = ptq.quantize(model, recipe, batches(32))
    cores = [m for m in quantized.modules() if isinstance(m, QuantizedAttentionCore)]
    assert len(cores) == 9


def test_layers_whose_weights_are_read_elsewhere_stay_in_float():
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    network = Attentive().eval()
    recipe = ptq.recipe("w8a8", network)
    assert [spec.pattern for spec in recipe.layers] == ["head"]
    x = draw(4, 5, 8)
    assert ptq.quantize(network, recipe, [(x, None)])(x).shape == (4, 5, 3)


BASELINES = {
    "own Sequential": NETWORKS["own Sequential"],
    "vit_cifar": NETWORKS["vit_cifar of two layers"],
    "mobilevit_xxs": (lambda: MobileViT("xxs"), 64),
}


@pytest.mark.parametrize("recipe", UNIFORM, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("name", BASELINES)
def test_uniform_baselines_are_those_of_the_formula(name, recipe, tmp_path):
    """s = max|x| / (2**(b-1) - 1), q = clip(round(x / s), -2**(b-1), 2**(b-1) - 1)."""
    torch.manual_seed(0)
    build_network, side = BASELINES[name]
    network = build_network().eval()
    bits, by_tensor = int(recipe.name[7]), recipe.name.endswith("tensor")
    quantized = ptq.quantize(network, ptq.recipe(recipe.name, network), batches(side))
    assert not any(isinstance(module, QuantizedAttentionCore) for module in quantized.modules())
    layers = {n: m for n, m in quantized.named_modules() if isinstance(m, QuantizedLayer)}
    for layer_name, layer in layers.items():
        # Signs of channels, but not magnitudes, may change before a norm: compare those.
        w = network.get_submodule(layer_name).weight.detach().double()
        largest = w.abs().amax() if by_tensor else w.abs().flatten(1).amax(1)
        scale = largest / (2 ** (bits - 1) - 1)
        torch.testing.assert_close(layer.scale.double(), scale.expand(layer.scale.shape))
        steps = scale if by_tensor else scale.view(-1, *[1] * (w.dim() - 1))
        codes = (w / steps).round().abs()
        assert (layer.codes.abs() - codes).abs().max() <= 1  # halves, in float32
        assert (layer.codes.abs() != codes).double().mean() < 1e-3
        assert layer.input.format == ptq.Uniform(8) and int(layer.input.zero_point) == 0
    largest = max(x.abs().max() for x, _ in batches(side))
    first = next(iter(layers.values()))
    torch.testing.assert_close(first.input.scale, largest[None] / 127)
    if name.startswith("own") and recipe.exportable:
        x = draw(4, 3, side, side, seed=9)
        run = run_by_onnx_runtime(quantized, x, tmp_path / "a.onnx")
        with torch.no_grad():
            torch.testing.assert_close(run, quantized(x), rtol=0, atol=0.02)


def test_the_scale_of_a_uniform_baseline_is_that_of_the_larger_end():
    format = ptq.Uniform(4)
    for x, scale in (([-3.5, 1.0], 0.5), ([-1.0, 3.5], 0.5), ([0.0, 0.0], 1.0)):
        observer = OBSERVERS["absmax"](format)
        observer.update(torch.tensor(x))
        found, zero_point = format.grid(*observer.range())
        assert (found.item(), zero_point.item()) == (scale, 0)
    observer = OBSERVERS["minmax"](format)  # which uses the lowest code, -8, as well
    observer.update(torch.tensor([-3.5, 1.0]))
    assert format.grid(*observer.range())[0].item() == 3.5 / 8


# Networks that are built in ways of their own.


class Twice(nn.Module):
    """One batch norm behind two convolutions, and one convolution and activation at two places."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(8), nn.SiLU()
        self.norm.weight.data[:4] *= -1
        conv = nn.Conv2d(8, 8, 3, padding=1)
        self.body = nn.Sequential(conv, self.act, conv, self.act)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.a(x)) + self.act(self.norm(self.b(x)))
        return self.classifier(self.body(x).mean((2, 3)))


def encoder():
    """With torch's own encoder layer, which has a fast path around its linear layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), Swap(), layer, nn.Linear(8, 5))


class Swap(nn.Module):
    def forward(self, x):
        return x.mT


def without_factors():
    """Batch norms without factors, and without statistics."""
    norms = nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, track_running_stats=False)
    convs = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2)
    pairs = (module for pair in zip(convs, norms) for module in pair)
    return nn.Sequential(*pairs, nn.Flatten(), nn.Linear(72, 5))


@pytest.mark.parametrize("built", [Twice, encoder, without_factors])
@pytest.mark.parametrize("name", ["w8a8", "w4-gptq", "i-bert"])
def test_unusual_networks_are_quantized_wherever_their_layers_stand(built, name, tmp_path):
    torch.manual_seed(0)
    network, shown = built().eval(), batches(16)
    recipe = ptq.recipe(name, network)
    quantized = ptq.quantize(network, recipe, shown)
    floats = (nn.Conv2d, nn.Linear, *([nn.SiLU] if name == "i-bert" else []))
    within = [m for m in quantized.modules() if isinstance(m, QuantizedLayer | IntegerActivation)]
    left = {m for m in quantized.modules() if type(m) in floats} - {m.layer for m in within}
    assert not left and within
    packing.save(quantized, recipe, tmp_path / "a")
    again, _ = packing.load(tmp_path / "a", network)
    x = shown[0][0]
    with torch.inference_mode():
        exact, simulated = network(x), quantized(x)
        assert torch.equal(again(x), simulated)
    assert 0 < (simulated - exact).square().mean() < 0.1 * exact.var()


def test_a_norm_behind_two_convolutions_is_folded_into_neither():
    network = Twice().eval()
    assert norms_after(network) == norms_after(NotTraced(network), batches(16)) == {}
    before = network(batches(16)[0][0])
    make_norms_positive(network, batches(16))
    assert torch.equal(network(batches(16)[0][0]), before)


class NotTraced(nn.Module):
    """A network whose control flow torch.fx can't follow."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x) if x.isfinite().all() else x


def test_what_would_be_lost_in_a_weight_is_refused():
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match="call remove_parametrizations"):
        ptq.quantize(normed, ptq.recipe("w4-nearest", normed))
    half = nn.Sequential(nn.Linear(3, 4)).half()
    with pytest.raises(ValueError, match="0.weight of the network is torch.float16: call float"):
        ptq.quantize(half, ptq.recipe("w4-nearest", half))
    with pytest.raises(ValueError, match="the entry has no input"):
        ptq.LayerSpec(".*", attention=ptq.Uniform(8, False))
