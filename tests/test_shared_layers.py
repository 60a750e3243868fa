"""A layer that stands at several places of a network is written in codes at each."""

import onnx
import onnxruntime
import pytest
import torch
from small import draw
from torch import nn

import ptq
from ptq.export import to_onnx
from ptq.formats import Uniform
from ptq.recipe import LayerSpec, Recipe


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(64, 64)
        self.c = nn.Linear(64, 3)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


@pytest.mark.parametrize("bits, inputs", [(4, None), (8, Uniform(8, symmetric=False))])
def test_a_layer_at_two_places_is_exported_in_codes(bits, inputs, tmp_path):
    torch.manual_seed(0)
    network, x = Twice().eval(), draw(8, 64)
    recipe = Recipe("r", layers=(LayerSpec(".*", Uniform(bits, granularity="channel"), inputs),))
    quantized, path = ptq.quantize(network, recipe, [(x, None)]), tmp_path / "twice.onnx"
    to_onnx(quantized, x[:1], path)
    weights = [tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2]
    stored = onnx.TensorProto.INT4 if bits == 4 else onnx.TensorProto.INT8
    assert len(weights) == 2 and {tensor.data_type for tensor in weights} == {stored}
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    (got,) = onnxruntime.InferenceSession(path, options).run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), quantized(x).detach())


class Levels(nn.Module):
    """A head on two feature maps, which differ in size and in what they hold, as RetinaNet's."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x):
        fine = self.body(x).relu()
        coarse = 3 * nn.functional.avg_pool2d(fine, 2).flip(1) + torch.arange(8.0)[:, None, None]
        return torch.cat([self.head(level).mean((2, 3)) for level in (fine, coarse)], 1)


@pytest.mark.parametrize("step", ["gptq", "correct_biases"])
def test_a_layer_that_runs_twice_is_fitted_to_both_calls(step):
    torch.manual_seed(0)
    network, x = Levels().eval(), draw(16, 3, 8, 8)
    layers = (LayerSpec("head", Uniform(4, granularity="channel")),)

    def errors(*steps):
        recipe = Recipe("r", layers=layers, steps=steps)
        off = ptq.quantize(network, recipe, [(part, None) for part in x.split(8)])(x) - network(x)
        return off.detach().unflatten(1, (2, 6))  # [images, levels, channels]

    if step == "gptq":
        nearest, ours = (errors(s).square().mean((0, 2)) for s in ("nearest", "gptq"))
        assert ours[1] < 0.2 * nearest[1]
    else:
        places = torch.tensor([64, 16])  # of a level's map
        means = errors("nearest", step).mean(0)
        assert (means * places[:, None]).sum(0).abs().max() < 1e-4 < means.abs().max()
