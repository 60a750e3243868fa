"""Mistakes of those who write a method, an observer or a recipe, or call the library."""

from dataclasses import replace

import pytest
import torch
from small import draw
from torch import nn

import ptq
from lab import files
from lab.cli import BadInput
from lab.engines import openvino_cpu
from lab.models import MODELS
from lab.schema import number
from lab.training.start import fresh_model
from ptq.analysis.compare import noise
from ptq.formats import Log2, PowerOfTwo, Uniform
from ptq.layers import QuantizedLayer
from ptq.methods import STEPS, adaround
from ptq.methods.nearest import nearest_codes
from ptq.observers import OBSERVERS, MinMax
from ptq.recipe import LayerSpec, Recipe

W8A8 = Recipe("test", layers=(LayerSpec(".*", Uniform(8), Uniform(8, False)),))
LINEAR = nn.Linear(4, 3, bias=False)
TWO = [(draw(2, 4), None), (draw(2, 4, seed=1), None)]


class Shuffled(list):
    """Batches in another order at each pass."""

    def __iter__(self):
        self.reverse()
        return super().__iter__()


def test_batches_that_change_from_pass_to_pass_are_refused():
    with pytest.raises(ValueError, match="do not shuffle or augment"):
        ptq.quantize(LINEAR, W8A8, Shuffled(TWO))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda codes, scale: (codes + 0.5, scale), "integers of its shape"),
        (lambda codes, scale: (codes[:1], scale), "integers of its shape"),
        (lambda codes, scale: (codes * 9, scale), "from -8 to 7: clamp"),
        (lambda codes, scale: (codes, scale[:, None]), r"positive numbers \[G\]"),
        (lambda codes, scale: (codes, scale[:1]), r"positive numbers \[G\], here \[3\]"),
        (lambda codes, scale: (codes, -scale), r"positive numbers \[G\]"),
        (lambda codes, scale: (codes, scale * torch.nan), r"positive numbers \[G\]"),
    ],
)
def test_codes_and_scales_that_a_format_does_not_have_are_refused(change, says, monkeypatch):
    def careless(model, reference, batches, recipe):
        layer = next(m for m in model.modules() if isinstance(m, QuantizedLayer))
        layer.set_weight(*change(*nearest_codes(layer)))

    monkeypatch.setitem(STEPS, "careless", careless)
    layers = (LayerSpec(".*", Uniform(4, granularity="channel")),)
    with pytest.raises(ValueError, match=says):
        ptq.quantize(nn.Sequential(LINEAR), Recipe("c", "", layers, ("careless",)), TWO)


def test_a_weight_that_is_not_that_of_its_codes_is_refused(monkeypatch):
    def careless(model, reference, batches, recipe):
        model[0].layer.weight += 1e-3

    monkeypatch.setitem(STEPS, "careless", careless)
    recipe = replace(W8A8, steps=("nearest", "calibrate", "careless"))
    with pytest.raises(ValueError, match="weight of 0 was changed without set_weight"):
        ptq.quantize(nn.Sequential(LINEAR), recipe, TWO)


@pytest.mark.parametrize(
    "found, says",
    [
        ((torch.tensor([torch.nan]), torch.tensor([1.0])), "do not run from low to high"),
        ((torch.tensor([1.0]), torch.tensor([-1.0])), "do not run from low to high"),
        ((torch.tensor(-1.0), torch.tensor(1.0)), r"no two tensors \[G\]"),
        ((-1.0, 1.0), r"no two tensors \[G\]"),
    ],
)
def test_ranges_that_are_none_are_refused_with_the_observers_name(found, says, monkeypatch):
    class Careless(MinMax):
        def range(self):
            return found

    monkeypatch.setitem(OBSERVERS, "careless", Careless)
    layers = (LayerSpec(".*", Uniform(8), Uniform(8), input_observer="careless"),)
    with pytest.raises(ValueError, match=f"Careless.*{says}"):
        ptq.quantize(nn.Sequential(LINEAR), Recipe("c", "", layers), TWO)


def test_recipes_that_are_none_are_refused_where_they_are_made():
    spec = LayerSpec(".*", Uniform(4))
    assert Recipe("r", layers=[spec], steps=["nearest"]) == Recipe("r", "", (spec,), ("nearest",))
    for wrong in ({"layers": spec}, {"steps": "nearest"}, {"calibration_images": "8"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} of a recipe can't be"):
            Recipe("r", **wrong)
    with pytest.raises(ValueError, match="'w8a8' is no recipe: ptq.recipe"):
        ptq.quantize(LINEAR, "w8a8", TWO)
    once = ptq.quantize(nn.Sequential(LINEAR), W8A8, TWO)
    with pytest.raises(ValueError, match="quantized already"):
        ptq.quantize(once, W8A8, TWO)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LayerSpec(".*", 8),
        lambda: LayerSpec(None),
        lambda: LayerSpec(".*", Uniform(8), weight_observer=None),
        lambda: LayerSpec(".*", input=Uniform(8), attention="x"),
        lambda: Uniform(8.5),
        lambda: Uniform("8"),
        lambda: PowerOfTwo(8.0),
        lambda: Log2(4.0),
    ],
)
def test_entries_and_formats_of_other_types_are_refused(make):
    with pytest.raises(ValueError, match="of an entry can't be|has 2 to (8|16) bits"):
        make()


def test_a_format_of_ones_own_is_not_exported_as_another():
    class Other(Uniform):
        pass

    for spec in (LayerSpec(".*", Other(4)), LayerSpec(".*", Uniform(4), Other(8))):
        assert not Recipe("r", layers=(spec,)).exportable


@pytest.mark.parametrize("step", ["nearest", "gptq", "adaround", "similarity"])
def test_layers_may_be_called_by_keyword(step, monkeypatch):
    monkeypatch.setattr(adaround, "ITERATIONS", 3)

    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(input=x)

    class ByPlace(ByKeyword):
        def forward(self, x):
            return self.fc(x)

    recipe = replace(W8A8, steps=(step, "calibrate"), units=None)
    networks = [ByKeyword(), ByPlace()]
    networks[1].load_state_dict(networks[0].state_dict())
    one, other = (ptq.quantize(network, recipe, TWO)(draw(3, 4)) for network in networks)
    assert torch.equal(one, other)


def test_noise_is_relative_to_outputs_that_vary():
    with pytest.raises(ValueError, match="the same number"):
        noise(torch.ones(3, 2), torch.zeros(3, 2))


def test_numbers_that_json_or_floats_do_not_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())
    for n in (10**400, -(10**400)):
        with pytest.raises(BadInput, match="a finite number"):
            number()(n, "it")


def test_parts_of_a_split_tensor_run_on_openvino():
    pytest.importorskip("openvino")

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(n, 8, 1) for n in (3, 4, 4))

        def forward(self, x):
            x, y = self.a(x).chunk(2, 1)
            return (self.b(x) + self.c(y)).mean((2, 3))

    network, x = Split().eval(), draw(2, 3, 16, 16)
    loaded = openvino_cpu.load(network, ptq.RECIPES["fp32"], None, x)
    torch.testing.assert_close(loaded.run(x), network(x).detach(), rtol=1e-4, atol=1e-5)
    assert loaded.products["float"]["Conv"] == 3


def test_a_network_that_its_file_could_not_build_again_is_refused_before_training(monkeypatch):
    class Own(nn.Linear):
        def __init__(self, num_classes):
            super().__init__(4, num_classes)

    monkeypatch.setitem(MODELS, "own", Own)
    for settings, says in (
        (None, "own has no attribute settings"),
        ({}, "what builds own lacks num_classes"),
        ({"num_classes": 3, "dropout": 0.5}, "dropout is 0.5, but should hold whole numbers"),
    ):
        if settings is not None:
            monkeypatch.setattr(Own, "settings", settings, raising=False)
        with pytest.raises(BadInput, match=says):
            fresh_model("own", 3, None, 0, [])
