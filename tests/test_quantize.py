"""The sweep as users run it, its engines and its rows."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import ROOT, fails_with_one_line, run
from torchvision.transforms.v2.functional import to_pil_image

import ptq
import quantize
from lab import files
from lab.engines import onnx_runtime, torch_eager
from lab.engines.measure import predict
from lab.models.checkpoint import model_from_checkpoint
from lab.report.tables import products_text, results_table
from lab.subject import load_subject
from lab.tasks import TASKS
from lab.tasks.batches import EvalBatches, balanced_subset, split
from ptq import RECIPES, packing

FLAGS = ("--calibration-images", "60", "--latency-runs", "3")


@pytest.fixture(scope="module")
def swept(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    out, _ = run("quantize.py", "--checkpoint", checkpoint, *FLAGS, "--output", folder)
    paths = sorted(folder.rglob("*.json"))
    return folder, out, {path.stem: files.read_json(path) for path in paths}


def test_every_recipe_gets_its_row(swept, checkpoint):
    _, out, results = swept
    int4, fx = "int4-percentile-32@published", "int8-fx-32@torch-fx"
    assert sorted(results) == ["fp16-32@published", "fp32-32@torch-eager", int4, fx]
    trained = torch.load(checkpoint, weights_only=True)
    fp32 = results["fp32-32@torch-eager"]
    assert fp32["score"]["accuracy_pct"] == pytest.approx(trained["test_accuracy_pct"])
    assert fp32["checkpoint_sha256"] == files.sha256(checkpoint)
    assert fp32["task"] == "synthetic" and "synthetic" in fp32["model"]
    for row in results.values():
        assert len(row["predictions"]) == row["n_images"] == 500
        assert row["score"]["accuracy_pct"] == 100 * row["n_correct"] / 500
        assert row["latency_ms"]["threads"] == 1
        assert not row["size_is_estimate"] or row["recipe"]["name"] == "int4-percentile"
    sizes = [
        results[name]["size_bytes"]
        for name in ("fp32-32@torch-eager", "fp16-32@published", "int4-percentile-32@published")
    ]
    assert sizes[1] < 0.6 * sizes[0] and sizes[2] < 0.2 * sizes[0]
    assert out.count("| mobilevit_xxs-synthetic |") == 4


def test_a_row_tells_how_far_its_logits_are_off(swept, checkpoint):
    noise = {name: row["logit_noise"] for name, row in swept[2].items()}
    model, _ = model_from_checkpoint(checkpoint)
    half, _ = model_from_checkpoint(checkpoint)
    half.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    shown = EvalBatches(TASKS["synthetic"].load(None, train=False), 32, 25)
    logits, _ = predict(model, shown)
    expected = ptq.compare_models(model, half, shown)["mse"] / logits.double().var().item()
    assert noise["fp32-32@torch-eager"] == 0
    assert noise["fp16-32@published"] == pytest.approx(expected, rel=1e-3)
    assert noise["int8-fx-32@torch-fx"] > 100 * expected


def test_finished_rows_are_reused_unless_the_settings_differ(swept, checkpoint):
    folder, _, results = swept
    command = ("quantize.py", "--checkpoint", checkpoint, "--recipes", "fp32", "--output", folder)
    (path,) = folder.rglob("fp32-32@torch-eager.json")
    before = path.read_text()
    out, _ = run(*command, "--latency-runs", "3")
    assert path.read_text() == before and ", kept" in out
    files.write_json(path, files.read_json(path) | {"dirty": True})
    out, _ = run(*command, "--latency-runs", "3")
    assert "kept, measured by code that was not committed: --force measures again" in out
    path.write_text(before)
    other = (*command, "--latency-runs", "3", "--test-images", "100")
    _, err = run(*other, code=2)
    assert "another images_sha256, n_images: --force replaces it" in err
    assert path.read_text() == before
    run(*other, "--force")
    assert files.read_json(path)["n_images"] == 100
    path.write_text(before)


def test_the_row_of_a_faster_command_is_kept(swept, checkpoint, tmp_path, monkeypatch):
    faster = swept[2]["fp32-32@torch-eager"]
    subject = load_subject(checkpoint, None)
    args = SimpleNamespace(output=tmp_path, rows=None, force=False, latency_runs=3)
    path = tmp_path / subject.folder / "fp32-32@torch-eager.json"

    def overtaken(*_):
        files.write_json(path, faster)
        return {}

    monkeypatch.setattr(quantize, "measure", overtaken)
    n = faster["calibration_images"]
    assert quantize.row_of(subject, RECIPES["fp32"], torch_eager, n, args) == (faster, True)
    assert files.read_json(path) == faster


def test_held_out_images_give_a_row_of_their_own(checkpoint, tmp_path):
    run("quantize.py", "--checkpoint", checkpoint, "--recipes", "fp32", "--latency-runs", "3",
        "--held-out", "--output", tmp_path)  # fmt: skip
    (path,) = tmp_path.rglob("ablation/fp32-32@torch-eager.json")
    row = files.read_json(path)
    trained = torch.load(checkpoint, weights_only=True)
    assert (row["split"], row["n_images"]) == ("held-out", 200)
    assert row["score"]["accuracy_pct"] == pytest.approx(trained["val_accuracy_pct"])


def test_another_image_size_or_seed_gets_a_row_of_its_own(checkpoint, tmp_path):
    run("quantize.py", "--checkpoint", checkpoint, "--recipes", "fp32", "w4-shift",
        "--img-size", "64", "--seed", "1", "--calibration-images", "100", "--latency-runs", "3",
        "--test-images", "50", "--output", tmp_path)  # fmt: skip
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"mobilevit_xxs-synthetic-{checkpoint.parent.parent.name}"
    plain, shifted = (
        files.read_json(folder / f"{name}-64-seed1@torch-eager.json")
        for name in ("fp32", "w4-shift")
    )
    assert plain["img_size"] == shifted["img_size"] == 64
    assert plain["predictions"] != shifted["predictions"]
    assert plain["adapt_images"] == 256
    model, _ = model_from_checkpoint(checkpoint)
    images = TASKS["synthetic"].load(None, train=False)[:50]

    def predictions(network):
        logits, _ = predict(network, EvalBatches(images, 64, 25))
        return logits.argmax(1).tolist()

    train = TASKS["synthetic"].load(None, train=True)
    usable, _ = split(train.labels, 200)
    chosen = balanced_subset(train.labels, usable, 256, seed=1)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    batches = [EvalBatches(train[chosen[order]], side, 32) for side in (64, 32)]
    assert predictions(ptq.adapted(model, *batches)) == plain["predictions"] != predictions(model)


def test_the_table_pairs_rows_with_their_baseline(swept):
    results = list(swept[2].values())
    table = results_table(results, results)
    int4 = swept[2]["int4-percentile-32@published"]
    fp32 = swept[2]["fp32-32@torch-eager"]
    changed = sum(a != b for a, b in zip(int4["predictions"], fp32["predictions"]))
    delta = int4["score"]["accuracy_pct"] - fp32["score"]["accuracy_pct"]
    assert f"{delta:+.2f} ({changed})" in table
    assert table.index("FP32 |") < table.index("INT8, torch FX") < table.index("FP16 weights")


def test_an_engine_without_the_formats_is_left_out(checkpoint, tmp_path):
    out, _ = run("quantize.py", "--checkpoint", checkpoint, *FLAGS, "--recipes", "w6a6", "fp32",
                 "--engines", "onnxruntime", "--output", tmp_path)  # fmt: skip
    assert "w6a6@onnxruntime: left out, ONNX has no such formats" in out
    assert [path.stem for path in tmp_path.rglob("*.json")] == ["fp32-32@onnxruntime"]


def test_weights_that_are_not_finite_are_one_line(checkpoint, tmp_path):
    state, path = torch.load(checkpoint, weights_only=True), tmp_path / "nan.pth"
    state["state_dict"]["stem.conv.weight"][0] = torch.nan
    torch.save(state, path)
    to = ("--output", tmp_path)
    for way in (("--per-layer", *to), ("--export", tmp_path / "exported"), to):
        fails_with_one_line(
            "quantize.py", "--checkpoint", path, "--recipes", "w8a8", *way,
            says="stem.conv.weight has values that are not finite",
        )  # fmt: skip


def test_checkpoints_of_one_folder_would_share_rows(checkpoint, tmp_path):
    twin = checkpoint.with_name("twin.pth")
    shutil.copy(checkpoint, twin)
    fails_with_one_line(
        "quantize.py", "--checkpoint", checkpoint, twin, "--output", tmp_path, says="would share"
    )


def test_agreement_with_the_simulation_is_told_where_both_were_measured(swept):
    simulated = swept[2]["fp16-32@published"] | {"engine": "torch-eager"}
    flipped = [1 - min(simulated["predictions"][0], 1), *simulated["predictions"][1:]]
    executed = simulated | {"kind": "measured", "engine": "openvino", "predictions": flipped}
    assert "99.80 %" in results_table([executed], [simulated, executed])
    for other in ({"seed": 1}, {"cpu": "another"}):
        assert "99.80 %" not in results_table([executed], [simulated | other, executed])


def test_what_ran_in_integers_is_told_with_the_reason():
    products = {
        "int8": {"Conv": 28},
        "float": {"Conv": 7, "MatMul": 55},
        "asked": {"Conv": 30, "MatMul": 18},
    }
    assert products_text(products) == (
        "  28 of 35 convolutions, 0 of 55 matrix products in INT8; "
        "in float 42 by the recipe, 20 for want of a kernel"
    )


def test_a_failing_row_does_not_stop_the_others(checkpoint, tmp_path):
    folder = tmp_path / f"mobilevit_xxs-synthetic-{checkpoint.parent.parent.name}"
    blocked = folder / "fp32-32@torch-eager.json"
    blocked.mkdir(parents=True)  # a folder where the row's file should go
    command = ("quantize.py", "--checkpoint", checkpoint, *FLAGS, "--output", tmp_path)
    _, err = run(*command, "--recipes", "fp32", "fp16", code=2)
    assert "fp32@torch-eager: failed" in err and "Traceback" not in err
    assert (folder / "fp16-32@published.json").exists()


def test_bad_input_is_one_line(checkpoint, tmp_path):
    absent = tmp_path / "absent.pth"
    fails_with_one_line("quantize.py", "--checkpoint", absent, says="no checkpoint")
    for flags, says in {
        ("--recipes", "int3"): "no recipe is called int3: closest are",
        ("--latency-runs", "0"): "not a whole number from 1",
        ("--recipes", "w4-nearest", "--per-layer"): "w4-nearest is neither",
        ("--recipes", "w6a6", "--engines", "onnxruntime"): "nothing was measured",
        ("--recipes", "fp16", "--export", tmp_path): "fp16 has no quantized layers to write",
    }.items():
        fails_with_one_line("quantize.py", "--checkpoint", checkpoint, *flags, says=says)


def test_export_writes_files_that_load(checkpoint, tmp_path):
    out, _ = run(
        "quantize.py", "--checkpoint", checkpoint, "--recipes", "w4-nearest", "--export", tmp_path
    )
    assert "onnxruntime, batch 1: predicts as simulated on 100 of 100 images" in out
    assert "openvino, 2 streams, batch 8: predicts as simulated on 16 of 16 images" in out
    packed, onnx = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (packed.suffix, onnx.suffix) == (".safetensors", ".onnx")
    fails_with_one_line(
        "quantize.py", "--checkpoint", checkpoint, "--recipes", "w4-nearest", "--export", tmp_path,
        says=f"{packed} is there already: --force replaces it",
    )  # fmt: skip
    model, _ = model_from_checkpoint(checkpoint)
    expected = ptq.quantize(model, RECIPES["w4-nearest"])
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for logits in (packing.load(packed, model)[0](x), onnx_runtime.loaded(onnx).run(x)):
        torch.testing.assert_close(logits, expected(x), rtol=1e-3, atol=1e-3)
    snippets = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "speed.md").read_text(), re.DOTALL
    )
    (snippet,) = (text for text in snippets if "packing.load" in text)
    files = snippet.replace("exported/mobilevit_xxs-w8a8", str(packed.with_suffix("")))
    scope = {}
    exec(files.replace("images, 256", "images, 32"), scope)
    torch.testing.assert_close(
        scope["logits"], torch.from_numpy(scope["openvino_logits"]), rtol=0.01, atol=0.01
    )


def test_an_unwritable_output_is_one_line_before_anything_is_measured(checkpoint, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place, says in (("file/results", "cannot write to"), ("file", "it is no folder")):
        to = ("--output", tmp_path / place)
        fails_with_one_line("quantize.py", "--checkpoint", checkpoint, *to, says=says)


def test_rows_are_valid_json_with_their_provenance(swept):
    row = json.loads(next(swept[0].rglob("int8-fx-32@torch-fx.json")).read_text())
    assert row["calibration"]["n"] == 60 and len(row["calibration"]["indices_sha256"]) == 64
    assert {"commit", "dirty", "versions", "cpu", "command", "created"} <= set(row)


@pytest.fixture(scope="module")
def folder_of_photos(tmp_path_factory):
    """Stripes of the first three classes of the synthetic task, as a user keeps pictures."""
    folder, images = tmp_path_factory.mktemp("photos"), TASKS["synthetic"].load(None, train=False)
    for i in range(60):
        if (label := int(images.labels[i])) < 3:
            place = folder / f"class {label}"
            place.mkdir(exist_ok=True)
            to_pil_image(images.images[i]).resize((72, 64)).save(place / f"{i}.png")
    return folder


def test_other_peoples_weights_are_quantized_on_a_folder_of_pictures(folder_of_photos, tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "theirs.pth"
    theirs = timm.create_model("mobilevit_xxs", num_classes=3)
    torch.save({"module." + name: t for name, t in theirs.state_dict().items()}, weights)
    data = ("--task", "imagefolder", "--data-dir", folder_of_photos, "--img-size", "64")
    command = ("quantize.py", "--weights", weights, "--model", "xxs", *data)
    run(*command, "--recipes", "fp32", "w8a8", *FLAGS, "--output", tmp_path / "results")
    fp32, w8a8 = (
        files.read_json(next((tmp_path / "results").rglob(f"{name}-64@torch-eager.json")))
        for name in ("fp32", "w8a8")
    )
    assert fp32["task"] == "imagefolder" and fp32["classes"] == ["class 0", "class 1", "class 2"]
    assert 0 < fp32["n_images"] < 18 and w8a8["size_bytes"] < 0.4 * fp32["size_bytes"]
    run(*command, "--recipes", "w4-nearest", "--export", tmp_path / "exported")
    assert len(list((tmp_path / "exported").iterdir())) == 2
    torch.save({"a": torch.zeros(3)}, weights)
    fails_with_one_line(*command, says="theirs.pth")
    fails_with_one_line("quantize.py", "--weights", weights, *data, says="--weights needs --model")


def test_a_checkpoint_must_hold_the_network_and_the_classes_that_are_asked_for(
    checkpoint, folder_of_photos
):
    command = ("quantize.py", "--checkpoint", checkpoint)
    fails_with_one_line(*command, "--model", "xs", says="holds mobilevit_xxs, not mobilevit_xs")
    fails_with_one_line(
        *command, "--task", "imagefolder", "--data-dir", folder_of_photos,
        says="imagefolder has 3 classes, the network tells 10 apart",
    )  # fmt: skip
    fails_with_one_line(*command, "--calibration-batches", "32", says="--calibration-images")


def test_a_run_held_out_no_image_of_another_task(checkpoint, tmp_path):
    images = TASKS["synthetic"].load(None, train=False)
    for i in range(20):
        place = tmp_path / "photos" / images.classes[images.labels[i]]
        place.mkdir(parents=True, exist_ok=True)
        to_pil_image(images.images[i]).save(place / f"{i}.png")
    command = ("quantize.py", "--checkpoint", checkpoint, "--task", "imagefolder", "--data-dir",
               tmp_path / "photos", "--output", tmp_path, "--latency-runs", "1")  # fmt: skip
    run(*command, "--recipes", "w8a8-nearest")
    row = files.read_json(next(tmp_path.rglob("w8a8-nearest-32@torch-eager.json")))
    assert row["calibration"]["n"] == 4 and row["n_images"] == 16
    fails_with_one_line(*command, "--held-out", says="how many training images its run held out")


def test_a_row_is_measured_again_and_compared(swept, tmp_path):
    folder, _, _ = swept
    rows = [
        next(folder.rglob(f"{name}.json")) for name in ("fp32-32@torch-eager", "fp16-32@published")
    ]
    again = ("quantize.py", "--from", *rows, "--test-images", "100", "--latency-runs", "3")
    out, _ = run(*again, "--output", tmp_path / "again")
    assert out.count("| yes |") == 2 and len(list((tmp_path / "again").rglob("*.json"))) == 2
    row = files.read_json(rows[0])
    row["predictions"] = [(k + 1) % 10 for k in row["predictions"]]
    wrong = tmp_path / "wrong.json"
    files.write_json(wrong, row)
    out, _ = run("quantize.py", "--from", wrong, *again[4:], "--output", tmp_path / "again", code=1)
    assert "| NO |" in out
    fails_with_one_line(*again, "--output", folder, says="is a row to compare with")
    fails_with_one_line(
        *again, "--seed", "1", says="--from takes all from the row, --seed excluded"
    )
    files.write_json(wrong, row | {"recipe": row["recipe"] | {"calibration_images": 7}})
    fails_with_one_line("quantize.py", "--from", wrong, says="fp32 is not what it was")
    files.write_json(wrong, {k: v for k, v in row.items() if k != "cpu"})
    fails_with_one_line("quantize.py", "--from", wrong, says="wrong.json lacks cpu")
