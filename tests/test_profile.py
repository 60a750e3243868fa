"""The profile of quantized tensors, against plain sums over whole tensors."""

import json
import math

import pytest
import torch
from small import draw
from torch import nn

import ptq
from lab.tasks.classification import class_scores
from ptq.analysis.profile import attention, profile
from ptq.analysis.sensitivity import sensitivities
from ptq.analysis.tensors import Error, TensorStats
from ptq.formats import Log2, Uniform
from ptq.layers import QuantizedLayer, Quantizer


def error_of(x, y):
    error = Error()
    error.add(torch.tensor(x), torch.tensor(y), None)
    return error.as_dict()


def test_error_of_four_numbers():
    found = error_of([1.0, 2.0, 3.0, 4.0], [1.1, 1.9, 3.2, 3.9])
    assert found["qsnr_db"] == pytest.approx(26.3202, abs=1e-3)
    assert found["mse"] == pytest.approx(0.0175, rel=1e-5)
    assert found["cosine"] == pytest.approx(0.998849, abs=1e-6)


def test_errors_are_sums_over_all_batches_and_the_worst_channel_is_told():
    x, y = draw(6, 3, 5, seed=0), draw(6, 3, 5, seed=1)
    y = x + y * torch.tensor([0.01, 1.0, 0.1])[:, None]
    error = Error()
    for part in range(3):
        error.add(x[2 * part :][:2], y[2 * part :][:2], 1)
    found, noise = error.as_dict(), (x - y).double().square()
    signal = x.double().square()
    assert found["qsnr_db"] == pytest.approx(10 * math.log10(signal.sum() / noise.sum()))
    worst = 10 * math.log10(signal[:, 1].sum() / noise[:, 1].sum())
    assert found["worst_channel_db"] == pytest.approx(worst)


def test_nothing_lost_has_no_number_of_decibels():
    assert error_of([1.0, 0.0], [1.0, 0.0])["qsnr_db"] is None
    assert error_of([0.0, 0.0], [0.0, 0.0])["cosine"] is None
    assert error_of([0.0], [1.0])["qsnr_db"] < -100


def stats_of(x, format, *grid):
    stats = TensorStats(format, grid, None)
    for part in x.chunk(3):
        stats.add(part)
    return stats.as_dict()


def test_statistics_of_a_tensor_agree_with_those_of_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    x = draw(3000) ** 3
    scale, zero_point = torch.tensor([0.1]), torch.tensor([100], dtype=torch.int32)
    format = Uniform(8, symmetric=False)
    found = stats_of(x, format, scale, zero_point)
    codes = (x / 0.1).round() + 100
    low, high = (codes < 0), (codes > 255)
    assert low.any() and high.any()
    assert found["clipped_low"] == pytest.approx(low.double().mean().item())
    assert found["clipped_high"] == pytest.approx(high.double().mean().item())
    assert found["codes_used"] == len(codes.clamp(0, 255).unique())
    assert found["codes"] == codes.clamp(0, 255).long().bincount(minlength=256).tolist()
    y = format.decode(format.encode(x, scale, zero_point), scale, zero_point)
    assert found["mse_over_rounding"] == pytest.approx(
        (x - y).square().mean().item() / (0.01 / 12), rel=1e-4
    )
    assert found["kurtosis"] == pytest.approx(scipy_stats.kurtosis(x, fisher=False), rel=0.02)
    moved = scipy_stats.wasserstein_distance(x, y) / x.std(correction=0).item()
    assert found["distance_sigmas"] == pytest.approx(moved, rel=0.05)
    far = (x - x.mean()).abs() > 3 * x.std(correction=0)
    assert found["outliers"] == pytest.approx(far.double().mean().item(), abs=0.001)
    assert sum(found["histogram"]["float"]) == sum(found["histogram"]["quantized"]) == 3000
    assert (found["min"], found["max"]) == (x.min().item(), x.max().item())


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-3])
def test_a_constant_tensor_has_a_profile(value):
    x, format = torch.full((4, 5), value), Uniform(8, symmetric=False)
    grid = format.grid(x.min()[None], x.max()[None])
    found = stats_of(x, format, *grid)
    assert found["sigma"] == 0 and found["kurtosis"] is None and found["codes_used"] == 1
    assert found["outliers"] == 0 and sum(found["histogram"]["float"]) == 20
    json.dumps(found, allow_nan=False)


def test_a_logarithmic_format_has_no_scale():
    x = torch.tensor([1.0, 0.5, 0.4, 1e-9])
    found = stats_of(x, Log2(4))
    assert found["codes"] == [1, 2, *[0] * 13, 1] and found["mse_over_rounding"] is None
    assert found["n_codes"] == 16 and found["scale"] is None


def profiled(network, name, images):
    recipe = ptq.recipe(name, network)
    quantized = ptq.quantize(network, recipe, images)
    return quantized, profile(network, quantized, recipe, images)


def of(found, layer, role):
    return next(t for t in found["tensors"] if (t["layer"], t["role"]) == (layer, role))


def seen_at(network, path, images):
    """What the module at `path` takes in and puts out over all images."""
    seen, module = [], network.get_submodule(path)
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        for x, _ in images:
            network(x)
    handle.remove()
    return tuple(torch.cat(column) for column in zip(*seen))


def test_inputs_are_compared_alone_and_in_the_network(network, images):
    quantized, found = profiled(network, "w8a8", images)
    path = "body.1.project.conv"
    x, _ = seen_at(network, path, images)
    quantizer = quantized.get_submodule(path).input
    with torch.no_grad():
        alone = quantizer(x)
    _, in_network = seen_at(quantized, f"{path}.input", images)
    tensor = of(found, path, "input")
    for key, y in {"local": alone, "cumulative": in_network}.items():
        assert tensor[key]["mse"] == pytest.approx((x - y).square().mean().item(), rel=1e-3)
    assert tensor["local"]["mse"] < tensor["cumulative"]["mse"]
    weight = of(found, path, "weight")
    layer, float_layer = quantized.get_submodule(path).layer, network.get_submodule(path)
    lost = (layer.weight.abs() - float_layer.weight.abs()).square().mean().item()  # norms may flip
    assert weight["local"]["mse"] == pytest.approx(lost, rel=1e-4)
    assert weight["cumulative"] is None
    outputs = [torch.cat([net(x) for x, _ in images]).detach() for net in (network, quantized)]
    error = (outputs[0] - outputs[1]).square().sum()
    db = 10 * math.log10(outputs[0].square().sum() / error)
    assert found["outputs_db"] == pytest.approx(db, abs=0.05)


def test_channels_of_a_convolution_of_another_name_are_told_apart():
    class Other(nn.Conv2d):
        pass

    images = [(draw(4, 3, 8, 8) * torch.tensor([1, 0.1, 0.01])[:, None, None], None)]
    other, plain = (nn.Sequential(kind(3, 6, 3), nn.Flatten()) for kind in (Other, nn.Conv2d))
    plain.load_state_dict(other.state_dict())
    found = [of(profiled(net.eval(), "w8a8", images)[1], "0", "input") for net in (other, plain)]
    assert found[0] == found[1]


def test_every_quantized_tensor_is_there_once(network, images):
    quantized, found = profiled(network, "w8a8", images)
    names = [(t["layer"], t["role"]) for t in found["tensors"]]
    modules = list(quantized.modules())
    n = sum(isinstance(m, Quantizer) for m in modules)
    n += sum(isinstance(m, QuantizedLayer) for m in modules)
    assert len(set(names)) == len(names) == n
    noises = [t["noise"] for t in found["tensors"]]
    assert noises == sorted(noises, reverse=True) and min(noises) >= 0
    assert [b["name"] for b in found["blocks"]] == [
        *("stem.conv", "body.0", "body.1", "body.2", "classifier")
    ]


def test_memory_does_not_depend_on_batches_nor_does_the_result(network, images):
    recipe = ptq.recipe("w8a8-nearest", network)
    quantized = ptq.quantize(network, recipe, images)
    one = [(x[None], None) for batch, _ in images for x in batch]
    together, single = (profile(network, quantized, recipe, b) for b in (images, one))
    assert together == single and together["n_images"] == 8
    assert profile(network, quantized, recipe, images, 3)["n_images"] == 3


def test_activations_in_place_change_nothing_in_a_profile():
    def network(inplace):
        torch.manual_seed(0)
        act = nn.SiLU(inplace)
        layers = nn.Conv2d(3, 6, 3), act, nn.Conv2d(6, 6, 3), nn.ReLU(inplace), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(96, 4)).eval()

    batches = [(draw(6, 3, 8, 8), None)]
    for name in ("w8a8", "i-bert"):
        once, again = (profiled(network(inplace), name, batches)[1] for inplace in (False, True))
        for a, b in zip(once["tensors"], again["tensors"], strict=True):
            assert a == b
        assert once["blocks"] == again["blocks"] and once["outputs_db"] == again["outputs_db"]


def test_noise_is_that_of_quantizing_the_tensor_alone(images):
    """Of a linear network the first order is all there is; directions are many images' mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    batches = [(draw(500, 6), None)]
    recipe = ptq.recipe("w4a8-nearest", model)
    quantized = ptq.quantize(model, recipe, batches)
    found = profile(model, quantized, recipe, batches, 500)
    expected = sensitivities(model, recipe, batches, lambda net: net(batches[0][0]))["noise"]
    for layer in "01":
        for role, name in (("weight", layer), ("input", f"{layer}.input")):
            noise = of(found, layer, role)["noise"]
            assert noise == pytest.approx(expected[f"{role}s"][name], rel=0.25)


def test_the_fisher_score_is_the_squared_gradient_at_drawn_labels():
    """Of logits W x at two equal probabilities the gradient is +-1/2 x for each class."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data.fill_(1.0)
    batches = [(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None)]
    recipe = ptq.recipe("w4-nearest", model)
    model[0].weight.data[1] += 1e-3  # so that outputs are not all alike
    found = profile(model, ptq.quantize(model, recipe), recipe, batches)
    squares = torch.tensor([1.0, 4.0, 9.0, 16.0]).mean() / 4
    assert of(found, "0", "weight")["fisher"] == pytest.approx(squares.item(), rel=0.02)


@pytest.mark.parametrize(
    "name", ["w8a8", "fq-vit-a4", "fq-vit-a4-published", "i-bert", "i-vit-published"]
)
def test_rows_of_the_softmax(network, images, name):
    quantized, found = profiled(network, name, images)
    core = next(t["layer"] for t in found["tensors"] if t["role"] == "attention")
    tensor, module = of(found, core, "attention"), quantized.get_submodule(core)
    assert tensor["cumulative"]["qsnr_db"] > 5
    sums = tensor["row_sums"]
    assert sums["min"] <= sums["mean"] <= sums["max"] and 0.7 < sums["min"] and sums["max"] < 1.5
    if name == "w8a8":
        _, y = seen_at(quantized, f"{core}.inputs.attention", images)
        assert sums["mean"] == pytest.approx(y.sum(-1).mean().item(), rel=1e-5)
        return
    q, k, v = (draw(2, 2, 4, 8, seed=i) for i in range(3))
    with torch.no_grad():
        expected = module(q, k, v)
        product = attention(module, q, k) @ module.inputs["v"](v)
    torch.testing.assert_close(product, expected)
    one = attention(module, q[..., :1, :], k[..., :1, :])  # a row of one element
    largest = min(1.0, tensor["range"][1])
    assert one.flatten().tolist() == pytest.approx([largest] * 4, abs=0.02)


def test_integer_layers_are_seen_as_they_compute(network, images):
    quantized, found = profiled(network, "fq-vit", images)
    roles = {t["role"] for t in found["tensors"]}
    assert roles == {"weight", "input", "output", "q", "k", "v", "scores", "attention"}
    y, integer = (seen_at(net, "body.2.norm", images)[1] for net in (network, quantized))
    output = of(found, "body.2.norm", "output")["cumulative"]
    assert output["mse"] == pytest.approx((y - integer).square().mean().item(), rel=1e-4)
    assert "power-of-two" in of(found, "body.2.norm", "input")["format"]


def test_what_is_not_finite_is_named(network, images):
    recipe = ptq.recipe("w8a8-nearest", network)
    quantized = ptq.quantize(network, recipe, images)
    quantized.stem.conv.layer.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"output of stem\.conv: values are not"):
        profile(network, quantized, recipe, images)
    with pytest.raises(ValueError, match="not finite"):
        profile(network, quantized, recipe, [(images[0][0] * torch.inf, None)])


def test_scores_agree_with_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = draw(200, 8), torch.arange(200) % 7  # the last class has no image
    found, predicted = class_scores(logits, labels), logits.argmax(1)
    expected = metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(8), zero_division=0
    )
    for name, values in zip(("precision_pct", "recall_pct", "f1_pct"), expected):
        ours = [of_class[name] for of_class in found["classes"]]
        assert ours[7] is None and ours[:7] == pytest.approx((100 * values[:7]).tolist())
        assert found[name] == pytest.approx(100 * values[:7].mean())
    top5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(8))
    assert found["top5_pct"] == pytest.approx(100 * top5)
    assert found["n_absent"] == 1 and class_scores(logits[:, :5], labels % 5)["top5_pct"] is None
    assert len(class_scores(draw(120, 101), torch.arange(120) % 101)["classes"]) == 101
