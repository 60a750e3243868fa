"""Batch norms, biases and equalization that repair a quantized network, and what feeds what."""

import copy

import pytest
import torch
from small import draw
from torch import nn

import ptq
from ptq import packing
from ptq.formats import Uniform
from ptq.graph import captured, linears_after_norms, norms_after, watched
from ptq.methods.equalize import equalize
from ptq.methods.norms import replace_norms, statistics
from ptq.recipe import LayerSpec, Recipe

W8A8 = Recipe(
    "test", layers=(LayerSpec(".*", Uniform(8, granularity="channel"), Uniform(8, False)),)
)


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


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(x)
        return self.a(x) + self.b(x)


def test_of_several_layers_behind_a_norm_the_largest_weight_counts():
    torch.manual_seed(0)
    network, x = Parallel().eval(), draw(16, 8)
    network.b.weight.data *= 5
    equalize(copy.deepcopy(network), network, [(x, None)], None)
    weight = torch.cat((network.a.weight, network.b.weight)).abs().amax(0)
    torch.testing.assert_close(network.norm(x).abs().amax(0), weight)


def test_norms_without_bias_or_behind_a_quantizer_are_equalized_and_bare_ones_stay():
    torch.manual_seed(0)
    for norm in (nn.LayerNorm(8, bias=False), nn.LayerNorm(8, elementwise_affine=False)):
        network = nn.Sequential(norm, nn.Linear(8, 4)).eval()
        images = [(draw(16, 8) * torch.arange(1, 9), None)]
        affine, exact = Uniform(8, symmetric=False), network(images[0][0]).detach()
        layers = (
            LayerSpec("1", Uniform(8), affine),
            LayerSpec("0", input=affine, kind="pointwise"),
        )
        recipe = Recipe("equal", "", layers, ("equalize", "nearest", "calibrate"))
        quantized = ptq.quantize(network, recipe, images)
        torch.testing.assert_close(quantized(images[0][0]), exact, atol=0.05, rtol=0.05)
        if norm.weight is not None:
            assert not quantized[0][1].weight.equal(norm.weight)


def test_a_norm_that_runs_twice_has_the_statistics_of_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.a(x)) + self.norm(9 * self.b(x))

    network, batches = Twice().eval(), [(draw(4, 3, 6, 6, seed=i), None) for i in range(2)]
    with torch.no_grad():
        seen = [y for x, _ in batches for y in (network.a(x), 9 * network.b(x))]
    mean, variance = statistics(network, batches)["norm"]
    for got, of in ((mean, torch.mean), (variance, torch.var)):
        torch.testing.assert_close(got, torch.stack([of(y, (0, 2, 3)) for y in seen]).mean(0))


def test_layers_that_share_a_weight_are_each_quantized_by_themselves(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)).eval()
    network[2].weight = network[0].weight
    network[1].weight.data[0] *= -1
    x, weight = draw(2, 3, 4, 4), network[0].weight.detach().clone()
    fine = Recipe("16", "", (LayerSpec("0", Uniform(16, granularity="channel")),), ("nearest",))
    quantized = ptq.quantize(network, fine)
    torch.testing.assert_close(quantized(x), network(x), atol=1e-3, rtol=1e-3)
    assert network[2].weight is network[0].weight and network[0].weight.equal(weight)
    coarse = Recipe("2", "", (LayerSpec("0", Uniform(2)),), ("nearest",))
    quantized = ptq.quantize(network, coarse)
    assert quantized[2].weight.equal(weight)
    packing.save(quantized, coarse, tmp_path / "packed.safetensors")
    loaded, _ = packing.load(tmp_path / "packed.safetensors", network)
    assert loaded(x).equal(quantized(x))


def test_biases_leave_to_norms_what_norms_have_taken_in(model, batches):
    layers = (LayerSpec(".*", Uniform(4, granularity="channel")),)
    recipe = Recipe("r", "", layers, ("nearest", "shift_norms", "correct_biases"))
    quantized = ptq.quantize(model, recipe, batches)
    assert quantized.stem.conv.layer.bias is None
    for name in ("stages.2.1.layers.0.attn.qkv", "classifier"):
        got, wanted = (mean_by_hand(network, name, batches) for network in (quantized, model))
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)


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


def test_a_channel_that_never_varies_keeps_the_statistics_of_its_norm():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    network[0].weight.data[2] = 0
    network[1].running_var.fill_(3)
    layers = (LayerSpec(".*", Uniform(4, granularity="channel")),)
    recipe = Recipe("r", layers=layers, steps=("nearest", "shift_norms"))
    quantized = ptq.quantize(network, recipe, [(draw(4, 3, 6, 6), None)])
    assert quantized[1].running_var[2] == 3 and (quantized[1].running_var[:2] != 3).all()
