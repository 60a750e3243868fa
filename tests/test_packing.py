"""Packed files: bits by hand, a round trip, damage."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import ptq
from mobilevit import MobileViT
from ptq import packing
from ptq.formats import PowerOfTwo, Uniform
from ptq.recipe import LayerSpec, Recipe

RECIPE = Recipe(
    "test",
    layers=(
        LayerSpec("classifier", Uniform(8, granularity=16)),
        LayerSpec(".*", Uniform(4, granularity="channel"), Uniform(8, False)),
    ),
    steps=("nearest", "calibrate", "correct_biases"),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = MobileViT("xxs").eval()
    x = torch.randn(2, 3, 64, 64)
    quantized = ptq.quantize(model, RECIPE, [(x, None)])
    path = tmp_path_factory.mktemp("packed") / "weights.safetensors"
    packing.save(quantized, RECIPE, path)
    return model, quantized, x, path


def test_bits_by_hand():
    assert packing.pack(torch.tensor([-8, 7, 0]), 4).tolist() == [0x0F, 0x80]
    assert packing.pack(torch.tensor([-128, 127]), 8).tolist() == [0, 255]
    assert packing.pack(torch.tensor([-2, 1, 0, -1, 1]), 2).tolist() == [0b00111001, 0b11000000]


@pytest.mark.parametrize("bits", range(2, 17))
def test_codes_come_back(bits):
    shape = (5, 3, 3)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, shape, dtype=torch.int32)
    codes[0, 0, :2] = torch.tensor([low, high - 1])
    data = packing.pack(codes, bits)
    assert len(data) == -(-45 * bits // 8)
    assert torch.equal(packing.unpack(data, bits, shape), codes)
    with pytest.raises(ValueError, match="do not hold 46 codes"):
        packing.unpack(data[:-1], bits, (46,))


def test_the_file_gives_the_same_network(saved):
    model, quantized, x, path = saved
    torch.manual_seed(1)
    loaded, recipe = packing.load(path, MobileViT("xxs"))
    assert recipe == RECIPE
    assert torch.equal(loaded(x), quantized(x))
    assert not torch.equal(loaded(x), model(x))


def test_the_file_is_small(saved):
    _, quantized, _, path = saved
    weights = sum(p.numel() for p in quantized.parameters() if p.dim() > 1)
    rest = sum(t.numel() for t in quantized.state_dict().values()) - 2 * weights
    assert path.stat().st_size < weights / 2 + 4 * rest + 80_000  # names, shapes, classifier


def test_a_file_that_cannot_be_written_is_the_systems_error(saved, tmp_path):
    with pytest.raises(OSError, match="No such file"):
        packing.save(saved[1], RECIPE, tmp_path / "absent" / "weights.safetensors")


def test_damage_is_an_error(saved, tmp_path):
    _, _, _, path = saved
    content = path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="no quantized network"):
        packing.load(cut, MobileViT("xxs"))
    with pytest.raises(ValueError, match="no quantized network"):
        packing.load(tmp_path / "absent", MobileViT("xxs"))
    with pytest.raises(ValueError, match="another network"):
        packing.load(path, MobileViT("xs"))
    with pytest.raises(ValueError, match="another network"):
        packing.load(path, MobileViT("xxs", num_classes=100))
    with pytest.raises(ValueError, match=r"heads': \[1, 1, 1\].*asked for is.*heads': \[4, 4, 4\]"):
        packing.load(path, MobileViT("xxs", heads=4))


@pytest.mark.parametrize("name", ["stem.conv.input.scale", "head.conv.input.zero_point"])
def test_scales_of_inputs_are_as_many_as_the_format_says(name, saved, tmp_path):
    model, _, _, path = saved
    with safe_open(path, "pt") as file:
        header = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    bad = tmp_path / "bad.safetensors"
    for wrong in (tensors[name][:0], tensors[name].repeat(2)):
        save_file(tensors | {name: wrong}, bad, metadata=header)
        with pytest.raises(ValueError, match="codes or scales of .*input are not"):
            packing.load(bad, model)


@pytest.mark.parametrize("name, wrong", [("0.input.zero_point", 256), ("1.input.shifts", 4)])
def test_codes_that_a_format_does_not_have_are_refused(name, wrong, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)).eval()
    even = LayerSpec("0", Uniform(8, granularity="channel"), Uniform(8, False))
    norm = LayerSpec("1", input=PowerOfTwo(8), output=Uniform(8, False), kind="fq-vit-norm")
    recipe = Recipe("r", layers=(even, norm))
    network = ptq.quantize(model, recipe, [(torch.randn(8, 6), None)])
    packing.save(network, recipe, tmp_path / "good")
    packing.load(tmp_path / "good", model)
    with safe_open(tmp_path / "good", "pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    for value in (-1, wrong):
        spoiled = tensors | {name: torch.full_like(tensors[name], value)}
        save_file(spoiled, tmp_path / "bad", metadata=header)
        with pytest.raises(ValueError, match=f"of {name.rpartition('.')[0]} are not those"):
            packing.load(tmp_path / "bad", model)


@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize(
    "layer, shape", [(nn.Linear(6, 5), (8, 7, 6)), (nn.Conv2d(6, 5, 3), (8, 6, 7, 9))]
)
def test_scales_of_inputs_may_lie_along_any_axis(layer, shape, axis, tmp_path):
    model, x = nn.Sequential(layer).eval(), torch.randn(shape)
    inputs = Uniform(8, False, "channel", axis)
    recipe = Recipe("r", layers=(LayerSpec(".*", Uniform(8), inputs),))
    quantized = ptq.quantize(model, recipe, [(x, None)])
    packing.save(quantized, recipe, tmp_path / "a")
    assert torch.equal(packing.load(tmp_path / "a", model)[0](x), quantized(x))


def test_inputs_of_pointwise_layers_may_have_scales_per_channel(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 5)).eval()
    norm = LayerSpec("1", input=Uniform(8, False, "channel", -1), kind="pointwise")
    recipe = Recipe("r", layers=(norm, LayerSpec("2", Uniform(8, granularity="channel"))))
    x = torch.randn(8, 16)
    quantized = ptq.quantize(model, recipe, [(x, None)])
    packing.save(quantized, recipe, tmp_path / "a")
    assert torch.equal(packing.load(tmp_path / "a", model)[0](x), quantized(x))


def test_files_with_slow_patterns_or_numbers_that_are_not_finite_are_refused(tmp_path):
    network, path = nn.Sequential(nn.Linear(4, 3)).eval(), tmp_path / "a"
    recipe, slow = (Recipe("r", layers=(LayerSpec(p, Uniform(8)),)) for p in ("0", ".*.*.*.*0"))
    packing.save(ptq.quantize(network, recipe), recipe, path)
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    for noted, stored, says in (
        ({}, {"0.layer.bias": torch.full((3,), torch.nan)}, "0.layer.bias is not finite"),
        ({"recipe": json.dumps(slow.asdict())}, {}, "repeats too much"),
    ):
        save_file(tensors | stored, path, metadata=header | noted)
        with pytest.raises(ValueError, match=says):
            packing.load(path, network)
