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
