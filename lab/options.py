"""The options of quantize.py."""

import argparse

import torch

from lab import cli
from lab.engines import torch_eager
from lab.engines.registry import ON_GPU, OURS
from lab.models import registered
from lab.models.checkpoint import MAX_IMG_SIZE
from lab.profiles import EXCEPTIONS
from lab.tasks import TASKS
from mobilevit import MIN_IMG_SIZE
from ptq import RECIPES
from ptq.analysis import mixed
from ptq.recipes.baselines import PROTOCOL

# What comes in place of rows, and the options that it excludes.
EXCLUDED = {
    "per_layer": ("held_out", "test_images", "engines"),
    "profile": ("engines",),
    "image": ("held_out", "test_images"),
    "export": ("held_out", "test_images", "engines"),
}
CLASSIFIERS_ONLY = ("per_layer", "profile")


def flags(*names: str) -> str:
    """Names of options as they are typed, in a list."""
    *first, last = (f"--{name.replace('_', '-')}" for name in names)
    return f"{', '.join(first)} and {last}" if first else last


def recipe_name(text: str) -> str:
    """The type of --recipes: a name in RECIPES, a budget for mixed precision, or a JSON file."""
    if text.endswith(".json"):
        return text
    if not text.startswith(mixed.PREFIX):
        return cli.known(RECIPES, "recipe")(text)
    try:
        mixed.parse_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def parse_args(doc: str):
    """The options on the command line, checked together; `doc` is the help's text."""
    p = cli.parser(doc)
    what = p.add_argument_group("what to quantize")
    what.add_argument("--checkpoint", nargs="+", metavar="PATH", help="checkpoints to quantize")
    what.add_argument("--weights", metavar="FILE", help="mere weights of --model, ours or others'")
    what.add_argument(
        "--from",
        dest="rows",
        nargs="+",
        metavar="ROW",
        help="rows to measure again, by their own settings, and to compare",
    )
    what.add_argument("--model", type=registered, help="the network that the file must hold")
    what.add_argument(
        "--heads", type=cli.at_least(1), help="attention heads of --weights, if not the usual"
    )
    what.add_argument("--task", choices=TASKS, help="images to judge on, if not those trained on")
    what.add_argument("--data-dir", default="data", help="folder of the task's images")
    what.add_argument(
        "--img-size",
        type=cli.at_least(MIN_IMG_SIZE, MAX_IMG_SIZE),
        help="input side in pixels; if the network was trained at another, its batch norms are "
        "adapted",
    )
    how = p.add_argument_group("how")
    how.add_argument(
        "--recipes",
        nargs="+",
        type=recipe_name,
        default=[recipe.name for recipe in PROTOCOL],
        help=f"what to do to them: {', '.join(RECIPES)}; 4 to 8 bits a layer within a budget of "
        "the file, energy or time, as mixed-5bits, mixed-700000bytes, mixed-0.4mJ or mixed-9ms; or "
        "a JSON file with a recipe",
    )
    how.add_argument(
        "--engines",
        nargs="+",
        choices=[engine.NAME for engine in OURS + ON_GPU],
        default=[torch_eager.NAME],
        help="what executes them, but for recipes whose engine quantizes by itself",
    )
    how.add_argument(
        "--calibration-images", type=cli.at_least(1), help="instead of the number in the recipe"
    )
    how.add_argument("--seed", type=cli.seed, default=0, help="of the choice of calibration images")
    judge = p.add_argument_group("how it is judged")
    judge.add_argument(
        "--test-images",
        type=cli.at_least(1),
        help="only the first so many; such a row is not published",
    )
    judge.add_argument(
        "--held-out",
        action="store_true",
        help="evaluate on the images that the run held out, to choose on",
    )
    judge.add_argument(
        "--latency-runs", type=cli.at_least(1, 10**6), default=100, help="timed calls per row"
    )
    judge.add_argument(
        "--workers",
        type=cli.at_least(1, 1024),
        default=torch.get_num_threads(),
        help="threads that evaluate",
    )
    out = p.add_argument_group("what comes of it")
    help = "folder of the result files (default: results; with --from: runs/results)"
    out.add_argument("--output", help=help)
    out.add_argument("--force", action="store_true", help="measure and replace rows that are there")
    out.add_argument(
        "--per-layer",
        action="store_true",
        help="in place of rows: how much each single weight and input that a recipe quantizes "
        "changes the logits",
    )
    out.add_argument(
        "--profile",
        action="store_true",
        help="in place of rows: a page, tables and histograms of what the recipe does to each "
        "tensor, on training images, and the accuracy by class",
    )
    out.add_argument(
        "--suggest",
        nargs="?",
        choices=EXCEPTIONS,
        const="16-bit",
        help="with --profile: also a recipe that makes exceptions of the worst tensors, as many as "
        "halve the noise in the outputs on held-out images, 16-bit if not told",
    )
    out.add_argument(
        "--image",
        metavar="FILE",
        help="in place of rows: what the network and each quantized one take this picture for; of "
        "detectors and segmenters, a PNG of what they see in it",
    )
    out.add_argument(
        "--export",
        metavar="FOLDER",
        help="in place of rows: write the quantized networks there, as packed safetensors and ONNX",
    )
    cli.refused(p, "--calibration-batches", why="counts batches: give --calibration-images")
    args = p.parse_args()
    if [args.checkpoint, args.weights, args.rows].count(None) != 2:
        p.error("give one of --checkpoint, --weights and --from")
    if args.weights and not args.model:
        p.error("--weights needs --model: the name of the network that they are for")
    if args.heads and not args.weights:
        p.error("--heads goes with --weights: a checkpoint holds its own")
    if args.rows:
        settings = ("recipes", "engines", "task", "img_size", "model", "calibration_images", "seed")
        for name in (*settings, "held_out", "per_layer", "profile", "image", "export", "force"):
            if getattr(args, name) != p.get_default(name):
                p.error(f"--from takes all from the row, {flags(name)} excluded")
        args.force = True  # what is there is what the last call measured
    args.output = args.output or ("runs/results" if args.rows else "results")
    modes = [mode for mode in EXCLUDED if getattr(args, mode)]
    if len(modes) > 1:
        p.error(f"{flags(*EXCLUDED)} exclude each other")
    for mode in modes:
        for name in EXCLUDED[mode]:
            if getattr(args, name) != p.get_default(name):
                p.error(f"{flags(mode)} excludes {flags(*EXCLUDED[mode])}")
    if args.suggest and not args.profile:
        p.error("--suggest goes with --profile")
    if args.suggest and args.weights:
        p.error("--suggest chooses on the images that a run held out: --weights has none")
    return args
