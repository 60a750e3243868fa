"""Mixed precision as users ask for it, by the name of a recipe."""

from conftest import fails_with_one_line, run
from small import draw, small_network

import ptq
from lab import files
from lab.engines import openvino_cpu
from ptq.export import to_onnx
from ptq.layers import QuantizedLayer
from ptq.recipe import Recipe

FLAGS = ("--calibration-images", "60", "--latency-runs", "3", "--test-images", "50")
NAME = "mixed-5bits-fisher-w4a8-nearest"


def test_a_budget_gives_a_row_with_its_recipe_whole_that_is_measured_again(checkpoint, tmp_path):
    command = ("quantize.py", "--checkpoint", checkpoint, *FLAGS)
    run(*command, "--recipes", NAME, "w4a8-nearest", "w8a8-nearest", "--output", tmp_path)
    rows = {path.stem.partition("-32@")[0]: path for path in tmp_path.rglob("*@torch-eager.json")}
    mixed, w4, w8 = (files.read_json(rows[n]) for n in (NAME, "w4a8-nearest", "w8a8-nearest"))
    recipe = Recipe.fromdict(mixed["recipe"])
    bits = {spec.weight.bits for spec in recipe.layers if spec.weight}
    assert recipe.name == NAME and len(bits) > 1 and bits <= {4, 5, 6, 7, 8}
    sizes = [row["size_bytes"] for row in (w4, mixed, w8)]
    assert sizes == sorted(sizes) and sizes[1] < sizes[0] + 0.35 * (sizes[2] - sizes[0])
    energies = [row["energy"]["horowitz"]["total"] for row in (w4, mixed, w8)]
    assert energies == sorted(energies)
    out, _ = run("quantize.py", "--from", rows[NAME], "--test-images", "50",
                 "--latency-runs", "3", "--output", tmp_path / "again")  # fmt: skip
    assert "| yes |" in out
    fails_with_one_line(
        *command, "--recipes", "mixed-3bits-w4a8-nearest", "--output", tmp_path,
        says="argument --recipes: a budget of 3 bits is below the smallest "
        "allocation, 4",
    )  # fmt: skip
    fails_with_one_line(
        *command, "--recipes", "mixed-1e9bytes-w4a8-nearest", "--output", tmp_path,
        says="a budget of 1000000000 bytes is above the largest allocation",
    )  # fmt: skip
    assert len(list(tmp_path.glob("*/*.json"))) == 3
    fails_with_one_line(*command, "--recipes", "mixed-5MB", says="mixed-5MB names no budget")


def test_every_layer_with_a_weight_is_timed(tmp_path):
    network, x = small_network(), draw(2, 3, 64, 64)
    made = ptq.quantize(network, ptq.recipe("w8a8-nearest", network), [(x, None)])
    to_onnx(made, x[:1], tmp_path / "a.onnx")
    found = openvino_cpu.layers_ms({8: tmp_path / "a.onnx"}, x[:1], 3)[8]
    named = {name for name, module in made.named_modules() if isinstance(module, QuantizedLayer)}
    assert found.keys() - {openvino_cpu.NO_LAYER} == named
    assert all(ms >= 0 for ms in found.values()) and sum(found.values()) > 0
