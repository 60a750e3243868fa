"""What others quantize by their own methods, on a small network with every kind of layer."""

import pytest
import torch
from small import draw, small_network
from torch import nn

from lab.engines import (
    EngineMissing,
    onnx_runtime_static,
    openvino_nncf,
    openvino_nncf_control,
    torch_pt2e,
)
from lab.engines.measure import predict
from ptq import RECIPES
from ptq.analysis.compare import noise
from ptq.packing import written_bytes

# Largest mean squared error over the variance between images; a constant would give 1. ONNX Runtime
# rounds what products put out, too.
PEERS = ((openvino_nncf, 0.5), (onnx_runtime_static, 0.9), (torch_pt2e, 0.4))


@pytest.fixture(scope="module")
def model():
    return small_network()


@pytest.fixture(scope="module")
def x():
    """Images that differ in colour, so that what the network makes of them differs, too."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(8, 3, 1, 1, generator=generator)
    return colours + 0.3 * torch.randn(8, 3, 32, 32, generator=generator)


@pytest.mark.parametrize("engine, most", PEERS, ids=[engine.NAME for engine, _ in PEERS])
def test_peers_compute_about_the_same_in_integers(model, x, engine, most, capsys):
    (recipe,) = (recipe for recipe in RECIPES.values() if recipe.peer == engine.NAME)
    batches = [(x, torch.zeros(8))]
    loaded = engine.load(model, recipe, batches, x[:1])
    assert capsys.readouterr().out == ""  # where quantize.py prints rows
    expected, logits = model(x).detach(), loaded.run(x)
    differences = [y - y.mean(0) for y in (expected, logits)]
    error = (differences[1] - differences[0]).square().mean() / differences[0].square().mean()
    assert 0 < error < most
    shared, _ = predict(loaded.run, batches * 4, workers=2)
    torch.testing.assert_close(shared, logits.repeat(4, 1))
    assert loaded.products["int8"]["Conv"] >= 9 and loaded.products["int8"]["MatMul"] >= 4
    if engine is torch_pt2e:  # its file holds weights once and in integers, not in float as well
        in_float = written_bytes(lambda path: torch.save(model.state_dict(), path))
        n_weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
        assert loaded.size_bytes < in_float - 2 * n_weights


def test_accuracy_aware_nncf_keeps_the_predictions_that_it_is_shown(model, x, monkeypatch):
    """On labels that the network gives itself, at most the allowed share may differ."""
    labels = model(x).argmax(1)
    monkeypatch.setattr(openvino_nncf_control, "MAX_DROP", 0.1)
    loaded = openvino_nncf_control.load(model, None, [(x, labels)], x[:1])
    assert (loaded.run(x).argmax(1) == labels).double().mean() >= 0.9
    assert loaded.products["int8"]["Conv"] > 0


@pytest.mark.parametrize(
    "engine, package",
    [(openvino_nncf, "nncf"), (onnx_runtime_static, "onnxruntime"), (torch_pt2e, "torchao")],
)
def test_a_missing_peer_names_its_package(monkeypatch, engine, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(EngineMissing, match=f"pip install {package}"):
        engine.load(None, None, None, None)


class Twice(nn.Module):
    """Calls one ReLU at two places, as the blocks of torchvision's ResNet do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(8, 4)

    def forward(self, x):
        y = self.relu(self.first(x))
        return self.fc(self.relu(self.second(y) + y).mean((2, 3)))


def test_pt2e_takes_a_network_that_calls_one_relu_twice():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    network = Twice().eval()
    batches = [(draw(4, 3, 16, 16), None)]
    loaded = torch_pt2e.load(network, None, batches, batches[0][0][:1])
    assert noise(loaded.run(batches[0][0]), network(batches[0][0])) < 0.1
    assert loaded.products["int8"]["Conv"] == 2
