"""Exceptions to a recipe, the command that suggests some, and recipes in files."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import fails_with_one_line, run
from torch import nn

import ptq
from lab import files, profiles
from lab.cli import BadInput
from lab.options import parse_args
from lab.profiles import enough, profile_folder
from lab.recipes import read_recipe
from lab.subject import load_subject
from ptq.analysis.exceptions import with_exceptions


def test_exceptions_get_16_bits_or_floats(network, images):
    recipe = ptq.recipe("w8a8", network)
    core = next(n for n, m in network.named_modules() if n.endswith("core"))
    tensors = [("classifier", "input"), (core, "q"), ("stem.conv", "weight")]
    wide = with_exceptions(network, recipe, tensors, "wide")
    quantized = ptq.quantize(network, wide, images)
    assert quantized.classifier.input.format.bits == 16 and quantized.classifier.format.bits == 8
    assert {m.format.bits for m in quantized.get_submodule(core).inputs.values()} == {16}
    assert quantized.stem.conv.format.bits == 16 and quantized.stem.conv.input.format.bits == 8
    assert ptq.Recipe.fromdict(json.loads(json.dumps(wide.asdict()))) == wide
    plain = ptq.quantize(network, with_exceptions(network, recipe, tensors, "f", None), images)
    assert isinstance(plain.classifier.input, nn.Identity)
    assert type(plain.get_submodule(core)) is type(network.get_submodule(core))
    assert plain.stem.conv.format is None


def test_a_core_with_a_format_for_its_softmax_is_an_exception_as_a_whole(network):
    core = next(n for n, m in network.named_modules() if n.endswith("core"))
    recipe = ptq.recipe("w8a8-tensorrt", network)
    for bits in (16, None):
        changed = with_exceptions(network, recipe, [(core, "q")], "wide", bits)
        spec = changed.layer_spec(core, {"product"})
        formats = (spec.input, spec.attention)
        assert [f and f.bits for f in formats] == [bits, bits]


def test_integer_layers_become_float_ones_as_exceptions(network, images):
    recipe = ptq.recipe("fq-vit", network)
    norms = [n for n, m in network.named_modules() if isinstance(m, nn.LayerNorm)]
    changed = with_exceptions(network, recipe, [(n, "input") for n in norms], "float-norms")
    quantized = ptq.quantize(network, changed, images)
    assert all(type(quantized.get_submodule(name)) is nn.LayerNorm for name in norms)
    with pytest.raises(ValueError, match="GELU of kind i-bert-act can be no exception"):
        model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
        with_exceptions(model, ptq.recipe("i-bert", model), [("1", "input")], "none")


def test_a_profile_with_a_suggestion_that_quantize_takes(checkpoint, tmp_path):
    command = ("quantize.py", "--checkpoint", checkpoint, "--held-out", "--output", tmp_path)
    out, _ = run(*command, "--recipes", "w4-nearest", "--profile", "--suggest")
    (folder,) = tmp_path.rglob("w4-nearest-32")
    names = {path.name for path in folder.iterdir()}
    assert {"profile.json", "tensors.csv", "report.html", "suggested.json"} <= names
    assert sum(name.endswith(".png") for name in names) == len(names) - 4 > 0
    report = files.read_json(folder / "profile.json")
    trained = torch.load(checkpoint, weights_only=True)
    assert report["scores"]["float"]["top1_pct"] == pytest.approx(trained["val_accuracy_pct"])
    tries = [one["noise"] for one in report["suggestion"]["tries"]]
    assert tries[-1] <= tries[0] / 2 and report["suggestion"]["n_images"] == 200
    assert report["tensors"][0]["layer"] in out
    run(*command, "--recipes", folder / "suggested.json", "--latency-runs", "1")
    path = next(tmp_path.rglob("w4-nearest-suggested-32@torch-eager.json"))
    row, suggested = files.read_json(path), report["scores"]["suggested"]["top1_pct"]
    assert row["score"]["accuracy_pct"] == pytest.approx(suggested)
    again = ("quantize.py", "--from", path, "--latency-runs", "1", "--output", tmp_path / "again")
    assert "| yes |" in run(*again)[0]
    row["recipe"]["layers"][0]["pattern"] = "stages("
    files.write_json(path, row)
    fails_with_one_line(*again, says="'stages(' is not a pattern")


def test_what_can_have_no_profile_or_has_one_already(tmp_path):
    subject = SimpleNamespace(folder="a", img_size=256, seed=0)
    with pytest.raises(BadInput, match="fp32 has no quantized layers"):
        profile_folder(subject, ptq.RECIPES["fp32"], tmp_path, False)
    folder = profile_folder(subject, ptq.RECIPES["w8a8"], tmp_path, False)
    folder.mkdir(parents=True)
    with pytest.raises(BadInput, match="is there already: --force replaces it"):
        profile_folder(subject, ptq.RECIPES["w8a8"], tmp_path, False)
    assert profile_folder(subject, ptq.RECIPES["w8a8"], tmp_path, True) == folder


def test_a_suggestion_without_images_to_choose_on_is_refused_before_the_profile(
    checkpoint, tmp_path
):
    trained = torch.load(checkpoint, weights_only=True)
    torch.save(trained | {"config": {}}, tmp_path / "other.pth")
    command = ("--checkpoint", tmp_path / "other.pth", "--profile", "--output", tmp_path / "out")
    says = "does not say how many training images its run held out"
    fails_with_one_line("quantize.py", *command, "--recipes", "w4", "--suggest", says=says)
    assert not list(tmp_path.rglob("profile.json"))


def test_options_that_do_not_go_together(monkeypatch, capsys):
    for options, says in {
        ("--suggest",): "--suggest goes with --profile",
        ("--profile", "--per-layer"): "exclude each other",
        ("--profile", "--engines", "openvino"): "--profile excludes --engines",
        ("--profile", "--latency-runs", "5"): "--profile excludes --engines and --latency-runs",
        ("--per-layer", "--latency-runs", "5"): "--per-layer excludes",
        ("--export", "x", "--latency-runs", "5"): "--export excludes",
        ("--export", "x", "--output", "y"): "--latency-runs and --output",
    }.items():
        monkeypatch.setattr("sys.argv", ["quantize.py", "--checkpoint", "A.pth", *options])
        with pytest.raises(SystemExit, match="2"):
            parse_args("")
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, says",
    [
        ({"name": "../w8a8"}, "a recipe in a file has layers and a name"),
        ({"layers": [], "steps": []}, "a recipe in a file has layers and a name"),
        ({"steps": 3}, "steps of a Recipe can't be '3'"),
        ({"type": "Layer"}, "there is no type 'Layer'"),
        ({"units": "stages("}, "'stages(' is not a pattern"),
        ({"units": r"(\w+)+x"}, "repeats too much for a file's"),
    ],
)
def test_files_with_no_recipe_are_refused(tmp_path, change, says):
    path = tmp_path / "mine.json"
    files.write_json(path, ptq.RECIPES["w8a8"].asdict())
    assert read_recipe(path) == ptq.RECIPES["w8a8"]
    files.write_json(path, ptq.RECIPES["w8a8"].asdict() | change)
    with pytest.raises(BadInput, match=re.escape(says)):
        read_recipe(path)


def test_as_many_of_the_worst_as_make_half_of_the_noise():
    assert [enough(noises) for noises in ([4, 3, 2, 1], [9, 1], [1, 1, 1, 1])] == [2, 1, 2]


def test_a_profile_is_written_before_a_suggestion_is_sought(checkpoint, tmp_path, monkeypatch):
    subject = load_subject(checkpoint, None, n_images=50)
    recipe = ptq.recipe("w4-nearest", subject.model)
    made = {
        "network": ptq.quantize(subject.model, recipe),
        "batches": None,
        "calibration": {"n": 0},
    }

    def refused(*_):
        raise BadInput("no tensor can be an exception")

    monkeypatch.setattr(profiles, "suggest", refused)
    with pytest.raises(BadInput, match="no tensor"):
        profiles.write_profile(subject, recipe, tmp_path, lambda _: made, 1, "float")
    assert files.read_json(tmp_path / "profile.json")["suggestion"] is None
