"""Result files, training runs and pages, small enough for every table and figure to be tried on."""

import csv
import json

from lab.files import sha256, write_json
from lab.report.pages import PAGES
from lab.report.results import load_results
from lab.report.rows import row_path
from ptq import RECIPES

WEIGHTS = b"weights"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TAKEN_FOR = (1, 2, 3, 5, 5, 3, 7, 8, 9, 0)
VNNI, AVX2 = "A CPU, AVX512 with VNNI", "A CPU, AVX2"
IN_INT8 = {"int8": {"Conv": 30, "MatMul": 37}, "float": {"Conv": 5, "MatMul": 18}}


def row(recipe, engine=None, accuracy=90.0, ms=10.0, changed=0, **other):
    """A row as quantize.py writes it; cats and dogs are taken for each other most often."""
    made = RECIPES[recipe]
    engine = engine or made.peer or "torch-eager"
    times = {"median": ms, "p10": 9.0, "p90": 11.0, "runs": 100, "threads": 1, "batch": 1}
    n = other.get("n_images", 10_000)
    floats_only = engine == "published" or (engine == "torch-eager" and made.layers)
    right, of_class = round(n * accuracy / 1000), n // 10
    return {
        "model": "mobilevit_xxs",
        "task": "cifar10",
        "split": "test",
        "img_size": 256,
        "checkpoint": "checkpoints/mobilevit_xxs/best.pth",
        "checkpoint_sha256": sha256(WEIGHTS),
        "recipe": made.asdict(),
        "engine": engine,
        "seed": 0,
        "calibration_images": made.calibration_images,
        "adapt_images": None,
        "n_images": n,
        "latency_runs": 100,
        "classes": list(CLASSES),
        "engine_version": "1",
        "kind": "simulated" if floats_only else "measured",
        "n_correct": 10 * right,
        "score": {"accuracy_pct": accuracy},
        "predictions": [1] * changed + [0] * (n - changed),
        "confusion": [
            [right if i == j else (of_class - right) * (j == TAKEN_FOR[i]) for j in range(10)]
            for i in range(10)
        ],
        "size_bytes": 2**20,
        "size_is_estimate": False,
        "products": None,
        "latency_ms": times,
        "fp32_latency_ms": times | {"median": 20.0},
        "cpu": VNNI,
        "command": "python quantize.py",
        "wall_s": 1.0,
    } | other


def task_row(task, recipe, engine, **score):
    """A row of a task whose answer to an image is no single class."""
    made = row(recipe, engine, n_images=72, model=f"of_{task}", task=task)
    answers = ("n_correct", "predictions", "confusion")
    return {k: v for k, v in made.items() if k not in answers} | {"score": score}


def held_out(recipe, accuracy, seed=0):
    return row(recipe, accuracy=accuracy, seed=seed, split="held-out", n_images=2000)


def mixed_row(budget, **other):
    made = RECIPES["w4a8"].asdict() | {"name": f"mixed-{budget}"}
    return row("w4a8", **other) | {"recipe": made}


def spent(total):
    """Energy of a row: so many mJ, a tenth of it for weights, at twice the price twice that."""

    def of_prices(unit, price):
        parts = {"compute": 0.8 * total, "weights": 0.1 * total, "activations": 0.1 * total}
        return {"unit": unit} | {k: 1e9 * price * v for k, v in (parts | {"total": total}).items()}

    prices = {"seed": ("8-bit MACs", 1), "horowitz": ("pJ", 1), "horowitz-high": ("pJ", 2)}
    return {name: of_prices(*how) for name, how in prices.items()}


ROWS = (
    row("fp32", ms=20.0, size_bytes=2**22, cpu=AVX2, energy=spent(4.0)),
    row("fp16"),
    row("int8-fx", accuracy=60.0),
    row("int4-percentile", accuracy=40.0, size_is_estimate=True),
    row("fp32", "openvino", ms=16.0),
    row("w8a8", "openvino", 89.9, 8.0, products=IN_INT8),
    row("w8a8"),
    row("w4", "openvino", 89.5, size_bytes=2**19),
    row("int8-nncf", accuracy=80.0, ms=9.0, products=IN_INT8),
    row("w6a6", accuracy=89.5),
    row("fp32", "torch-float64", accuracy=89.95, kind="simulated"),
    row("i-bert", "integer", changed=2, kind="integer"),
    row("i-bert", changed=3),
    row("i-bert", "torch-float64", kind="simulated"),
    row("w4a8", accuracy=88.0, logit_noise=0.02, size_bytes=500_000, energy=spent(1.0)),
    row("w5a8", accuracy=89.0, logit_noise=0.01, size_bytes=600_000, energy=spent(1.25)),
    mixed_row("4.2bits", accuracy=88.5, logit_noise=0.015, size_bytes=520_000, energy=spent(1.05)),
    mixed_row("5bits", accuracy=89.25, logit_noise=0.008, size_bytes=605_000, energy=spent(1.25)),
    mixed_row("6bits", accuracy=89.75, logit_noise=0.005, size_bytes=700_000, energy=spent(1.5)),
    row("fp32", "openvino", 88.0, 12.0, img_size=128, adapt_images=256),
    row("w8a8", "openvino", 87.9, 5.0, img_size=128, adapt_images=256),
    held_out("fp32", 90.0),
    held_out("w4-minmax", 35.0),
    held_out("w4-shift", 85.0),
    held_out("w4", 88.0),
    held_out("w4", 90.0, seed=1),
)
TASK_ROWS = (
    task_row("detection", "fp32", "torch-eager", map50_pct=80.0),
    task_row("detection", "w8a8", "openvino", map50_pct=79.5),
    task_row("segmentation", "fp32", "torch-eager", miou_pct=50.0),
)
LOG = ("epoch", "img_size", "window", "lr", "train_loss", "train_accuracy_pct", "val_loss",
       "val_accuracy_pct", "images_per_s", "peak_memory_mb", "seconds")  # fmt: skip
EPOCHS = ((1, 64, 64, 0.1, 2.1, 30, 1.9, 45, 99, 1, 60),
          (2, 256, 128, 0.1, 1.8, 40, 1.6, 35, 99, 1, 120),
          (3, 256, 256, 0.1, 1.7, 50, 1.5, 80, 99, 1, 180))  # fmt: skip


def write_run(folder, command, task="cifar10", **config):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"resolutions": "64:1,128/256:1,256:1", "precision": "fp32"} | config
    metrics = {"model": "mobilevit_xxs", "task": task, "parameters": 954_234, "epoch": 2,
               "val_accuracy_pct": 80.0, "test_accuracy_pct": 79.0, "train_s": 360.0,
               "hardware": "a CPU", "printed": "done", "config": config}  # fmt: skip
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "config.json", {"command": "python train.py --old", "command_now": command})
    with open(folder / "log.csv", "w", newline="") as file:
        csv.writer(file).writerows((LOG, *EPOCHS))


def bench(model, ms, cpu=AVX2, recipes=("fp32", "int8-nncf", "w7a8")):
    versions = {"torch-eager": "1", "openvino": "2", "nncf": "3"}
    return {
        "model": model,
        "cpu": cpu,
        "recipes": {name: RECIPES[name].asdict() for name in recipes},
        "engine_versions": versions,
        "latency_ms": {name: {"median": median} for name, median in ms.items()},
    }


TIMES = {"fp32@torch-eager": 20.0, "fp32@openvino": 10.0, "int8-nncf@nncf": 5.0}
BENCHMARKS = {
    "engines-mobilevit_xxs": bench("mobilevit_xxs", TIMES),
    "engines-mobilevit_xs": bench("mobilevit_xs", {"fp32@torch-eager": 40.0}),
    "engines-mobilevit_s-vnni": bench("mobilevit_s", {"fp32@openvino": 4.0}, VNNI),
    "profile-mobilevit_xxs-vnni": {
        "model": "mobilevit_xxs",
        "cpu": VNNI,
        "recipes": {name: RECIPES[name].asdict() for name in ("fp32", "w8a8")},
        "ms": {
            "fp32@openvino": {"Convolution FP32": 2, "FullyConnected FP32": 2, "Pad FP32": 1},
            "w8a8@openvino": {"Convolution INT8": 1, "FullyConnected INT8": 1, "Pad FP32": 1},
        },
    },
    "train": {
        "model": "mobilevit_xxs",
        "img_size": 256,
        "precision": "bf16",
        "hardware": "a CPU",
        "timm": "1.2",
        "images_per_s": {"ours": 40.0, "timm": 32.0, "fused attention": 20.0},
        "ratio": {"timm": 1.25, "fused attention": 2.0},
    },
    "loader": {
        "img_size": 256,
        "device": "cpu",
        "loader_images_per_s": {"none": 100.0},
        "training_images_per_s": 20.0,
    },
    "abuse": {"kinds": {"rows": {"inputs": 30, "faults": 2}, "logs": {"inputs": 7, "faults": 0}}},
    "ablations": {
        "img_size": 128,
        "batch_size": 64,
        "steps": 1000,
        "precision": "bf16",
        "n_val": 10_000,
        "trained_on": ["a GPU"],
        "variants": {
            name: {
                "title": name,
                "parameters": 10**6,
                "macs": 87_100_000,
                "val_accuracy_pct": found,
            }
            for name, found in {"base": [80, 82], "near": [81, 83.5], "far": [70, 72]}.items()
        },
    },
}


def report(recipe):
    noise = {"weights": {"stem.conv": 0.01}, "inputs": {"stem.conv.input": 0.5, "head": 0.1}}
    return {
        "checkpoint_sha256": sha256(WEIGHTS),
        "recipe": RECIPES[recipe].asdict(),
        "calibration": {"n": RECIPES[recipe].calibration_images},
        "noise": noise,
        "noise_of_rest": 0.0,
        "noise_of_all": 0.7,
        "largest": 2,
    }


def write_tree(root):
    """Results and runs of shipped weights, and pages with markers."""
    shipped = root / "checkpoints" / "mobilevit_xxs"
    write_run(shipped, "python train.py --seed 3", optimizer="muon", precision="bf16")
    (shipped / "best.pth").write_bytes(WEIGHTS)
    write_run(shipped / "history" / "run1", "python train.py --seed 2", widen="a.pth")
    for task in ("detection", "segmentation"):
        write_run(root / "checkpoints" / f"of_{task}", f"python train.py --task {task}", task)
    for content in (*ROWS, *TASK_ROWS):
        write_json(row_path(root / "results" / content["model"], content), content)
    for name, content in BENCHMARKS.items():
        write_json(root / "results" / "benchmarks" / f"{name}.json", content)
    for recipe in ("w8a8-early", "int8-fx"):
        folder = root / "results" / "mobilevit_xxs" / "per-layer"
        write_json(folder / f"{recipe}.json", report(recipe))
    for name, blocks in PAGES.items():
        text = "\n".join(f"<!-- begin:{b} -->\nold\n<!-- end:{b} -->" for b in blocks)
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"before\n{text}\nafter")


def flags(tree, what=None):
    """The options of plots.py for `tree`; `what` it does with the pages: --readme or --check."""
    folders = {"--results": "results", "--checkpoints": "checkpoints"}
    folders |= {"--pages": ""} if what else {}
    given = [part for flag, name in folders.items() for part in (flag, tree / name)]
    return [*given, what] if what else given


def load(tree):
    return load_results(tree / "results", tree / "checkpoints")


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))  # NaN, too
