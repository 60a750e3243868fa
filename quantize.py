"""Quantize checkpoints and measure each result: accuracy, file size, latency.

    python quantize.py --checkpoint checkpoints/mobilevit_xxs/best.pth  # published rows, 10 min
    python quantize.py --checkpoint A.pth --recipes w8a8 w4 --engines torch-eager openvino
    python quantize.py --checkpoint runs/mobilevit_xxs-synthetic/best.pth \\
        --calibration-images 256 --latency-runs 10                          # smoke, under a minute
    python quantize.py --checkpoint A.pth --recipes w8a8 --per-layer    # which layers feel it
    python quantize.py --checkpoint A.pth --recipes w4 --export exported  # files to use
    python quantize.py --from results/mobilevit_xxs/w8a8@openvino.json  # a row again, and compare

Each (checkpoint, recipe, engine) becomes one file results/MODEL/RECIPE@ENGINE.json, MODEL followed
by the folder of the run for a checkpoint that is not in checkpoints/. A row that is there already,
made from the same weights with the same settings, is kept; one made otherwise is an error. A
checkpoint is evaluated on the data set it was trained for, at that run's image size unless
--img-size names another, on all test images and all cores; latency is one image on one thread.
Prints one line a row and a table at the end.
"""

import contextlib
import functools
import sys
import tempfile
import time
from pathlib import Path

import torch

import ptq
from lab import cli, files, machine
from lab.cli import BadInput
from lab.engines import EngineMissing, require, torch_eager
from lab.engines.measure import CPU_BATCH, latency, predict
from lab.engines.products import quantized_products
from lab.engines.registry import ENGINES, OURS, engines_for, row_kind
from lab.models import registered
from lab.report.rows import reusable_row, row_path, setting
from lab.report.studies import per_layer_table
from lab.report.tables import in_protocol, printed, products_text, results_table
from lab.subject import ADAPT_IMAGES, Subject, load_subject
from lab.tasks import TASKS
from lab.tasks.batches import EvalBatches
from mobilevit import MIN_IMG_SIZE
from ptq import RECIPES, packing
from ptq.analysis.sensitivity import sensitivities
from ptq.recipe import Recipe
from ptq.recipes.baselines import PROTOCOL

REPORT_IMAGES, REPORT_BATCH = 64, 16  # calibration images that a report per layer looks at


def parse_args():
    p = cli.parser(__doc__)
    what = p.add_argument_group("what to quantize")
    what.add_argument("--checkpoint", nargs="+", metavar="PATH", help="checkpoints to quantize")
    what.add_argument("--model", type=registered, help="the network that a checkpoint must hold")
    what.add_argument("--task", choices=TASKS, help="images to judge on, if not those trained on")
    what.add_argument("--data-dir", default="data", help="folder of the task's images")
    what.add_argument(
        "--img-size",
        type=int,
        help="input side in pixels; if the network was trained at another, its batch norms are "
        "adapted",
    )
    how = p.add_argument_group("how")
    how.add_argument(
        "--recipes",
        nargs="+",
        choices=RECIPES,
        default=[recipe.name for recipe in PROTOCOL],
        help="what to do to them",
    )
    how.add_argument(
        "--engines",
        nargs="+",
        choices=[engine.NAME for engine in OURS],
        default=[torch_eager.NAME],
        help="what executes them, but for recipes whose engine quantizes by itself",
    )
    how.add_argument("--calibration-images", type=int, help="instead of the number in the recipe")
    how.add_argument("--seed", type=int, default=0, help="of the choice of calibration images")
    judge = p.add_argument_group("how it is judged")
    judge.add_argument(
        "--test-images", type=int, help="only the first so many; such a row is not published"
    )
    judge.add_argument(
        "--held-out",
        action="store_true",
        help="evaluate on the held-out training images, to choose on",
    )
    judge.add_argument("--latency-runs", type=int, default=100, help="timed calls per row")
    judge.add_argument(
        "--workers", type=int, default=torch.get_num_threads(), help="threads that evaluate"
    )
    out = p.add_argument_group("what comes of it")
    out.add_argument("--output", default="results", help="folder of the result files")
    out.add_argument("--force", action="store_true", help="measure and replace rows that are there")
    out.add_argument(
        "--per-layer",
        action="store_true",
        help="in place of rows: how much each single weight and input that a recipe quantizes "
        "changes the logits",
    )
    out.add_argument(
        "--export",
        metavar="FOLDER",
        help="in place of rows: write the quantized networks there, as packed safetensors and ONNX",
    )
    args = p.parse_args()
    if args.img_size is not None and args.img_size < MIN_IMG_SIZE:
        p.error(f"--img-size must be at least {MIN_IMG_SIZE}")
    for name in ("calibration_images", "test_images", "latency_runs", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    cli.check_seed(p, args.seed)
    if args.per_layer and args.export:
        p.error("--per-layer and --export exclude each other")
    if args.per_layer or args.export:
        if args.held_out or args.test_images or args.engines != [torch_eager.NAME]:
            p.error("--per-layer and --export exclude --held-out, --test-images and --engines")
    return args


def quantized(subject: Subject, recipe: Recipe, n_calibration: int) -> dict:
    """The subject's network quantized, as it comes back from its packed file, and how it was made.

    {"network", "batches", "calibration": description of its images, "seconds"}
    """
    began = time.monotonic()
    with named(recipe):
        batches, described = subject.calibration_batches(recipe, n_calibration)
        network = ptq.quantize(subject.network, recipe, batches)
        if recipe.layers:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "weights.safetensors")
                packing.save(network, recipe, path)
                network, _ = packing.load(path, subject.network)
    return {
        "network": network,
        "batches": batches,
        "calibration": described,
        "seconds": time.monotonic() - began,
    }


def measure(subject: Subject, recipe: Recipe, engine, made: dict, workers: int, runs: int) -> dict:
    """Load the quantized network that was `made` into the engine, run, judge and time it."""
    began = time.monotonic()
    sample = subject.sample(subject.img_size)
    loaded = engine.load(made["network"], recipe, made["batches"], sample)
    quantize_s = made["seconds"] + time.monotonic() - began

    images = EvalBatches(subject.images, subject.img_size, CPU_BATCH)
    logits, labels = predict(loaded.run, images, workers)
    if not logits.isfinite().all():
        raise BadInput("the logits are not finite")
    predictions = logits.argmax(1)
    n_correct = int((predictions == labels).sum())

    trained_at = subject.sample(subject.checkpoint["img_size"])
    timed = {"row": lambda: loaded.run(sample), "fp32": lambda: subject.model(trained_at)}
    times = latency(timed, runs)

    products = loaded.products
    if products and recipe.layers:
        products = products | {"asked": quantized_products(made["network"])}
    return {
        "checkpoint": str(subject.path),
        "classes": list(subject.images.classes),
        "engine_version": engine.version(),
        "kind": row_kind(recipe, engine),
        "n_correct": n_correct,
        "score": {"accuracy_pct": 100 * n_correct / len(labels)},
        "predictions": predictions.tolist(),
        "confusion": confusion(labels, predictions, len(subject.images.classes)),
        "size_bytes": loaded.size_bytes,
        "size_is_estimate": loaded.size_is_estimate,
        "products": products,
        "latency_ms": times["row"],
        "fp32_latency_ms": times["fp32"],
        "calibration": made["calibration"],
        "quantize_s": quantize_s,
        "wall_s": made["seconds"] + time.monotonic() - began,
    }


def confusion(labels, predictions, n: int) -> list[list[int]]:
    """Images of each of `n` true classes (outer) that were given each class (inner)."""
    return torch.bincount(n * labels + predictions, minlength=n**2).view(n, n).tolist()


def identity(subject: Subject, recipe: Recipe, engine, n_calibration: int, runs: int) -> dict:
    """What makes a row the same row: asked for again, it need not be measured again."""
    return {
        "model": subject.name,
        "task": subject.task,
        "split": subject.split,
        "img_size": subject.img_size,
        "checkpoint_sha256": subject.sha256,
        "recipe": recipe.asdict(),
        "engine": engine.NAME,
        "seed": subject.seed,
        "calibration_images": n_calibration,
        "adapt_images": ADAPT_IMAGES if subject.adapts else None,
        "n_images": len(subject.images),
        "latency_runs": runs,
    }


@contextlib.contextmanager
def named(recipe: Recipe):
    """Name the recipe that weights or calibration images are no good for."""
    try:
        yield
    except ValueError as error:
        raise BadInput(f"recipe {recipe.name}: {error}") from error


def write_rows(pairs, args) -> int:
    """The row of each (subject, recipe) on each engine; 1 or 2 if one failed, and the others went
    on."""
    done, status = [], 0
    for subject, recipe in pairs:
        n = recipe.calibration_images and (args.calibration_images or recipe.calibration_images)
        make = functools.cache(functools.partial(quantized, subject, recipe, n))  # once for all
        for engine in engines_for(recipe, args.engines):
            what = f"{subject.name} {recipe.name}@{engine.NAME}"
            try:
                row, was_there = row_of(subject, recipe, engine, make, n, args)
            except EngineMissing as missing:
                print(f"{what}: left out, {missing}")
                continue
            except Exception as error:  # whatever it is, the other rows go on
                status = max(status, 2 if isinstance(error, BadInput) else 1)
                kind = "" if isinstance(error, BadInput) else f"{type(error).__name__}: "
                reason = str(error).split("\n")[0]
                print(f"{what}: failed, {kind}{reason}", file=sys.stderr)
                continue
            done.append(row)
            print(printed(row) + ", kept" * was_there, flush=True)
            if row["products"]:
                print(products_text(row["products"]), flush=True)
    for part in (True, False):  # the published rows and ours, as in the README
        if shown := [row for row in done if in_protocol(row) is part]:
            print(f"\n{results_table(shown, done)}")
    if not done and not status:
        raise BadInput("nothing was measured: the engines asked for can't run here")
    return status


def row_of(subject: Subject, recipe: Recipe, engine, make, n: int, args) -> tuple[dict, bool]:
    """A row that is there already, or one that is measured and written; whether it was there."""
    if not (recipe.peer or engine is torch_eager or recipe.exportable):
        raise EngineMissing("ONNX has no such formats")
    same = identity(subject, recipe, engine, n, args.latency_runs)
    path = row_path(Path(args.output, subject.folder), same)
    row = None if args.force else reusable_row(path, same)
    if row is not None:
        return row, True
    engine.version()  # before long work: it may be missing
    row = same | measure(subject, recipe, engine, make(), args.workers, args.latency_runs)
    row |= machine.provenance()
    files.write_json(path, row)
    return row, False


def write_reports(pairs, args) -> int:
    """A report per layer of each (subject, recipe) as a file; prints its most sensitive tensors."""
    jobs = []
    for subject, recipe in pairs:
        name = f"{recipe.name}{setting(subject.img_size, subject.seed)}.json"
        path = Path(args.output, subject.folder, "per-layer", name)
        jobs.append((subject, recipe, report_fn(recipe), path))
        if path.exists() and not args.force:
            raise BadInput(f"{path} is there already: --force replaces it")
    for subject, recipe, noises, path in jobs:
        try:
            report = per_layer_report(subject, recipe, noises, args)
        except EngineMissing as missing:
            raise BadInput(f"--per-layer, {recipe.name}: {missing}") from missing
        files.write_json(path, report)
        print(f"{path}, in {report['wall_s']:.0f} s\n{per_layer_table(report)}", flush=True)
    return 0


def report_fn(recipe: Recipe):
    """The function that says how much each single tensor that a recipe quantizes matters."""
    found = sensitivities if recipe.layers and recipe.calibration_images else None
    if recipe.peer:
        found = getattr(ENGINES[recipe.peer], "sensitivities", None)
    if found is None:
        raise BadInput(
            f"--per-layer is for int8-fx and what calibrates layers, {recipe.name} is neither"
        )
    return found


def per_layer_report(subject: Subject, recipe: Recipe, noises, args) -> dict:
    """Noise in the logits from each single tensor that a recipe quantizes."""
    began = time.monotonic()
    n = args.calibration_images or recipe.calibration_images
    batches, described = subject.calibration_batches(recipe, n)
    shown = EvalBatches(batches.data[:REPORT_IMAGES], subject.img_size, REPORT_BATCH)

    def logits(network):
        return predict(network, shown, args.workers)[0]

    with named(recipe):
        found = noises(subject.network, recipe, batches, logits)
    return {
        "model": subject.name,
        "img_size": subject.img_size,
        "checkpoint_sha256": subject.sha256,
        "recipe": recipe.asdict(),
        "seed": subject.seed,
        **found,
        "n_images": len(shown.data),
        "calibration": described,
        "wall_s": time.monotonic() - began,
        **machine.provenance(),
    }


def write_exports(pairs, args) -> int:
    """The network of each (subject, recipe), packed and, where ONNX can hold it, as QDQ ONNX."""
    for _, recipe in pairs:
        if not recipe.layers:
            raise BadInput(f"--export: recipe {recipe.name} has no quantized layers to write")
    try:
        require("onnx", "onnxscript")
        from ptq.export import to_onnx
    except EngineMissing as missing:
        to_onnx = None
        print(f"ONNX files are left out: {missing}")
    for subject, recipe in pairs:
        n = recipe.calibration_images and (args.calibration_images or recipe.calibration_images)
        network = quantized(subject, recipe, n)["network"]
        sample = subject.sample(subject.img_size)
        written = {".safetensors": functools.partial(packing.save, network, recipe)}
        if to_onnx and recipe.exportable:
            written[".onnx"] = functools.partial(to_onnx, network, sample)
        for suffix, write in written.items():
            name = f"{recipe.name}{setting(subject.img_size, subject.seed)}{suffix}"
            path = Path(args.export, f"{subject.folder}-{name}")
            with files.atomic(path) as tmp:
                write(tmp)
            print(f"{path}, {path.stat().st_size / files.MB:.2f} MB", flush=True)
    return 0


@cli.command
def main():
    args = parse_args()
    machine.keep_freed_memory()
    files.require_writable(args.export or args.output)
    torch.set_num_threads(args.workers)
    settings = (args.data_dir, args.task, args.img_size, args.held_out, args.test_images, args.seed)
    subjects = [load_subject(path, *settings) for path in args.checkpoint]
    folders = {}
    for subject in subjects:
        if args.model not in (None, subject.checkpoint["model"]):
            raise BadInput(f"{subject.path} holds {subject.checkpoint['model']}, not {args.model}")
        other = folders.setdefault(subject.folder, subject)
        if other is not subject:
            raise BadInput(
                f"rows of {other.path} and {subject.path} would share {subject.folder}: keep the "
                "checkpoints in folders of different names"
            )
    pairs = []
    for subject in subjects:
        for name in args.recipes:
            with named(RECIPES[name]):
                pairs.append((subject, ptq.recipe(name, subject.network)))
    write = write_reports if args.per_layer else write_exports if args.export else write_rows
    sys.exit(write(pairs, args))


if __name__ == "__main__":
    main()
