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
from ptq import RECIPES, recipe
from ptq.analysis import mixed
from ptq.recipes.baselines import PROTOCOL

# What comes in place of rows, and the options that it excludes.
EXCLUDED = {
    "per_layer": ("held_out", "test_images", "engines", "latency_runs"),
    "profile": ("engines", "latency_runs"),
    "image": ("held_out", "test_images", "latency_runs"),
    "export": ("held_out", "test_images", "engines", "latency_runs", "output"),
}
CLASSIFIERS_ONLY = ("per_layer", "profile")


def recipe_name(text: str) -> str:
    """Return `text` if a recipe has this name, or for a mixed precision's budget or a JSON file.

    It is the type of --recipes: ArgumentTypeError for other text.
    """
    if text.endswith(".json"):
        return text
    if not text.startswith(mixed.PREFIX):
        try:
            return recipe(text).name
        except ValueError:
            return cli.known(RECIPES, "recipe")(text)  # says which names are close
    try:
        mixed.parse_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def parse_args(doc: str):
    """Return the options on the command line, checked together; `doc` is the help's text."""
    p = cli.parser(doc)
    add = p.add_argument_group("what to quantize").add_argument
    add("--checkpoint", nargs="+", metavar="PATH", help="checkpoints to quantize")
    add("--weights", metavar="FILE", help="mere weights of --model, ours or others'")
    help = "rows to measure again, by their own settings, and to compare"
    add("--from", dest="rows", nargs="+", metavar="ROW", help=help)
    add("--model", type=registered, help="the network that the file must hold")
    add("--heads", type=cli.at_least(1), help="attention heads of --weights, if not the usual")
    add("--task", choices=TASKS, help="images to judge on, if not those trained on")
    add("--data-dir", default="data", help="folder of the task's images")
    help = (
        "input side in pixels; if the network was trained at another, its batch norms are adapted"
    )
    add("--img-size", type=cli.at_least(MIN_IMG_SIZE, MAX_IMG_SIZE), help=help)

    add = p.add_argument_group("how").add_argument
    help = (
        f"what to do to them: {', '.join(RECIPES)}; behind a name may stand an observer (-kl) or "
        "-tensor for one scale a weight; 4 to 8 bits a layer within a budget of the "
        "file, energy or time, as mixed-5bits, mixed-700000bytes, mixed-0.4mJ or mixed-9ms; or a "
        "JSON file with a recipe"
    )
    published = [recipe.name for recipe in PROTOCOL]
    add("--recipes", nargs="+", type=recipe_name, default=published, help=help)
    names = [engine.NAME for engine in OURS + ON_GPU]
    help = "what executes them, but for recipes whose engine quantizes by itself"
    add("--engines", nargs="+", choices=names, default=[torch_eager.NAME], help=help)
    help = "instead of the number in the recipe"
    add("--calibration-images", type=cli.at_least(1), help=help)
    add("--seed", type=cli.seed, default=0, help="of the choice of calibration images")

    add = p.add_argument_group("how it is judged").add_argument
    help = "only the first so many; such a row is left out of the pages"
    add("--test-images", type=cli.at_least(1), help=help)
    help = "evaluate on the images that the run held out, to choose on"
    add("--held-out", action="store_true", help=help)
    help = "timed calls per row"
    add("--latency-runs", type=cli.at_least(1, 10**6), default=100, help=help)
    threads = {"type": cli.at_least(1, 1024), "default": torch.get_num_threads()}
    add("--workers", **threads, help="CPU threads that quantize and evaluate")

    add = p.add_argument_group("what comes of it").add_argument
    add("--output", help="folder of the result files (default: results; with --from: runs/results)")
    add("--force", action="store_true", help="replace what is there")
    help = (
        "in place of rows: how much each single weight and input that a recipe quantizes changes "
        "the logits"
    )
    add("--per-layer", action="store_true", help=help)
    help = (
        "in place of rows: a page, tables and histograms of what the recipe does to each tensor, "
        "on training images, and the accuracy by class"
    )
    add("--profile", action="store_true", help=help)
    help = (
        "with --profile: also a recipe that makes exceptions of the worst tensors, as many as "
        "halve the noise in the outputs on held-out images, 16-bit if not told"
    )
    add("--suggest", nargs="?", choices=EXCEPTIONS, const="16-bit", help=help)
    help = (
        "in place of rows: what the network and each quantized one take this picture for; of "
        "detectors and segmenters, a PNG of what they see in it"
    )
    add("--image", metavar="FILE", help=help)
    help = "in place of rows: write the quantized networks there, as packed safetensors and ONNX"
    add("--export", metavar="FOLDER", help=help)
    cli.refused(p, "--calibration-batches", why="counts batches: give --calibration-images")
    args = p.parse_args()
    settle(p, args)
    return args


def settle(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that exclude each other or lack another; complete --output and --force."""

    def given(names) -> list[str]:
        return [name for name in names if getattr(args, name) != p.get_default(name)]

    if [args.checkpoint, args.weights, args.rows].count(None) != 2:
        p.error("give one of --checkpoint, --weights and --from")
    if args.weights and not args.model:
        p.error("--weights needs --model: the name of the network that they are for")
    if args.heads and not args.weights:
        p.error("--heads goes with --weights: a checkpoint holds its own")
    if args.rows:
        settings = ("recipes", "engines", "task", "img_size", "model", "calibration_images", "seed")
        if found := given((*settings, "held_out", *EXCLUDED, "force")):
            p.error(f"--from takes all from the row, {cli.flags(found[0])} excluded")
        args.force = True  # what is there is what the last call measured
    modes = given(EXCLUDED)
    if len(modes) > 1:
        p.error(f"{cli.flags(*EXCLUDED)} exclude each other")
    for mode in modes:
        if given(EXCLUDED[mode]):
            p.error(f"{cli.flags(mode)} excludes {cli.flags(*EXCLUDED[mode])}")
    args.output = args.output or ("runs/results" if args.rows else "results")
    if args.suggest and not args.profile:
        p.error("--suggest goes with --profile")
    if args.suggest and args.weights:
        p.error("--suggest chooses on the images that a run held out: --weights has none")
