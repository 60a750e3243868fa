"""What the options of train.py must be together."""

import argparse

from lab.models import default_img_size
from lab.training.schedule import parse_resolutions
from mobilevit import MIN_IMG_SIZE


def settle(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that exclude each other; make one schedule of --resolutions or the others."""
    if args.eval != (args.checkpoint is not None):
        p.error("--eval and --checkpoint go together")
    taken = ("eval", "checkpoint", "data_dir", "device")
    other = [k for k, v in vars(args).items() if k not in taken and v != p.get_default(k)]
    if args.eval and other:
        p.error(f"--eval takes all from the checkpoint, --{other[0].replace('_', '-')} excluded")
    if args.resolutions is not None and (args.img_size, args.epochs) != (None, None):
        p.error("--resolutions replaces --img-size and --epochs")
    if args.resolutions is None:
        args.resolutions = f"{args.img_size or default_img_size(args.model)}:{args.epochs or 100}"
    stages = parse_resolutions(args.resolutions)
    args.img_size, args.epochs = stages[-1].img_size, sum(stage.epochs for stage in stages)
    if args.warmup_epochs >= args.epochs:
        p.error(f"--warmup-epochs must be less than the {args.epochs} epochs")
    if args.min_lr > args.lr:
        p.error("--min-lr must not be above --lr")
    if args.batch_size == 1 and any(stage.side == MIN_IMG_SIZE for stage in stages):
        p.error(f"--batch-size 1 needs more than {MIN_IMG_SIZE} pixels: batch norms see one value")
    if args.pretrained and args.heads is not None:
        p.error("--pretrained excludes --heads")
