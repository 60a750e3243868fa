"""QDQ ONNX against the simulation it came from, executed by ONNX Runtime and OpenVINO."""

import onnx
import pytest
import torch
from small import Small, draw, small_network
from torch import nn

import ptq
from lab.engines import EngineMissing, onnx_runtime, openvino_bf16, openvino_cpu, parity
from lab.engines.measure import predict
from lab.outputs import export_files
from mobilevit import AttentionCore
from ptq.export import to_onnx
from ptq.folding import fold_norms, make_norms_positive
from ptq.formats import Uniform
from ptq.graph import norms_after
from ptq.layers import QuantizedLayer
from ptq.recipe import LayerSpec, Recipe


def per_channel(bits):
    return Uniform(bits, granularity="channel")


PER_TENSOR = Uniform(8, symmetric=False)
DEPTHWISE = Uniform(8, False, "channel", axis=1)
# Seven bits a weight, and in attention: with eight, kernels saturate on CPUs without VNNI.
W7A8 = Recipe(
    "w7a8",
    layers=(
        LayerSpec(r".*\.depthwise\.conv", per_channel(7), DEPTHWISE),
        LayerSpec(r".*\.core", input=Uniform(7)),
        LayerSpec(".*", per_channel(7), PER_TENSOR),
    ),
)
W4 = Recipe("w4", layers=(LayerSpec(".*", per_channel(4)),))
INPUTS = pytest.mark.parametrize(
    "inputs", [None, PER_TENSOR, DEPTHWISE], ids=["float", "a scale", "a scale per channel"]
)
STREAMS = [{"NUM_STREAMS": 2}, {"NUM_STREAMS": 4}, {"PERFORMANCE_HINT": "THROUGHPUT"}]


@pytest.fixture(scope="module")
def model():
    return small_network()


@pytest.fixture(scope="module")
def x():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=[W7A8, W4], ids=lambda recipe: recipe.name)
def quantized(request, model, x):
    return request.param, ptq.quantize(model, request.param, [(x, None)])


@pytest.fixture(scope="module")
def exported(quantized, x, tmp_path_factory):
    recipe, network = quantized
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    to_onnx(network, x[:1], path)
    return path, network(x).detach()


def close(a, b, scale, share):
    """Whether two outputs differ by little beside the spread of a third."""
    return (a - b).abs().max() < share * scale.std()


def test_positive_and_folded_norms_change_nothing(model, x):
    other = Small().eval()
    other.load_state_dict(model.state_dict())
    pairs = norms_after(other)
    assert len(pairs) == sum(isinstance(m, nn.BatchNorm2d) for m in other.modules())
    make_norms_positive(other, None)
    assert all((other.get_submodule(name).weight >= 0).all() for name in pairs)
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)
    fold_norms(other)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in other.modules())
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)


def test_folding_keeps_the_codes(quantized, x):
    recipe, network = quantized
    folded = ptq.quantize(Small(), recipe, [(x, None)])
    folded.load_state_dict(network.state_dict())
    codes = network.body[2].fuse.conv.codes.clone()
    fold_norms(folded)
    layer = folded.body[2].fuse.conv
    assert torch.equal(layer.codes, codes)
    weight = layer.format.decode(layer.codes, layer.scale)
    torch.testing.assert_close(weight, layer.layer.weight.detach())
    assert close(folded(x), network(x), network(x), 0.05 if recipe is W7A8 else 1e-3)


@pytest.mark.parametrize("engine", [onnx_runtime, openvino_cpu], ids=lambda e: e.NAME)
def test_engines_compute_what_was_simulated(quantized, model, x, engine):
    recipe, network = quantized
    loaded = engine.load(network, recipe, None, x[:1])
    expected = network(x).detach()
    off, lost = ((y - expected).abs().max().item() for y in (loaded.run(x), model(x)))
    # Rounding of activations may fall either way where a sum is taken in another order.
    assert off < (0.5 if recipe is W7A8 else 0.01) * lost
    torch.testing.assert_close(loaded.run(x.to(memory_format=torch.channels_last)), loaded.run(x))
    shared, _ = predict(loaded.run, [(x, torch.zeros(5))] * 4, workers=2)
    torch.testing.assert_close(shared, loaded.run(x).repeat(4, 1))
    if recipe is W7A8:
        assert loaded.products["int8"]["MatMul"] >= 4
        ran = sum(counts.get("MatMul", 0) for counts in loaded.products.values())
        kinds = [type(module) for module in model.modules()]
        assert ran == kinds.count(nn.Linear) + 2 * kinds.count(AttentionCore)
        if engine is openvino_cpu:
            assert loaded.products["int8"]["Conv"] == 11
            assert "MatMul" not in loaded.products["float"]  # of attention, too
    else:
        assert not any(loaded.products["int8"].values())


def test_a_profile_says_what_ran_in_integers(model, x):
    made = {r.name: ptq.quantize(model, r, [(x, None)]) for r in (W7A8, W4)} | {"float": model}
    networks = {name: (openvino_cpu.exported(m, x)[0], "f32") for name, m in made.items()}
    spent = openvino_cpu.operators_ms(networks, x[:1], 2)
    assert all(ms > 0 for ms in spent["float"].values())
    assert not any("INT8" in node for node in spent["float"])
    assert "Convolution INT8" in spent["w7a8"] and "Convolution INT8" not in spent["w4"]


@pytest.mark.parametrize("engine", [onnx_runtime, openvino_cpu], ids=lambda e: e.NAME)
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_beyond_a_format_of_fewer_bits_are_clipped(model, x, engine, symmetric):
    spec = LayerSpec("classifier", per_channel(7), Uniform(6, symmetric))
    recipe = Recipe("r", layers=(spec,))
    assert recipe.exportable
    network = ptq.quantize(model, recipe, [(x, None)])
    network.classifier.input.scale /= 4  # as if larger inputs had come than in calibration
    loaded, clipped = engine.load(network, recipe, None, x[:1]), network(x).detach()
    torch.testing.assert_close(loaded.run(x), clipped, rtol=1e-3, atol=1e-4)
    network.classifier.input.format = Uniform(8, symmetric)
    assert not close(network(x), clipped, clipped, 0.1)


def test_biases_that_were_corrected_fold_with_the_norms(model, x):
    recipe = Recipe("r", "", W4.layers, ("nearest", "correct_biases"))
    network = ptq.quantize(model, recipe, [(x, None)])
    assert network.body[1].expand.conv.layer.bias.abs().max() > 0.01
    loaded = onnx_runtime.load(network, recipe, None, x)  # any number of examples will do
    torch.testing.assert_close(loaded.run(x), network(x).detach(), rtol=1e-3, atol=1e-4)


def test_eight_bit_weights_that_meet_floats_are_no_integer_products(model, x):
    recipe = Recipe("w8", layers=(LayerSpec(".*", per_channel(8)),))
    loaded = openvino_cpu.load(ptq.quantize(model, recipe), recipe, None, x[:1])
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert loaded.products["int8"] == {}
    assert sum(loaded.products["float"].values()) >= len(layers)


def test_bf16_is_computed_in_or_refused(model, x):
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(EngineMissing, match="this CPU does not compute in BF16"):
            openvino_bf16.load(model, Recipe("fp32"), None, x[:1])
        return
    y, expected = openvino_bf16.load(model, Recipe("fp32"), None, x[:1]).run(x), model(x).detach()
    assert 0 < (y - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_float_network_exports_too(model, x):
    loaded = onnx_runtime.load(model, Recipe("fp32"), None, x[:1])
    torch.testing.assert_close(loaded.run(x), model(x).detach(), rtol=1e-3, atol=1e-4)
    assert loaded.products["int8"] == {"Conv": 0, "MatMul": 0}


def test_codes_are_stored_in_the_bits_of_the_recipe(quantized, exported):
    recipe, network = quantized
    path, _ = exported
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    stored = {t.name: t for t in proto.graph.initializer if t.name.endswith(".codes")}
    layers = {n: m for n, m in network.named_modules() if isinstance(m, QuantizedLayer)}
    assert set(stored) == {f"{name}.codes" for name in layers}
    kind = onnx.TensorProto.INT4 if recipe is W4 else onnx.TensorProto.INT8
    assert {t.data_type for t in stored.values()} == {kind}
    codes = torch.from_numpy(
        onnx.numpy_helper.to_array(stored["body.0.expand.conv.codes"]).astype("int32")
    )
    expected = layers["body.0.expand.conv"].codes
    assert torch.equal(codes, expected[:, :, 0, 0] if recipe is W4 else expected)
    bits = 4 if recipe is W4 else 8
    for name, layer in layers.items():
        assert len(stored[f"{name}.codes"].raw_data) == -(-layer.codes.numel() * bits // 8)


def test_what_onnx_cannot_write_is_refused(model, x, tmp_path):
    for spec in (
        LayerSpec("classifier", per_channel(8), Uniform(9)),
        LayerSpec(r".*\.depthwise\.conv", per_channel(8), Uniform(6, False, "channel", axis=1)),
        LayerSpec("classifier", Uniform(4, granularity=6)),
        LayerSpec("classifier", Uniform(4, granularity="channel", axis=1)),
        LayerSpec(r".*\.act", input=PER_TENSOR, kind="pointwise"),
    ):
        with pytest.raises(ValueError, match="not written"):
            quantized = ptq.quantize(model, Recipe("r", layers=(spec,)), [(x, None)])
            to_onnx(quantized, x[:1], tmp_path / "a.onnx")


def test_a_truncated_file_is_refused(model, x, tmp_path):
    path = tmp_path / "model.onnx"
    to_onnx(model, x[:1], path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model.onnx is no ONNX file that runs"):
        onnx_runtime.loaded(path)


@pytest.mark.parametrize("bits", [8, 4])
@INPUTS
def test_pointwise_convolutions_are_right_on_several_streams(bits, inputs, tmp_path):
    openvino = pytest.importorskip("openvino")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 32, 1), nn.SiLU(), nn.Conv2d(32, 32, 1)).eval()
    x, path = torch.randn(9, 32, 8, 8), tmp_path / "model.onnx"
    layers = (LayerSpec(".*", per_channel(bits), inputs),)
    network = ptq.quantize(net, Recipe("r", layers=layers), [(x, None)])
    to_onnx(network, x[:1], path)
    read, expected = openvino.Core().read_model(path), network(x).detach()
    for settings in 20 * STREAMS:  # a race: one good pass proves nothing
        compiled = openvino.Core().compile_model(read, "CPU", settings | openvino_cpu.AS_SIMULATED)
        logits = torch.from_numpy(compiled(x.numpy())[0])
        assert close(logits, expected, expected, 0.1), settings


@pytest.mark.parametrize("batch", [None, 1], ids=["open batch", "batch 1"])
@INPUTS
def test_no_weights_of_convolutions_are_left_to_compute(model, x, inputs, batch, tmp_path):
    openvino = pytest.importorskip("openvino")
    pointwise = r".*\.(expand|project)\.conv|.*\.to_tokens"
    recipe = Recipe("r", layers=(LayerSpec(pointwise, per_channel(4), inputs),))
    path = tmp_path / "model.onnx"
    to_onnx(ptq.quantize(model, recipe, [(x, None)]), x[:1], path)
    read = openvino.Core().read_model(path)
    read.reshape([batch or -1, *x.shape[1:]])
    ops = openvino.Core().compile_model(read, "CPU").get_runtime_model().get_ops()
    kinds = {op: op.get_rt_info()["layerType"].astype(str) for op in ops}
    convolutions = [op for op in ops if kinds[op] == "Convolution"]
    assert len(convolutions) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert {kinds[op.input_value(1).get_node()] for op in convolutions} == {"Const"}


def test_parity_on_every_engine(exported, x):
    path, expected = exported
    results = parity.check(path, x.split(2), expected, batch=4, passes=3, few=4)
    assert {(r.engine, r.setting) for r in results} == {
        ("onnxruntime", ""),
        *(("openvino", setting) for setting in parity.STREAMS),
    }
    assert [r.batch for r in results] == [1, 4] * 4
    assert [r.images for r in results] == [5] * 4 + [4] * 4
    assert [r.share for r in results] == [1] * 8
    first, *_, last = map(parity.in_words, results)
    assert first == "onnxruntime, batch 1: predicts as simulated on 5 of 5 images"
    assert last.endswith("batch 4: predicts as simulated on 4 of 4 images in the worst of 3 passes")


def test_parity_finds_what_was_not_simulated(exported, x):
    path, expected = exported
    classes = expected.argmax(1)
    classes[0] = (classes[0] + 1) % 10
    assert [r.share for r in parity.check(path, [x], classes, passes=1)] == [0.8] * 8


def test_parity_says_what_does_not_run(exported, x):
    path, expected = exported
    results = parity.check(path, [x[:, :, :8, :8]], expected, passes=1)
    assert [r.share for r in results] == [0] * 8
    assert parity.in_words(results[-4]).startswith("openvino, 2 streams, batch 1: does not run, ")


def test_parity_takes_logits_that_are_not_finite_for_wrong():
    def run(batches):
        return [torch.tensor([[1.0, torch.nan], [torch.inf, 0], [2, 1]]).numpy()]

    assert parity._right(lambda: run, [torch.zeros(3, 1)], torch.tensor([1, 0, 0]), 3) == (1, "")


def test_parity_names_engines_that_are_missing(exported, x, monkeypatch):
    path, expected = exported
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    *_, last = parity.check(path, [x], expected)
    assert last.share is None
    assert parity.in_words(last).startswith("openvino: not checked, openvino is missing: pip")


def test_parity_does_not_check_a_damaged_file(model, x, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no ONNX")
    results = parity.check(path, [x], torch.zeros(5))
    assert [r.engine for r in results] == ["onnxruntime", "openvino"]
    assert all("not checked" in parity.in_words(r) for r in results)


def test_settings_that_compute_as_simulated(quantized, exported, x):
    path, expected = exported
    (note,) = onnx.load(path).metadata_props
    assert all(f"{k}={v}" in note.value for k, v in openvino_cpu.AS_SIMULATED.items())
    if quantized[0] is W4:
        openvino = pytest.importorskip("openvino")
        read = openvino.Core().read_model(path)
        compiled = openvino.Core().compile_model(read, "CPU", openvino_cpu.AS_SIMULATED)
        logits = torch.from_numpy(compiled(x.numpy())[0])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "engine, package", [(onnx_runtime, "onnxruntime"), (openvino_cpu, "openvino")]
)
def test_a_missing_engine_names_its_package(monkeypatch, engine, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(EngineMissing, match=f"pip install {package}"):
        engine.load(None, None, None, None)


def test_a_file_that_onnx_can_not_hold_is_left_out_by_a_line(tmp_path, capsys):
    model, recipe = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), ptq.RECIPES["i-bert"]
    quantized = ptq.quantize(model, ptq.recipe(recipe.name, model), [(draw(8, 3), None)])
    assert export_files(None, ptq.recipe(recipe.name, model), quantized, tmp_path / "a", 0)
    assert "ONNX files are left out: ONNX has no such formats" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
