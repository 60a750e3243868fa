"""Recipes on networks that are not ours: timm's, torchvision's, a user's own."""

import onnxruntime
import pytest
import timm
import torch
import torchvision
from small import draw
from torch import nn

import ptq
from mobilevit import MobileViT
from ptq.export import to_onnx
from ptq.layers import QuantizedLayer, Quantizer
from ptq.methods.norms import replace_norms
from ptq.recipes.generic import GENERIC

SIDE = 64


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


NETWORKS = {
    "timm mobilevit_xxs": lambda: timm.create_model("mobilevit_xxs", num_classes=7),
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=7),
    "own Sequential": own,
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """With the statistics of its images, without which all logits of a fresh network are alike."""
    torch.manual_seed(0)
    model = NETWORKS[request.param]().eval()
    replace_norms(model, None, batches(), None)
    return model


def batches():
    return [(draw(8, 3, SIDE, SIDE, seed=i), None) for i in range(2)]


@pytest.mark.parametrize("name", ["w8a8", "w4-shift"])
def test_any_network_is_quantized_exported_and_run(name, network, tmp_path):
    recipe = ptq.recipe(name, network)
    assert recipe.name == name and recipe.steps == ptq.RECIPES[name].steps
    quantized = ptq.quantize(network, recipe, batches())
    kinds = [type(module) for module in network.modules()]
    layers = [m for m in quantized.modules() if isinstance(m, QuantizedLayer)]
    assert len(layers) == kinds.count(nn.Conv2d) + kinds.count(nn.Linear)
    for layer in layers:
        conv = isinstance(layer.layer, nn.Conv2d)
        depthwise = conv and layer.layer.groups == layer.layer.in_channels
        if isinstance(layer.input, Quantizer):
            assert layer.input.format.granularity == ("channel" if depthwise else "tensor")
    x = draw(4, 3, SIDE, SIDE, seed=9)
    with torch.no_grad():
        simulated, exact = quantized(x), network(x)
    assert 0 < (simulated - exact).square().mean() < exact.var()
    to_onnx(quantized, x[:1], tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    (run,) = session.run(None, {"images": x.numpy()})
    apart = (torch.from_numpy(run) - simulated).square().mean() / simulated.var()
    assert apart < 0.01 and list(run.argmax(1)) == simulated.argmax(1).tolist()


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
    with pytest.raises(ValueError, match="no convolution and no linear layer"):
        ptq.recipe("w8a8", nn.ReLU())


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
