"""Quantize checkpoints and measure each result: accuracy, file size, latency.

    python quantize.py --checkpoint checkpoints/mobilevit_xxs/best.pth  # published rows, 10 min
    python quantize.py --checkpoint A.pth --recipes w8a8 w4 --engines torch-eager openvino
    python quantize.py --checkpoint A.pth B.pth --recipes fp32 int8-fx
    python quantize.py --checkpoint runs/mobilevit_xxs-synthetic/best.pth \\
        --calibration-images 256 --latency-runs 10                          # smoke, under a minute
    python quantize.py --checkpoint A.pth --recipes w8a8 --per-layer    # which layers feel it
    python quantize.py --checkpoint A.pth --recipes w4 --export exported  # files to use

Each (checkpoint, recipe, engine) becomes one file results/MODEL/RECIPE@ENGINE.json, MODEL followed
by the folder of the run for a checkpoint that is not in checkpoints/. A row that is there already,
made from the same weights with the same settings, is kept; one made otherwise is an error. A
checkpoint is evaluated on the data set it was trained for, at that run's image size unless
--img-size names another, on all test images and all cores; latency is one image on one thread.
Prints one line a row and a table at the end.
"""

import functools
import sys
from pathlib import Path

import torch

from lab import cli, files, machine
from lab.cli import BadInput
from lab.engines import EngineMissing, require, torch_eager
from lab.engines.registry import ENGINES, engines_for
from lab.report.rows import kept
from lab.report.studies import per_layer_table
from lab.report.tables import in_protocol, printed, products_text, results_table
from lab.subject import Workbench, looks_into
from mobilevit import MIN_IMG_SIZE
from ptq import RECIPES, packing
from ptq.recipes.baselines import PROTOCOL


def parse_args():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("--checkpoint", nargs="+", required=True, metavar="PATH", help="checkpoints to quantize")
    add(
        "--recipes",
        nargs="+",
        choices=RECIPES,
        default=[r.name for r in PROTOCOL],
        help="what to do to them",
    )
    add(
        "--engines",
        nargs="+",
        choices=ENGINES,
        default=[torch_eager.NAME],
        help="what executes them, but for int8-*, which their engines quantize themselves",
    )
    add("--data-dir", default="data", help="folder of cifar-10-batches-py, downloaded if absent")
    add(
        "--img-size",
        type=int,
        help="input side in pixels; if the network was trained at another, its batch norms are "
        "adapted",
    )
    add("--calibration-images", type=int, help="instead of the number in the recipe")
    add("--test-images", type=int, help="only the first so many; such a row is not published")
    add(
        "--held-out",
        action="store_true",
        help="evaluate on the held-out training images, to choose on; such a row is not published",
    )
    add("--latency-runs", type=int, default=100, help="timed calls per row")
    add("--seed", type=int, default=0, help="of the choice of calibration images")
    add("--workers", type=int, default=torch.get_num_threads(), help="threads that evaluate")
    add("--output", default="results", help="folder of the result files")
    add("--force", action="store_true", help="measure and replace rows that are there already")
    add(
        "--per-layer",
        action="store_true",
        help="in place of rows: how much each single weight and input that a recipe quantizes "
        "changes the logits",
    )
    add(
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
    exports = args.export is not None
    if args.per_layer and exports:
        p.error("--per-layer and --export exclude each other")
    if args.per_layer or exports:
        if args.held_out or args.test_images or args.engines != [torch_eager.NAME]:
            p.error("--per-layer and --export exclude --held-out, --test-images and --engines")
    return args


def write_reports(pairs, args) -> int:
    """A report per layer of each (bench, recipe), one file each, and its most sensitive tensors."""
    for bench, recipe in pairs:
        if not looks_into(recipe):
            raise BadInput(
                f"--per-layer is for int8-fx and what calibrates layers, {recipe.name} is neither"
            )
        if bench.report_path(recipe).exists() and not args.force:
            raise BadInput(f"{bench.report_path(recipe)} is there already: --force replaces it")
    for bench, recipe in pairs:
        try:
            report, path = bench.report(recipe), bench.report_path(recipe)
        except EngineMissing as missing:
            raise BadInput(f"--per-layer, {recipe.name}: {missing}") from missing
        files.write_json(path, report)
        print(f"{path}, in {report['wall_s']:.0f} s\n{per_layer_table(report)}", flush=True)
    return 0


def write_exports(pairs, args) -> int:
    """The network of each (bench, recipe), packed and, where ONNX can hold it, as QDQ ONNX."""
    for _, recipe in pairs:
        if not recipe.layers:
            raise BadInput(f"--export: recipe {recipe.name} has no quantized layers to write")
    try:
        require("onnx", "onnxscript")
        from ptq.export import to_onnx
    except EngineMissing as missing:
        to_onnx = None
        print(f"ONNX files are left out: {missing}")
    for bench, recipe in pairs:
        network = bench.prepare(recipe).network
        files = {".safetensors": functools.partial(packing.save, network, recipe)}
        if to_onnx and recipe.exportable:
            files[".onnx"] = functools.partial(to_onnx, network, bench.sample)
        for suffix, write in files.items():
            name = f"{bench.folder().name}-{recipe.name}{bench.setting()}{suffix}"
            path = Path(args.export, name)
            with files.atomic(path) as tmp:
                write(tmp)
            checked = f", {bench.parity(recipe, path)}" if suffix == ".onnx" else ""
            print(f"{path}, {path.stat().st_size / files.MB:.2f} MB{checked}", flush=True)
    return 0


def write_rows(pairs, args) -> int:
    """The row of each (bench, recipe) on each engine; 1 or 2 if one failed, and the others went
    on."""
    jobs = [(*pair, engine) for pair in pairs for engine in engines_for(pair[1], args.engines)]
    done, status = [], 0
    for bench, recipe, engine in jobs:
        path, what = bench.row_path(recipe, engine), f"{bench.name} {recipe.name}@{engine.NAME}"
        try:
            if not (recipe.peer or engine is torch_eager or recipe.exportable):
                raise EngineMissing("ONNX has no such formats")
            row = None if args.force else kept(path, bench.identity(recipe, engine))
            was_there = row is not None
            if not was_there:
                row = bench.measure(recipe, engine)
                files.write_json(path, row)
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


@cli.command
def main():
    args = parse_args()
    machine.keep_freed_memory()
    exports = args.export is not None
    files.require_writable(args.export if exports else args.output)
    torch.set_num_threads(args.workers)
    benches = [Workbench(path, args) for path in args.checkpoint]
    folders = {}
    for bench in benches:
        other = folders.setdefault(bench.folder(), bench.path)
        if other is not bench.path:
            raise BadInput(
                f"rows of {other} and {bench.path} would share {bench.folder()}: keep the "
                "checkpoints in folders of different names"
            )
    pairs = [(bench, RECIPES[name]) for bench in benches for name in args.recipes]
    write = write_reports if args.per_layer else write_exports if exports else write_rows
    sys.exit(write(pairs, args))


if __name__ == "__main__":
    main()
