"""Networks that the project never saw: their own layers, arguments, buffers and outputs."""

import copy
from argparse import Namespace
from dataclasses import replace

import onnxruntime
import pytest
import torch
from small import draw
from torch import nn

import ptq
import quantize
from lab import cli, files
from lab.cli import BadInput
from lab.recipes import read_recipe
from ptq.analysis.compare import noise
from ptq.analysis.energy import count
from ptq.analysis.mixed import parse_name
from ptq.export import to_onnx
from ptq.folding import fold_norms, make_norms_positive
from ptq.graph import consumers
from ptq.methods import STEPS
from ptq.methods.nearest import nearest_codes
from ptq.methods.norms import adapted, statistics
from ptq.recipe import LayerSpec, Recipe

FINE = ptq.Uniform(16, granularity="channel")  # all but lossless
W16 = Recipe("w16", layers=(LayerSpec(".*", FINE),))
FORMAT = ptq.Uniform(8, symmetric=False)
W8A8 = Recipe("w8a8", layers=(LayerSpec(".*", ptq.Uniform(8), FORMAT),))
X = draw(8, 3, 8, 8)
BATCHES = [(X, None)]


class Conditional(nn.Module):
    """Multiplies by a condition, if it is given one."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.norm.weight.data[::2] = -1
        self.norm.running_var.fill_(4)

    def forward(self, x, cond=None, *more, scale: float = 1.0, **rest):
        x = self.conv(x)
        if cond is None:
            x = self.norm(x)
        return self.head((x * scale).mean((2, 3)))


def test_an_argument_with_a_default_keeps_it_where_a_network_is_traced():
    assert consumers(Conditional())["conv"] == ["norm"]


class Folded(nn.Conv2d):
    """Of another name only."""


class Rectified(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class Unseen(nn.Module):
    """A convolution, a norm with factors of either sign; unless `traced`, it looks at values."""

    def __init__(self, kind, traced):
        super().__init__()
        torch.manual_seed(0)
        self.traced, self.conv, self.norm = traced, kind(3, 4, 3), nn.BatchNorm2d(4)
        self.norm.weight.data[::2] = -1

    def forward(self, x):
        if not self.traced and x.sum() > 1e9:
            return x
        return self.norm(self.conv(x))


@torch.no_grad()
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("kind", [Folded, Rectified])
def test_a_subclass_is_a_convolution_unless_it_has_a_forward_of_its_own(kind, traced):
    network = Unseen(kind, traced).eval()
    make_norms_positive(folded := copy.deepcopy(network), BATCHES)
    assert bool((folded.norm.weight > 0).all()) == (kind is Folded)
    fold_norms(folded, BATCHES)
    assert noise(folded(X), network(X)) < 1e-8


@torch.no_grad()
def test_a_norm_folds_behind_a_convolution_of_another_name():
    network = Unseen(Folded, traced=True).eval()
    quantized = ptq.quantize(network, W16, BATCHES)
    fold_norms(quantized, BATCHES)
    assert isinstance(quantized.norm, nn.Identity)
    assert noise(quantized(X), network(X)) < 1e-8


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_nothing_may_stand_before_a_quantizer(tmp_path, monkeypatch):
    def wrap(model, *_):
        model[0].input = nn.Sequential(Doubled(), model[0].input)

    network, batches = nn.Sequential(nn.Linear(4, 3)).eval(), [(draw(8, 4), None)]
    quantized = ptq.quantize(network, W8A8, batches)
    wrap(quantized)
    with pytest.raises(ValueError, match="0.input is a Sequential, which no file holds"):
        ptq.save(quantized, W8A8, tmp_path / "a")
    with pytest.raises(ValueError, match="0.input is a Sequential, which no file holds"):
        to_onnx(quantized, draw(1, 4), tmp_path / "a")
    monkeypatch.setitem(STEPS, "wrap", wrap)
    with pytest.raises(ValueError, match="0.input is a Sequential, which no file holds"):
        ptq.quantize(network, replace(W8A8, steps=(*W8A8.steps, "wrap")), batches)


def test_a_file_holds_the_recipe_that_the_network_was_quantized_by(tmp_path):
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)).eval()
    first = Recipe("first", layers=(LayerSpec("0", FINE),))
    norm = Recipe("norm", layers=(*W16.layers, LayerSpec("1", input=FORMAT, kind="pointwise")))
    by_w16, by_w8a8 = (ptq.quantize(network, r, [(draw(8, 4), None)]) for r in (W16, W8A8))
    for quantized, recipe in ((network, W16), (by_w16, W8A8), (by_w8a8, W16), (by_w16, first)):
        with pytest.raises(ValueError, match=f"[02] is not as recipe {recipe.name} quantizes it"):
            ptq.save(quantized, recipe, tmp_path / "a")
    with pytest.raises(ValueError, match="1 is not as recipe norm quantizes it"):
        ptq.save(by_w16, norm, tmp_path / "a")
    ptq.save(by_w16, W16, tmp_path / "a")
    again, _ = ptq.load(tmp_path / "a", network)
    other_ranges = (LayerSpec("0|2", FINE, weight_observer="minmax"),)
    ptq.save(again, replace(W16, layers=other_ranges), tmp_path / "b")


class Dropping(nn.BatchNorm2d):
    """As timm has it: a norm with dropout and activation in it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(super().forward(x)).relu()


@torch.no_grad()
def test_statistics_of_norms_are_taken_without_dropout():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Dropping(4), nn.Conv2d(4, 4, 3), Dropping(4))
    found = [statistics(network, BATCHES)["3"][0] for _ in range(2)]
    assert torch.equal(*found)


class Reader(nn.Module):
    """Reads what its layer is."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(input=x.view(-1, self.fc.in_features)) - self.fc.bias


def test_a_quantized_layer_has_the_attributes_of_its_own(tmp_path):
    network, x = Reader().eval(), draw(8, 4)
    quantized = ptq.quantize(network, W8A8, [(x, None)])
    torch.save(quantized, tmp_path / "whole.pt")
    pickled = torch.load(tmp_path / "whole.pt", weights_only=False)
    for again in (copy.deepcopy(quantized), pickled):
        assert torch.equal(again(x), quantized(x)) and again.fc.out_features == 3
    with pytest.raises(AttributeError, match="no attribute 'stride'"):
        _ = quantized.fc.stride
    to_onnx(quantized, x[:1], tmp_path / "reader.onnx")
    written = onnxruntime.InferenceSession(tmp_path / "reader.onnx").run(
        None, {"images": x.numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(written[0]), quantized(x).detach())


@pytest.mark.parametrize("of", [lambda x: {"out": x}, lambda x: (x, x)])
def test_networks_that_give_no_logits_are_not_compared(of):
    class Other(Reader):
        def forward(self, x):
            return of(self.fc(x))

    with pytest.raises(ValueError, match="gives logits, or holds them"):
        ptq.compare_models(Other().eval(), Other().eval(), [(draw(8, 4), None)])


def test_only_logits_are_compared_by_class():
    network = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    with pytest.raises(ValueError, match=r"logits \[b, K\], not \[8, 4, 6, 6\]"):
        ptq.compare_models(network, network, BATCHES)


@pytest.mark.parametrize("place", ["input", "attention", "output"])
def test_activations_have_no_scale_for_each_image(place):
    by_image = {"input": FORMAT} | {place: ptq.Uniform(8, False, granularity="channel")}
    kind = "fq-vit-norm" if place == "output" else "product"
    with pytest.raises(ValueError, match="axis 0 of activations counts images.*axis=1"):
        LayerSpec(".*", kind=kind, **by_image)


def test_a_recipe_in_a_file_has_no_name_of_another(tmp_path):
    path = tmp_path / "a.json"
    for name in ("fp32", "w8a8", "mixed-5bits", "mixed-9ms-fisher-w4-gptq"):
        files.write_json(path, replace(W16, name=name).asdict())
        with pytest.raises(BadInput, match=f"{name} is another recipe: choose a new name"):
            read_recipe(path)
    for recipe in (ptq.RECIPES["w8a8"], replace(W16, name="mixed-5bits-suggested")):
        files.write_json(path, recipe.asdict())
        assert read_recipe(path) == recipe


@pytest.mark.parametrize("words", [["--image", ""], ["--many", "a", ""], ["--image="]])
def test_an_empty_value_is_no_option_left_out(words, capsys):
    parser = cli.parser("doc")
    parser.add_argument("--image")
    parser.add_argument("--many", nargs="+")
    assert parser.parse_args([]).image is None
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert "is empty (--help" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mixed-9bits", "mixed-3.9bits", "mixed-1e999ms"])
def test_a_budget_that_no_network_has_is_refused_by_its_name(name):
    with pytest.raises(ValueError, match="a budget of .* allocation|no finite budget"):
        parse_name(name)


def test_recipes_without_images_are_refused_before_others_are_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(quantize, "row_of", lambda *_: measured.append(1))
    args = Namespace(calibration_images=None, engines=["torch-eager"])
    subject = Namespace(name="a")
    with pytest.raises(BadInput, match="w8a8 has steps that look at images"):
        quantize.write_rows([(subject, ptq.RECIPES["fp32"]), (subject, W8A8)], args)
    assert not measured


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x, y):
        return self.fc(x + y)


def test_a_network_of_two_inputs_is_refused_in_words():
    with pytest.raises(ValueError, match="takes x, y, but networks are called with one tensor"):
        ptq.quantize(TwoInputs(), W8A8, [(draw(8, 4), draw(8, 4))])


class Masked(nn.Module):
    """Keeps a mask, its settings and the features of its last call."""

    def __init__(self, settings):
        super().__init__()
        self.settings, self.fc = settings, nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

    def forward(self, x):
        self.last = self.fc(x)
        return (self.last + self.mask).softmax(-1)


def test_settings_come_back_as_json_holds_them(tmp_path):
    network = Masked({"sizes": (1, 2)}).eval()
    ptq.save(ptq.quantize(network, W16), W16, tmp_path / "a")
    again, _ = ptq.load(tmp_path / "a", network)
    assert again.mask.equal(network.mask)
    for settings in (object(), {"rate": torch.nan}):
        with pytest.raises(ValueError, match="a file can't hold the network's `settings`"):
            ptq.save(ptq.quantize(Masked(settings).eval(), W16), W16, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["fc.weight", "norm.running_var"])
def test_weights_and_statistics_are_finite(name):
    network = nn.Sequential()
    network.fc, network.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    network.state_dict()[name].fill_(torch.inf)
    with pytest.raises(ValueError, match=f"{name} of the network is not finite"):
        ptq.quantize(network, W16)


def test_features_kept_with_their_gradient_are_named():
    network = Masked(None).eval()
    network(draw(4, 4))
    with pytest.raises(ValueError, match="call it under torch.no_grad"):
        ptq.quantize(network, W16)
    batches = [(draw(4, 4), None)]
    for copies in (
        ptq.open_attention,
        lambda network: adapted(network, batches, batches),
        lambda network: count(network, draw(4, 4)),
        lambda network: to_onnx(network, draw(4, 4), "nowhere.onnx"),
    ):
        with pytest.raises(ValueError, match="call it under torch.no_grad"):
            copies(network)
    with torch.no_grad():
        network(draw(4, 4))
    ptq.quantize(network, W16)


def test_codes_and_scales_are_taken_in_any_width(tmp_path, monkeypatch):
    def wide(model, *_):
        codes, scale = nearest_codes(model[0])
        model[0].set_weight(codes.to(torch.int8), scale.double())

    monkeypatch.setitem(STEPS, "wide", wide)
    network = nn.Sequential(nn.Linear(4, 3)).eval()
    recipe = Recipe("wide", layers=(LayerSpec("0", ptq.Uniform(8)),), steps=("wide",))
    ptq.save(ptq.quantize(network, recipe, [(draw(8, 4), None)]), recipe, tmp_path / "a")
    assert ptq.load(tmp_path / "a", network)


@pytest.mark.parametrize("kernel, dilation", [(3, 1), ((1, 5), 2), (2, 2)])
def test_zeros_around_a_convolution_may_be_called_same(kernel, dilation):
    network = nn.Sequential(nn.Conv2d(3, 4, kernel, padding="same", dilation=dilation)).eval()
    quantized = ptq.quantize(network, W16)
    assert noise(quantized(X), network(X)) < 1e-7


def test_an_entry_without_formats_leaves_layers_in_float():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)).eval()
    recipe = ptq.recipe("w8a8", network)
    recipe = replace(recipe, layers=(LayerSpec("2"), *recipe.layers))
    quantized = ptq.quantize(network, recipe, BATCHES)
    assert torch.equal(quantized[2].weight, network[2].weight)
    assert not torch.equal(quantized[0].weight, network[0].weight)
