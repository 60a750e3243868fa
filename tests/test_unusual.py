"""Networks of others that compute weights, read them, return features or add in place."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from small import draw
from small_vits import SIDE, of_transformers
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import ptq
from ptq.analysis.compare import noise
from ptq.analysis.energy import energy
from ptq.analysis.mixed import mixed_recipe
from ptq.analysis.profile import profile
from ptq.folding import fold_norms
from ptq.methods.norms import adapted
from ptq.recipe import LayerSpec, Recipe

FINE = ptq.Uniform(16, granularity="channel")  # all but lossless
W16 = Recipe("w16", layers=(LayerSpec(".*", FINE),))
X = draw(8, 3, 8, 8)
BATCHES = [(X, None)]


def after(convolution):
    """A classifier of images whose first norm has factors of either sign."""
    norm = nn.BatchNorm2d(8)
    norm.weight.data = draw(8)
    rest = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(convolution, norm, *rest).eval()


def pruned():
    convolution = nn.Conv2d(3, 8, 3)
    prune.l1_unstructured(convolution, "weight", 0.5)
    return convolution


@pytest.mark.parametrize("make", [pruned, lambda: spectral_norm(nn.Conv2d(3, 8, 3))])
def test_a_weight_that_is_computed_at_each_call_is_refused_by_name(make):
    with pytest.raises(ValueError, match="0: the weight is computed at each call.* prune.remove"):
        ptq.quantize(after(make()), W16)


def test_a_weight_that_is_computed_may_stay_in_float():
    network = after(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)))
    quantized = ptq.quantize(network, Recipe("last", layers=(LayerSpec("5", FINE),)), BATCHES)
    assert noise(quantized(X), network(X)) < 1e-8


class Features(nn.Module):
    """Gives features besides; what looks at values torch.fx can't trace."""

    def __init__(self, traced):
        super().__init__()
        self.traced, self.conv, self.norm = traced, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.norm.weight.data[::2] = -1
        self.norm.running_var.fill_(4)

    def forward(self, x):
        if not self.traced and x.sum() > 1e9:
            return x, x
        features = self.conv(x)
        return self.norm(features), features


class Tied(nn.Module):
    """Reads the weight of a layer besides."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.norm.weight.data[0] = -1

    def forward(self, x):
        return self.norm(self.conv(x)), F.conv2d(x, self.conv.weight)


def test_a_norm_behind_a_quantized_linear_layer_is_not_folded():
    layers = nn.Linear(12, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 4 * 3, 2)
    network, batches = nn.Sequential(*layers).eval(), [(draw(8, 5, 4, 12), None)]
    quantized = ptq.quantize(network, W16, batches)
    fold_norms(quantized, batches)
    assert isinstance(quantized[1], nn.BatchNorm2d)


@torch.no_grad()
@pytest.mark.parametrize("network", [Features(True), Features(False), Tied()])
def test_what_leaves_a_network_beside_its_logits_stays_what_it_was(network):
    network.eval()
    folded = copy.deepcopy(network)
    fold_norms(folded, BATCHES)
    recipe = Recipe("shifted", layers=W16.layers, steps=("nearest", "shift_norms"))
    for other in (folded, ptq.quantize(network, recipe, BATCHES)):
        assert all(noise(y, expected) < 1e-8 for y, expected in zip(other(X), network(X)))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        if x.sum() > 1e9:
            return x, x
        tokens = self.norm(x)
        return self.head(tokens), tokens


@torch.no_grad()
def test_norms_whose_output_leaves_the_network_are_not_equalized():
    network, x = Tokens().eval(), draw(4, 5, 8)
    recipe = Recipe("equalized", layers=W16.layers, steps=("equalize", "nearest"))
    quantized = ptq.quantize(network, recipe, [(x, None)])
    assert all(noise(y, expected) < 1e-8 for y, expected in zip(quantized(x), network(x)))


@torch.no_grad()
def test_swin_reads_the_biases_of_its_layers():
    torch.manual_seed(0)
    sizes = {"patch_size": [4, 4], "embed_dim": 12, "depths": [2], "num_heads": [2]}
    network = torchvision.models.SwinTransformer(**sizes, window_size=[2, 2], num_classes=3).eval()
    x = draw(2, 3, 16, 16)
    assert noise(ptq.quantize(network, W16)(x), network(x)) < 1e-8


def w8a8_of(network):
    return ptq.recipe("w8a8-nearest", network)


class Adding(nn.Module):
    """Two residual blocks, with sums in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place, self.head = in_place, nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x):
        x = x.clone()
        for block in self.blocks:
            if self.in_place:
                x += block(x)
            else:
                x = x + block(x)
        return self.head(x)


def test_a_sum_in_place_changes_nothing_in_a_profile():
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        network = Adding(in_place).eval()
        recipe = ptq.recipe("w8a8-nearest", network)
        batches = [(draw(16, 8), None)]
        found.append(profile(network, ptq.quantize(network, recipe, batches), recipe, batches))
    plain, in_place = found
    assert in_place["blocks"] == plain["blocks"]


def test_energy_leaves_a_network_in_training_as_it_is():
    network = after(nn.Conv2d(3, 8, 3)).train()
    before = copy.deepcopy(network.state_dict())
    found = energy(network, ptq.recipe("w8a8-nearest", network), X)["total"]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert network.training and found == energy(network.eval(), w8a8_of(network), X)["total"]


def test_tied_weights_are_priced_as_codes_in_each_layer():
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    apart = energy(network, w8a8_of(network), draw(1, 8))["layers"]
    network[2].weight = network[0].weight
    assert energy(network, w8a8_of(network), draw(1, 8))["layers"] == apart


def test_many_alternatives_are_saved_and_loaded(tmp_path):
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))).eval()
    recipe = Recipe("five", layers=(LayerSpec(".*0|.*1|.*2|.*3|.*4", ptq.Uniform(8)),))
    quantized = ptq.quantize(network, recipe)
    ptq.save(quantized, recipe, tmp_path / "a.safetensors")
    again, _ = ptq.load(tmp_path / "a.safetensors", network)
    x = draw(2, 4)
    torch.testing.assert_close(again(x), quantized(x))
    slow = Recipe("slow", layers=(LayerSpec(".*.*.*.*0", ptq.Uniform(8)),))
    with pytest.raises(ValueError, match="repeats too much"):
        ptq.save(ptq.quantize(network, slow), slow, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


@torch.no_grad()
def test_versions_of_modules_come_back_from_a_packed_file(tmp_path):
    network = torchvision.models.mnasnet0_5(num_classes=3).eval()
    quantized = ptq.quantize(network, W16)
    ptq.save(quantized, W16, tmp_path / "a.safetensors")
    again, _ = ptq.load(tmp_path / "a.safetensors", network)
    x = draw(2, 3, 32, 32)
    torch.testing.assert_close(again(x), quantized(x))


@pytest.mark.parametrize("cost", ["noise", "fisher"])
def test_outputs_that_hold_logits_are_taken_in_profiles_and_costs(cost):
    torch.manual_seed(0)
    network = ptq.open_attention(of_transformers())
    batches = [(draw(4, 3, SIDE, SIDE), None)]
    recipe = mixed_recipe(f"mixed-6bits-{cost}-w4a8-nearest", network, batches)
    found = profile(network, ptq.quantize(network, recipe, batches), recipe, batches)
    assert found["tensors"] and found["outputs_db"] > 0


class Named(nn.Module):
    """Calls attention by the names of its arguments."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(query=x, key=x, value=x, need_weights=False)[0]


def test_opened_attention_is_called_by_name():
    network, x = Named().eval(), draw(2, 5, 8)
    torch.testing.assert_close(ptq.open_attention(network)(x), network(x))


def test_batches_that_norms_cannot_adapt_to_are_refused():
    network, other = after(nn.Conv2d(3, 8, 3)), [(draw(4, 3, 16, 16), None)]
    for batches, says in (
        ([], "two and more finite"),
        ([(X[:1], None)], "two and more finite"),
        ([(X * torch.nan, None)], "two and more finite"),
        (iter(BATCHES), "give a sequence"),
        (BATCHES, "there are 8 and 4"),
    ):
        with pytest.raises(ValueError, match=says):
            adapted(network, batches, other)


def test_a_recipe_says_what_its_numbers_and_patterns_are():
    with pytest.raises(ValueError, match="calibrates on a number of images"):
        Recipe("none", layers=W16.layers, calibration_images=-3)
    with pytest.raises(ValueError, match="calibrates on a number of images"):
        Recipe("none", layers=W16.layers, calibration_batch=0)
    with pytest.raises(ValueError, match="is not a pattern"):
        LayerSpec("(", FINE)
    layers = (LayerSpec("0", ptq.Uniform(8, granularity="channel", axis=7)),)
    with pytest.raises(ValueError, match="0: a tensor of 4 dimensions has no channels along 7"):
        ptq.quantize(after(nn.Conv2d(3, 8, 3)), Recipe("axis", layers=layers))


def test_padding_by_words_is_taken_or_refused_by_name():
    network = after(nn.Conv2d(3, 8, 3, padding="valid"))
    with torch.no_grad():
        assert noise(ptq.quantize(network, W16)(X), network(X)) < 1e-8
    with pytest.raises(ValueError, match="0: convolutions are quantized only with a number"):
        ptq.quantize(after(nn.Conv2d(3, 8, 4, padding="same")), W16)
    with pytest.raises(ValueError, match="a single layer: put it into an nn.Sequential"):
        ptq.quantize(nn.Linear(4, 4), W16)


def test_a_network_that_stays_in_float_mostly_is_told():
    network = nn.Sequential(nn.Conv1d(3, 64, 9), nn.Flatten(), nn.Linear(64, 2))
    with pytest.warns(UserWarning, match="leaves 93 % of the weights in float, those of Conv1d"):
        ptq.recipe("w8a8", network)


@pytest.mark.parametrize("cost", ["noise", "fisher", "nuclear"])
def test_images_that_look_alike_at_first_give_costs(cost):
    network = after(nn.Conv2d(3, 8, 3))
    alike = torch.cat((X[:1], X))
    recipe = mixed_recipe(f"mixed-6bits-{cost}-w4a8-nearest", network, [(alike, None)])
    assert recipe.layers
    two = [(X, None), (draw(8, 3, 12, 12), None)]
    if cost != "nuclear":
        with pytest.raises(ValueError, match="of one size"):
            mixed_recipe(f"mixed-6bits-{cost}-w4a8-nearest", network, two)
