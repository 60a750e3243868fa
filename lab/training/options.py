"""The options of train.py, and what they must be together."""

import argparse
from pathlib import Path

from lab import cli
from lab.cli import above, at_least, within
from lab.models import NAMES, default_img_size, registered, require_task, run_name
from lab.models.checkpoint import MAX_IMG_SIZE
from lab.tasks import TASKS, classification
from lab.tasks.batches import loader_workers
from lab.training.evaluation import TRAINABLE
from lab.training.optimizer import OPTIMIZERS
from lab.training.schedule import MAX_EPOCHS, parse_resolutions
from mobilevit import MIN_IMG_SIZE

# Options that act on the images, labels and losses of classification alone.
OF_CLASSIFICATION = ("val_size", "erase", "jpeg", "mixup", "cutmix", "label_smoothing", "teacher")
# Options that a resumed run may be given anew, and those that are not about a run.
NOT_IN_CONFIG = (
    *("amp", "data_dir", "max_minutes", "output", "resume", "tensorboard", "workers"),
    *("eval", "checkpoint", "weights", "finish"),
)
WARM_UP = 10  # epochs, unless told otherwise


def parse_args(doc: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options of train.py, complete and checked.

    `doc` is the docstring of train.py. `argv` stands in for the command line's arguments.
    """
    p = cli.parser(doc)
    add = p.add_argument_group("data").add_argument
    help = "synthetic needs no download; imagefolder is for --eval --weights"
    add("--task", choices=(*TRAINABLE, "imagefolder"), default="cifar10", help=help)
    help = "folder of the task's images; CIFAR-10 is downloaded there if absent"
    add("--data-dir", default="data", help=help)
    help = "training images held out to choose on (default: 2000; synthetic: 200)"
    add("--val-size", type=at_least(1), help=help)
    kinds = sorted({kind for name in TRAINABLE for kind in TASKS[name].objective.AUGMENT})
    help = "autoaugment, of 32x32 images, comes after crop-flip (default: the most that a task has)"
    add("--augment", choices=kinds, help=help)
    add("--erase", type=within(0, 1), default=0.0, help="probability of erasing a part of an image")
    help = "probability of storing an image as JPEG, at a random quality"
    add("--jpeg", type=within(0, 1), default=0.0, help=help)
    add("--mixup", type=within(0, 100), default=0.0, help="alpha of mixing two images; 0: do not")
    help = "alpha of swapping patches of two images; 0: do not"
    add("--cutmix", type=within(0, 100), default=0.0, help=help)
    help = "loader processes (default: 0 on CPU, up to 8 on CUDA)"
    add("--workers", type=at_least(0, 128), help=help)

    network = p.add_argument_group("network")
    add = network.add_argument
    add("--model", default="mobilevit_xxs", type=registered, help=f"a network: {NAMES}")
    help = "what else the network takes: NAME=NUMBER or NAME=NUMBER,NUMBER,..."
    add("--settings", nargs="+", metavar="NAME=NUMBER", help=help)
    add("--heads", type=at_least(1), help="attention heads in every block, not the variant's")
    add = network.add_mutually_exclusive_group().add_argument
    add("--init", metavar="CHECKPOINT", help="start from these weights")
    add("--widen", metavar="CHECKPOINT", help="start from a narrower variant's weights")
    add("--pretrained", action="store_true", help="start from timm's ImageNet weights (four heads)")

    add = p.add_argument_group("schedule").add_argument
    help = "passes over the training images (100 unless --resolutions)"
    add("--epochs", type=at_least(1, MAX_EPOCHS), help=help)
    help = (
        "train as many epochs as fit into this time, from the start of the command to the end of "
        "the test; replaces --epochs, and the epochs of --resolutions are then shares"
    )
    add("--minutes", type=above(0), help=help)
    help = "input side in pixels (the network's own unless --resolutions: 256 for MobileViT)"
    add("--img-size", type=at_least(MIN_IMG_SIZE, MAX_IMG_SIZE), help=help)
    help = (
        "in place of --epochs and --img-size: 64:8,128/256:4,256:0.5 is 8 epochs at 64 pixels, "
        "then 4 on 128-pixel windows of 256-pixel images, then half a one at 256"
    )
    add("--resolutions", help=help)
    add("--batch-size", type=at_least(1), default=128, help="images a step, over all processes")
    help = "sides from 5/8 to 5/4 of the schedule's, drawn anew each step, in batches of equal cost"
    # None, as runs have it that began before there was this option.
    add("--multi-scale", action="store_true", default=None, help=help)
    add("--lr", type=above(0, 10), default=2e-3, help="peak learning rate")
    add("--min-lr", type=within(0, 10), default=0.0, help="floor that the cosine falls to")
    help = "epochs from one validation to the next"
    add("--validate-every", type=at_least(1, MAX_EPOCHS), default=1, metavar="EPOCHS", help=help)
    help = f"linear warm-up of the rate (default: {WARM_UP}, with --minutes at most a tenth of all)"
    add("--warmup-epochs", "--warmup", type=within(0, MAX_EPOCHS), help=help)

    optimizer = p.add_argument_group("optimizer")
    add = optimizer.add_argument
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="sgd: with momentum")
    decay = {"type": within(0, 10), "default": 0.01, "help": "not on norms and biases"}
    add("--weight-decay", "--wd", **decay)
    help = "share spread over all classes (default: 0.1 where images are classified)"
    smoothing = {"type": within(0, 0.99), "help": help}
    add("--label-smoothing", "--label-smooth", **smoothing)
    add("--clip-norm", type=above(0), default=1.0, help="largest norm of the gradient")
    help = "average the weights for evaluation; 0: do not"
    add("--ema-decay", type=within(0, 0.99999), default=0.0, help=help)
    add("--teacher", metavar="CHECKPOINT", help="learn from this network's answers, too")
    help = "share of the teacher's part in the loss"
    add("--teacher-weight", type=within(0, 1), default=0.5, help=help)
    help = "both networks' logits are divided by it in the teacher's part of the loss"
    add("--temperature", type=within(0.1, 100), default=2.0, help=help)
    add("--compile", action="store_true", help="torch.compile the model")
    add = optimizer.add_mutually_exclusive_group().add_argument
    help = "mixed precision of whatever the device has: BF16, or FP16 on older GPUs"
    add("--amp", action="store_true", help=help)
    help = "autocast to this (default: fp32 on CPU, as --amp on CUDA)"
    add("--precision", choices=cli.PRECISIONS, help=help)

    add = p.add_argument_group("run").add_argument
    add("--seed", type=cli.seed, default=0, help="of initialisation, shuffling and augmentation")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--output", help="folder of the run (default: runs/MODEL)")
    add("--resume", action="store_true", help="continue the run in --output")
    help = "end the run in --output as it stands: test the weights chosen so far"
    add("--finish", action="store_true", help=help)
    add("--max-minutes", type=above(0), help="stop cleanly after this time, to be resumed")
    add("--tensorboard", action="store_true", help="also log to --output/tensorboard")
    help = "print what --checkpoint, or --weights, reaches on the test images and stop"
    add("--eval", action="store_true", help=help)
    add("--checkpoint", help="the checkpoint for --eval")
    help = "mere weights of --model for --eval, ours or others', on --task imagefolder"
    add("--weights", metavar="FILE", help=help)
    why = "is not known: the best epoch is kept anyway, and --epochs or --max-minutes end a run"
    cli.refused(p, "--patience", why=why)

    args = p.parse_args(argv)
    settle(p, args)
    args.device = cli.device(p, args.device)
    args.precision = cli.precision(p, args.precision, args.device, args.amp)
    if args.workers is None:
        args.workers = loader_workers(args.device)
    args.output = Path(args.output or f"runs/{run_name(args.model, args.task)}")
    return args


def settle(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that exclude each other; make one schedule of --resolutions or the others."""
    if [args.checkpoint, args.weights].count(None) != (1 if args.eval else 2):
        p.error("--eval and one of --checkpoint and --weights go together")
    if args.weights and TASKS[args.task].objective is not classification:
        p.error("--eval --weights judges classifiers: quantize.py --weights takes other networks")
    if (args.task == "imagefolder") != bool(args.weights):
        p.error("--task imagefolder and --weights go together: photos are not trained on")
    which = ("weights", "model", "heads", "task") if args.weights else ("checkpoint",)
    for option, named, *more in (("eval", *which), ("finish", "output")):
        taken = (option, named, *more, "data_dir", "device")
        other = [k for k, v in vars(args).items() if k not in taken and v != p.get_default(k)]
        if vars(args)[option] and other:
            excluded = cli.flags(other[0])
            p.error(f"--{option} takes all else from the --{named}, {excluded} excluded")
    settle_task(p, args)
    if args.resolutions is not None and (args.img_size, args.epochs) != (None, None):
        p.error("--resolutions replaces --img-size and --epochs")
    if args.minutes and args.epochs:
        p.error("--minutes replaces --epochs")
    if args.resolutions is None:
        epochs = 1 if args.minutes else args.epochs or 100
        args.resolutions = f"{args.img_size or default_img_size(args.model)}:{epochs}"
    stages = parse_resolutions(args.resolutions, shares=bool(args.minutes))
    args.img_size, args.epochs = stages[-1].img_size, sum(stage.epochs for stage in stages)
    if args.minutes is None:
        if args.warmup_epochs is None:
            args.warmup_epochs = WARM_UP
        if args.warmup_epochs >= args.epochs:
            p.error(f"--warmup-epochs must be less than the {args.epochs} epochs")
    if TASKS[args.task].objective is not classification:
        if any(stage.side != stage.img_size for stage in stages):
            p.error(f"--resolutions with windows is not for --task {args.task}")
    if args.min_lr > args.lr:
        p.error("--min-lr must not be above --lr")
    if args.batch_size == 1 and args.task in ("detection", "segmentation"):
        p.error(f"--batch-size 1 is not for --task {args.task}: batch norms may see one value")
    if args.batch_size == 1 and any(stage.side == MIN_IMG_SIZE for stage in stages):
        p.error(f"--batch-size 1 needs more than {MIN_IMG_SIZE} pixels: batch norms see one value")
    if args.multi_scale and any(s.side % 8 or s.side * 5 / 8 < MIN_IMG_SIZE for s in stages):
        p.error("--multi-scale needs sides that 8 divides, of at least 56 pixels")
    if args.multi_scale and args.batch_size < 16:
        p.error("--multi-scale needs batches of at least 16 images")
    for name in ("teacher_weight", "temperature"):
        if not args.teacher and getattr(args, name) != p.get_default(name):
            p.error(f"{cli.flags(name)} goes with --teacher")
    if args.pretrained and args.heads is not None:
        p.error("--pretrained excludes --heads")


def settle_task(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what the task does not know; give its defaults to options that depend on it."""
    require_task(args.model, args.task)
    task = TASKS[args.task]
    kinds = task.objective.AUGMENT
    args.augment = args.augment or kinds[-1]
    if args.augment not in kinds:
        p.error(f"--augment {args.augment} is not for --task {args.task}: {', '.join(kinds)}")
    if task.objective is classification:
        if args.label_smoothing is None:
            args.label_smoothing = 0.1
        args.val_size = args.val_size or (2000 if args.task == "cifar10" else 200)
        return
    given = [option for option in OF_CLASSIFICATION if vars(args)[option]]
    if given:
        p.error(f"{cli.flags(given[0])} is not for --task {args.task}")
    args.label_smoothing = 0.0
