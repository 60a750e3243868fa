"""Files for TensorRT, whose rules a walk over the graph checks: no GPU is needed to read them."""

import numpy as np
import onnx
import pytest
import torch
from conftest import fails_with_one_line
from onnx import TensorProto, numpy_helper
from small import draw, small_network
from small_vits import small_vit
from test_vit_recipe import as_simulated, as_written, logits

import ptq
from lab.engines import EngineMissing, tensorrt_gpu
from lab.models import build
from mobilevit import MobileViT
from ptq.export import tensorrt_fault, to_onnx
from ptq.layers import QuantizedAttentionCore, QuantizedLayer
from ptq.methods.norms import replace_norms
from ptq.recipes.generic import generic

PRODUCTS = ("Conv", "MatMul", "Gemm")
# What else these files hold: of each, onnx-tensorrt has an importer.
OTHERS = {
    *("QuantizeLinear", "DequantizeLinear", "Add", "Mul", "Softmax", "LayerNormalization", "Gelu"),
    *("Sigmoid", "Relu", "Transpose", "Reshape", "Slice", "Squeeze", "Unsqueeze", "Concat"),
    *("Expand", "Gather", "Shape", "ReduceMean", "GlobalAveragePool", "Flatten", "Split", "Div"),
    *("MaxPool", "Resize", "Identity", "Constant", "Cast"),
}
SIDE = 32
BATCHES = [(draw(8, 3, SIDE, SIDE, seed=i), None) for i in range(2)]


def fitting(network):
    replace_norms(network, None, BATCHES, None)
    return network.eval()


NETWORKS = {
    "blocks of MobileViT": small_network,
    "ViT": lambda: small_vit("ours"),
    "transformers": lambda: ptq.open_attention(small_vit("transformers")),
    "resnet18": lambda: fitting(build("resnet18", num_classes=7)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request, tmp_path_factory):
    torch.manual_seed(0)
    model = NETWORKS[request.param]()
    recipe = generic(ptq.RECIPES["w8a8-tensorrt"], model)
    quantized = ptq.quantize(model, recipe, BATCHES)
    path = tmp_path_factory.mktemp("tensorrt") / "model.onnx"
    to_onnx(quantized, BATCHES[0][0][:1], path)
    return quantized, path, model


def test_every_rule_of_tensorrt_is_kept(exported):
    quantized, path, _ = exported
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    assert proto.opset_import[0].version <= 21
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    assert {node.op_type for node in graph.node} <= OTHERS | set(PRODUCTS)

    codes_of = {}  # what a DequantizeLinear gives -> the axis of its scales, None for one scale
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        data, scale, *zero_point = node.input
        scales = numpy_helper.to_array(constants[scale])
        assert (scales > 0).all() and scales.dtype == np.float32
        for zero in zero_point:
            assert constants[zero].data_type == TensorProto.INT8
            assert not numpy_helper.to_array(constants[zero]).any()
        assert node.op_type == "DequantizeLinear" or zero_point  # or codes would have no sign
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        assert not any(a.name == "block_size" and a.i for a in node.attribute)
        weight = constants.get(data)
        if weight is None:  # activations: one scale, and codes that come from the same scale
            assert scales.size == 1
            if node.op_type == "DequantizeLinear":
                maker = made_by[data]
                assert maker.op_type == "QuantizeLinear"
                assert numpy_helper.to_array(constants[maker.input[1]]) == scales
                codes_of[node.output[0]] = None
        else:
            assert node.op_type == "DequantizeLinear" and weight.data_type == TensorProto.INT8
            assert scales.shape == (weight.dims[axis],)
            codes_of[node.output[0]] = axis

    ran = 0
    for node in graph.node:
        if node.op_type in PRODUCTS:
            both = [name in codes_of for name in node.input[:2]]
            assert all(both) or not any(both), node.name
            ran += all(both)
            axis = codes_of.get(node.input[1])
            if axis is not None:  # of the output channels
                assert axis == {"Conv": 0, "MatMul": 1}[node.op_type]
    layers = [m for m in quantized.modules() if isinstance(m, QuantizedLayer) and m.format]
    cores = [m for m in quantized.modules() if isinstance(m, QuantizedAttentionCore)]
    assert ran == len(layers) + 2 * len(cores)
    used = {name for node in graph.node if node.op_type in PRODUCTS for name in node.input}
    assert set(codes_of) <= used


def test_the_file_computes_what_was_simulated(exported):
    quantized, path, model = exported
    x = BATCHES[1][0]
    assert as_simulated(as_written(path, x), logits(quantized, x), logits(model, x))


def test_softmax_has_a_sign_and_early_layers_are_left_alone():
    model = MobileViT("xxs")
    recipe = ptq.recipe("w8a8-tensorrt", model)
    replace_norms(model, None, BATCHES, None)
    quantized = ptq.quantize(model, recipe, BATCHES)
    assert tensorrt_fault(quantized) == ""
    for module in quantized.modules():
        if isinstance(module, QuantizedAttentionCore):
            assert {q.format for q in module.inputs.values()} == {ptq.Uniform(8)}
    layers = {n: m for n, m in quantized.named_modules() if isinstance(m, QuantizedLayer)}
    in_float = [name for name, layer in layers.items() if layer.format is None]
    assert in_float == [
        "stem.conv",
        *(f"stages.{i}.0.{layer}.conv" for i in (0, 1) for layer in ("expand", "depthwise")),
    ]


@pytest.mark.parametrize(
    "name, says",
    [
        ("w8a8", "patches.input has a zero-point, a scale per channel or not 8 bits"),
        ("w4a8-nearest", "the weight of patches has 4 bits"),
        ("w4-nearest", "the weight of patches has 4 bits"),
        ("uniform8", ""),
        ("fp32", ""),
    ],
)
def test_what_tensorrt_does_not_take_is_named(name, says):
    model = small_vit("ours")
    quantized = ptq.quantize(model, ptq.recipe(name, model), BATCHES)
    assert tensorrt_fault(quantized) == says


def test_weights_alone_are_no_integer_products():
    spec = ptq.LayerSpec("classifier", ptq.Uniform(8, granularity="channel"))
    quantized = ptq.quantize(small_vit("ours"), ptq.Recipe("w8", layers=(spec,)))
    assert tensorrt_fault(quantized) == "classifier has codes for its weight and none for its input"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path):
    with pytest.raises(EngineMissing, match="TensorRT needs an NVIDIA GPU, and torch sees none"):
        tensorrt_gpu.version()
    says = "TensorRT needs an NVIDIA GPU, and torch sees none"
    command = ("lab.bench", "tensorrt", "--output", tmp_path)
    fails_with_one_line(*command, module=("-m",), says=says)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_without_the_package_names_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(EngineMissing, match="tensorrt is missing: pip install tensorrt"):
        tensorrt_gpu.load(None, None, None, None)
