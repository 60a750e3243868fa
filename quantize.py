"""Quantize checkpoints and measure each result: accuracy, file size, latency.

    python quantize.py --checkpoint checkpoints/mobilevit_xxs/best.pth  # published rows, 10 min
    python quantize.py --checkpoint A.pth --recipes w8a8 w4 --engines torch-eager openvino
    python quantize.py --checkpoint runs/mobilevit_xxs-synthetic/best.pth \\
        --calibration-images 256 --latency-runs 10                          # smoke, under a minute
    python quantize.py --checkpoint A.pth --recipes mixed-5bits         # 4 to 8 bits a layer
    python quantize.py --checkpoint A.pth --recipes w8a8 --per-layer    # which layers feel it
    python quantize.py --checkpoint A.pth --recipes w8a8 --profile      # every tensor, as a page
    python quantize.py --checkpoint A.pth --recipes w8a8 --profile --suggest  # what to except
    python quantize.py --checkpoint A.pth --recipes suggested.json      # a recipe from a file
    python quantize.py --checkpoint A.pth --recipes w4 --export exported  # files to use
    python quantize.py --checkpoint A.pth --recipes w8a8 --image photo.jpg  # what they see in it
    python quantize.py --from results/mobilevit_xxs/w8a8@openvino.json  # a row again, and compare
    python quantize.py --weights F.pth --model xxs --task imagefolder --data-dir DIR   # your own

Each (checkpoint, recipe, engine) becomes one file results/MODEL/RECIPE@ENGINE.json, MODEL followed
by the folder of the run for a checkpoint that does not ship. A row that is there already is kept,
unless it was made otherwise: that is an error. Accuracy, or mAP or mIoU of a detector or segmenter,
is on all test images and all cores, latency of one image on one thread. Prints one line a row and a
table at the end.
"""

from lab import cli

if __name__ == "__main__":
    cli.exit_on_signals()  # while the imports below take their seconds

import functools
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

import ptq
from lab import files, machine
from lab.cli import BadInput
from lab.engines import EngineMissing, require_formats
from lab.engines.measure import latency
from lab.engines.products import quantized_products
from lab.engines.registry import IN_TORCH, engines_for, row_kind
from lab.options import CLASSIFIERS_ONLY, parse_args
from lab.outputs import answered, export_files, prediction_text, write_reports
from lab.profiles import profile_folder, write_profile
from lab.recipes import calibration_images, recipe_of
from lab.repeats import repeat_of
from lab.report.compare import TOLERANCE, compare_rows
from lab.report.reading import has_vnni, in_protocol
from lab.report.rows import reusable_row, row_path, setting
from lab.report.tables import markdown, printed, products_text, results_table
from lab.subject import Subject, load_subject, named
from ptq import packing
from ptq.analysis.energy import energy_by_prices
from ptq.recipe import Recipe


@functools.lru_cache(maxsize=1)  # made once for all engines
def quantized(subject: Subject, recipe: Recipe, n_calibration: int | None) -> dict:
    """Return the subject's network quantized, and how it was made.

    It is calibrated on `n_calibration` images, or on as many as the recipe says.
    {"network", "batches", "calibration": description of its images, "seconds"}. A network with
    quantized layers is as it comes back from its packed file.
    """
    began = time.monotonic()
    with named(recipe.name):
        n = calibration_images(recipe, n_calibration)
        batches, described = subject.calibration_batches(recipe, n)
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


def measure(subject: Subject, recipe: Recipe, engine, made: dict, runs: int) -> dict:
    """Load the quantized network that was `made` into the engine; run, judge and time it."""
    began = time.monotonic()
    sample = subject.sample(subject.img_size)
    loaded = engine.load(made["network"], recipe, made["batches"], sample)
    quantize_s = made["seconds"] + time.monotonic() - began
    answers = answered(subject, loaded.run)

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
        **answers,
        "size_bytes": loaded.size_bytes,
        "size_is_estimate": loaded.size_is_estimate,
        "products": products,
        "energy": energy_by_prices(subject.network, recipe, sample),
        "latency_ms": times["row"],
        "fp32_latency_ms": times["fp32"],
        "calibration": made["calibration"],
        "quantize_s": quantize_s,
        "wall_s": made["seconds"] + time.monotonic() - began,
    }


def write_rows(pairs, args) -> int:
    """Measure and print the row of each (subject, recipe) on each engine; return an exit code.

    It is 1 or 2 if a row failed; the others went on.
    """
    done, status = [], 0
    numbers = [calibration_images(recipe, args.calibration_images) for _, recipe in pairs]
    for (subject, recipe), n in zip(pairs, numbers):
        for engine in engines_for(recipe, args.engines):
            found, code = attempted(subject, recipe, engine, n, args)
            status = max(status, code)
            if found is None:
                continue
            row, was_there = found
            done.append(row)
            print(printed(row) + kept(row) * was_there, flush=True)
            if row["products"]:
                print(products_text(row["products"]), flush=True)
    for part in (True, False):  # the published rows and ours, as in the README
        if shown := [row for row in done if in_protocol(row) is part]:
            print(f"\n{results_table(shown, done)}")
    if not done and not status:
        raise BadInput("nothing was measured: the engines asked for can't run here")
    return status


def attempted(subject: Subject, recipe: Recipe, engine, n: int, args) -> tuple:
    """Return what `row_of` gives and 0; where that fails, say why and return None and an exit code.

    It is 0 for an engine that is missing, 2 for bad input, 1 for what nobody foresaw.
    """
    what = f"{subject.name} {recipe.name}@{engine.NAME}"
    try:
        return row_of(subject, recipe, engine, n, args), 0
    except EngineMissing as missing:
        print(f"{what}: left out, {missing}")
        return None, 0
    except Exception as error:  # whatever it is, the other rows go on
        kind = ""
        if not isinstance(error, BadInput):
            traceback.print_exc()
            kind = f"{type(error).__name__}: "
        reason = str(error).split("\n")[0]
        print(f"{what}: failed, {kind}{reason}", file=sys.stderr)
        return None, 1 if kind else 2


def kept(row: dict) -> str:
    """Return what to say of a row that was there already."""
    uncommitted = ", measured by code that was not committed: --force measures again"
    return ", kept" + uncommitted * bool(row.get("dirty"))


def quantized_for(engine, subject: Subject, recipe: Recipe, n: int | None) -> dict:
    """Return what `quantized` gives; EngineMissing, before that work, if `engine` can't run it."""
    if not (recipe.peer or engine in IN_TORCH):
        require_formats(recipe)
    engine.version()  # which may be missing
    return quantized(subject, recipe, n)


def row_of(subject: Subject, recipe: Recipe, engine, n: int, args) -> tuple[dict, bool]:
    """Return a row, and whether it was there already; if not, it is measured and written."""
    same = subject.identity(recipe, engine.NAME, n, args.latency_runs)
    path = row_path(Path(args.output, subject.folder), same)
    row = None if args.force else reusable_row(path, same)
    if row is not None:
        return row, True
    made = quantized_for(engine, subject, recipe, n)
    row = same | measure(subject, recipe, engine, made, args.latency_runs)
    row |= machine.provenance()
    if not args.force and (there := reusable_row(path, same)):  # another command was faster
        return there, True
    files.write_json(path, row)
    return row, False


def show_predictions(pairs, args) -> None:
    """Print what each (subject, recipe) on each engine takes the picture of --image for.

    Where that is no single class, draw it.
    """
    from lab.pictures import picture_path, write_picture  # matplotlib takes a second to import

    drawn = {}
    others = [subject for subject, _ in pairs if not subject.classifies]
    paths = {s: picture_path(s, args.image, args.output, args.force) for s in others}
    for subject, recipe in pairs:
        x = subject.images.showing(args.image).inputs(subject.img_size)
        for engine in engines_for(recipe, args.engines):
            what = f"{subject.name} {recipe.name}@{engine.NAME}"
            try:
                made = quantized_for(engine, subject, recipe, args.calibration_images)
                with named(recipe.name):
                    loaded = engine.load(made["network"], recipe, made["batches"], x)
            except EngineMissing as missing:
                print(f"{what}: left out, {missing}")
                continue
            with torch.inference_mode():
                outputs = loaded.run(x)
            if subject.classifies:
                print(f"{what}: {prediction_text(outputs[0], subject.images.classes)}", flush=True)
            else:
                drawn.setdefault(subject, {})[f"{recipe.name}@{engine.NAME}"] = outputs
    for subject, outputs in drawn.items():
        write_picture(paths[subject], subject, args.image, outputs)


def repeat_rows(args) -> int:
    """Measure the rows of --from again, print them beside the shipped; return an exit code.

    It is 1 if a row differs, 1 or 2 if one failed; the others went on.
    """
    lines, status = [], 0
    repeats = [repeat_of(path, args) for path in args.rows]  # all, before the first is measured
    while repeats:
        shipped, subject, recipe, engine = repeats.pop(0)  # its images are not kept
        of_vnni = shipped["kind"] == "measured" and recipe.quantizes_inputs and has_vnni(shipped)
        if of_vnni and not machine.has_vnni():
            what = f"{shipped['model']} {recipe.name}@{engine.NAME}"
            print(f"{what}: not compared, it was measured on a CPU with VNNI")
            continue
        found, code = attempted(subject, recipe, engine, shipped["calibration_images"], args)
        status = max(status, code)
        if found is None:
            continue
        labels = subject.images.labels.tolist() if subject.classifies else []
        line, agree = compare_rows(shipped, found[0], labels)
        status = max(status, int(not agree))
        lines.append(line)
        print(printed(found[0]), flush=True)
    if not lines and not status:
        raise BadInput("nothing was compared: no row given can be measured here")
    if lines:
        print("\nShipped / measured here, on the images measured here:")
        print(f"{markdown(lines)}\n{TOLERANCE}")
    return status


def write_exports(pairs, args) -> int:
    """Write the network of each (subject, recipe) as files; return 1 if an engine disagrees."""
    for _, recipe in pairs:
        if not recipe.layers:
            raise BadInput(f"--export: recipe {recipe.name} has no quantized layers to write")
    paths = []
    for subject, recipe in pairs:
        name = f"{subject.folder}-{recipe.name}{setting(subject.img_size, subject.seed)}"
        paths.append(Path(args.export, name))
        for suffix in (".safetensors", ".onnx"):
            files.require_absent(paths[-1].with_name(name + suffix), args.force)
    status = 0
    for (subject, recipe), path in zip(pairs, paths):
        network = quantized(subject, recipe, args.calibration_images)["network"]
        agree = export_files(subject, recipe, network, path, args.workers)
        status = max(status, int(not agree))
    return status


def write_profiles(pairs, args) -> None:
    """Write what each recipe does to each tensor of its subject."""
    how = (args.output, args.force, args.suggest)
    folders = [profile_folder(*pair, *how) for pair in pairs]
    for (subject, recipe), folder in zip(pairs, folders):
        made = functools.partial(quantized, subject, n_calibration=args.calibration_images)
        write_profile(subject, recipe, folder, made, args.workers, args.suggest)


@cli.command
def main() -> int | None:
    args = parse_args(__doc__)
    machine.keep_freed_memory()
    if not args.image:
        files.require_writable(args.export or args.output)
    torch.set_num_threads(args.workers)
    if args.rows:
        return repeat_rows(args)
    settings = (args.data_dir, args.task, args.img_size, args.held_out, args.test_images, args.seed)
    if args.weights:
        subjects = [load_subject(args.weights, *settings, args.model, args.heads)]
    else:
        subjects = [load_subject(path, *settings) for path in args.checkpoint]
    by_folder = {}
    for subject in subjects:
        if args.model not in (None, subject.checkpoint["model"]):
            raise BadInput(f"{subject.path} holds {subject.checkpoint['model']}, not {args.model}")
        other = by_folder.setdefault(subject.folder, subject)
        if other is not subject:
            raise BadInput(f"{other.path} and {subject.path} would share the rows' folder")
        for option in CLASSIFIERS_ONLY:
            if getattr(args, option) and not subject.classifies:
                raise BadInput(
                    f"{cli.flags(option)} is for classifiers, {subject.path} is for {subject.task}"
                )
    recipes = dict.fromkeys(["fp32", *args.recipes]) if args.image else args.recipes
    pairs = [(subject, recipe_of(subject, name)) for subject in subjects for name in recipes]
    if args.per_layer:
        how = (args.output, args.calibration_images, args.workers, args.force)
        return write_reports(pairs, *how)
    if args.profile:
        return write_profiles(pairs, args)
    if args.image:
        return show_predictions(pairs, args)
    return write_exports(pairs, args) if args.export else write_rows(pairs, args)


if __name__ == "__main__":
    main()
