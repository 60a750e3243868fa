"""Convert stored rows, reports, benchmarks and runs to the schemas of lab.report, once."""

import json
import shutil
from pathlib import Path

from lab.files import write_json
from lab.models import build, full_name
from lab.report.rows import ROW, comparable
from lab.tasks.cifar10 import CLASSES
from ptq import RECIPES


def recipe(old: dict) -> dict:
    """The old recipe in today's words; it must be equal to today's recipe of its name."""
    new = RECIPES[old["name"]]
    if old["rules"]:
        assert new.peer == "published" and not old["layers"]
    elif old["layers"]:
        inputs = any(spec["input"] for spec in old["layers"])
        norms = [f"{old['norms']}_norms"] if old["norms"] else []
        steps = ["equalize"] * old["equalize"] + [old["rounding"], *norms]
        steps += ["calibrate", *norms] if inputs else []
        steps += ["correct_biases"] * old["correct_biases"]
        ours = new.asdict()
        assert steps == ours["steps"], (old["name"], steps, ours["steps"])
        assert old["layers"] == ours["layers"], old["name"]
        assert old["units"] == ours["units"], old["name"]
    else:
        assert old["peer"] == new.peer, old["name"]
    for name in ("calibration_images", "calibration_batch"):
        assert old[name] == new.asdict()[name], old["name"]
    return new.asdict()


def without(old: dict, *names) -> dict:
    return {k: v for k, v in old.items() if k not in names}


def row(old: dict) -> dict:
    old_recipe = {"equalize": False, "units": None, "correct_biases": False} | old["recipe"]
    new = without(old, "dataset", "simulated", "accuracy_pct", "predictions", "recipe", "engine")
    engine = "published" if old_recipe["rules"] else old["engine"]
    new |= {
        "task": old["dataset"],
        "recipe": recipe(old_recipe),
        "engine": engine,
        "kind": "simulated" if old["simulated"] else "measured",
        "score": {"accuracy_pct": old["accuracy_pct"]},
        "predictions": [int(k) for k in old["predictions"]],
        "classes": list(CLASSES),
    }
    order = ["model", "task", "split", "img_size", "checkpoint", "checkpoint_sha256", "recipe"]
    order += ["engine", "engine_version", "kind", "n_images", "n_correct", "score"]
    last = ["classes", "confusion", "predictions"]
    keys = [*order, *(k for k in new if k not in order + last), *last]
    new = {k: new[k] for k in keys}
    ROW(new, old["model"])
    return new


for path in sorted(Path("results").glob("mobilevit_*/*@*.json")):
    old = json.loads(path.read_text())
    new = row(old)
    name = path.name.replace("-held-out", "")
    if new["engine"] == "published":
        name = name.replace("@torch-eager", "@published")
    folder = path.parent / "ablation" if new["split"] == "held-out" else path.parent
    write_json(folder / name, new)
    if folder / name != path:
        path.unlink()
for path in sorted(Path("results").glob("mobilevit_*/per-layer/*.json")):
    old = json.loads(path.read_text())
    old_recipe = {"equalize": False, "units": None, "correct_biases": False} | old["recipe"]
    write_json(path, old | {"recipe": recipe(old_recipe), "largest": 10})

folder = Path("checkpoints/mobilevit_xxs")
for before, after in (("first/first/first", 1), ("first/first", 2), ("first", 3)):
    history = folder / "history" / f"run{after}"
    history.mkdir(parents=True)
    for file in (folder / before).iterdir():
        if file.is_file():
            shutil.move(file, history / file.name)
shutil.rmtree(folder / "first")
for path in sorted(Path("checkpoints").rglob("metrics.json")):
    old = json.loads(path.read_text())
    config = old["config"]
    model = full_name(config["variant"])
    parameters = sum(p.numel() for p in build(model, num_classes=10).parameters())
    new = {"model": model, "task": config["dataset"], "parameters": parameters}
    write_json(path, new | old)
assert comparable({"title": 1, "a": 2}) == {"a": 2}
