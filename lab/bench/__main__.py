"""Benchmarks behind the README's claims of speed, each side by side in one run.

    python -m lab.bench train     # training images/s at 256x256, ours against others, 6 minutes
    python -m lab.bench loader    # images/s of the loader, against what the model takes, 1 minute
    python -m lab.bench engines   # latency of methods and engines, all in turn, 5 to 7 minutes
    python -m lab.bench profile   # where OpenVINO spends these milliseconds, under a minute
    python -m lab.bench tensorrt  # latency of 8 bits and of FP32 on TensorRT, for an NVIDIA GPU
    python -m lab.bench abuse     # malformed inputs and kills through the commands, 4 minutes
    python -m lab.bench ablations  # what parts of MobileViT are worth: 27 short training runs

Each prints what it writes: results/benchmarks/NAME.json, for train and loader on a GPU
NAME-cuda.json, or, for engines, profile and tensorrt, NAME-MODEL.json, and NAME-MODEL-vnni.json on
CPUs with VNNI. Of speeds, only ratios carry over to other machines. Exit code 1: something failed.
Of engines it is one of them, and the others are timed all the same; of abuse, something ended
otherwise than docs/robustness.md says.
"""

from lab import cli

if __name__ == "__main__":
    cli.exit_on_signals()  # while the imports below take their seconds

import argparse
import json
import re
import sys
from pathlib import Path

import torch

from lab import files, machine
from lab.bench import ablations, abuse, quantization, training
from lab.cli import above, at_least
from lab.models import registered, require_mobilevit
from lab.models.checkpoint import MAX_IMG_SIZE
from lab.training.schedule import MAX_EPOCHS
from mobilevit import MIN_IMG_SIZE
from ptq import RECIPES

BENCHMARKS = {  # functions of a benchmark's own options
    "train": training.train,
    "loader": training.loader,
    "engines": quantization.engines,
    "profile": quantization.profile,
    "tensorrt": quantization.tensorrt,
    "abuse": abuse.abuse,
    "ablations": ablations.ablations,
}
ABOUT = dict(re.findall(r"lab\.bench (\w+) +# (.+)", __doc__))
OF_SPEED = ("train", "loader")
IN_TRAINING = (*OF_SPEED, "ablations")  # on a GPU if there is one
OF_NETWORKS = ("engines", "profile", "tensorrt")  # a file for each model


def parse_args() -> argparse.Namespace:
    """Return `what` to measure, where its file goes (`output`), and the options of this benchmark.

    The latter have the names of its function's parameters.
    """
    p = cli.parser(__doc__)
    parsers = p.add_subparsers(dest="what", metavar="BENCHMARK", required=True)
    of = {k: parsers.add_parser(k, help=ABOUT[k], description=ABOUT[k]) for k in BENCHMARKS}
    help = "folder of the result files (default: results/benchmarks)"
    for parser in (p, *of.values()):  # it may stand before the benchmark's name, too
        parser.add_argument("--output", default=argparse.SUPPRESS, help=help)

    def add(benchmarks, option: str, **how) -> None:
        for name in benchmarks:
            of[name].add_argument(option, **how)

    size, help = at_least(MIN_IMG_SIZE, MAX_IMG_SIZE), "input side in pixels"
    add(OF_SPEED, "--img-size", type=size, default=256, help=help)
    add(["ablations"], "--img-size", type=size, default=128, help=help)
    help = "images a training step"
    add(OF_SPEED, "--batch-size", type=at_least(2), help=f"{help} (default: 32, or 256 on a GPU)")
    add(["ablations"], "--batch-size", type=at_least(2), default=128, help=help)
    add(IN_TRAINING, "--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add(IN_TRAINING, "--precision", choices=cli.PRECISIONS, help="default: as train.py's")
    help = "folder of cifar-10-batches-py"
    add(("loader", "ablations"), "--data-dir", default="data", help=help)

    help = "the network to train, a MobileViT"
    add(OF_SPEED, "--model", default="mobilevit_xxs", type=registered, help=help)
    add(OF_SPEED, "--seconds", type=above(0), help="of each round (default: 8, or 1 on a GPU)")

    add = of["ablations"].add_argument
    kinds, help = list(ablations.VARIANTS), "what to train beside the base"
    add("--variants", nargs="+", choices=kinds, default=kinds, metavar="NAME", help=help)
    add("--seeds", type=at_least(2, 100), default=3, help="how many runs of each")
    add("--epochs", type=above(0, MAX_EPOCHS), default=10, help="of each run")
    add("--task", choices=("cifar10", "synthetic"), default="cifar10", help="what to train on")
    help = "folder of the runs: a finished one is kept, and one that was stopped goes on"
    add("--runs", default="runs/ablations", help=help)
    add("--jobs", type=at_least(1, 100), default=1, help="runs side by side")

    for name in OF_NETWORKS:
        add, best = of[name].add_argument, "checkpoints/mobilevit_xxs/best.pth"
        add("--checkpoint", default=best, help="the network to run")
        calls = {"dest": "n_calls", "metavar": "N", "type": at_least(1, 10**6), "default": 100}
        add("--latency-runs", **calls, help="timed calls")
    known = {"dest": "names", "metavar": "NAME", "type": cli.known(RECIPES, "recipe")}
    add = of["engines"].add_argument
    add("--recipes", nargs="+", **known, default=quantization.TIMED, help="what is timed")

    add, n = of["abuse"].add_argument, {"metavar": "N", "type": at_least(0, 10**6)}
    add("--inputs", dest="n_inputs", **n, default=600, help="malformed inputs to try")
    add("--kills", dest="n_kills", **n, default=60, help="kills of training and quantize.py")
    add("--seed", type=cli.seed, default=0, help="of the choice of inputs and of the kills' times")

    args = p.parse_args(namespace=argparse.Namespace(output="results/benchmarks"))
    if args.what in IN_TRAINING:
        args.device = cli.device(p, args.device)
        args.precision = cli.precision(p, args.precision, args.device)
    if args.what in OF_SPEED:
        require_mobilevit(args.model, f"lab.bench {args.what}")
        on_gpu = args.device == "cuda"  # which is paid by the minute, and idle with few images
        args.batch_size = args.batch_size or (256 if on_gpu else 32)
        args.seconds = args.seconds or (1 if on_gpu else 8)
    return args


def measured(args) -> dict:
    """Return what the benchmark `args.what` gives with its options."""
    options = {k: v for k, v in vars(args).items() if k not in ("what", "output")}
    return BENCHMARKS[args.what](**options)


@cli.command
def main():
    args = parse_args()
    machine.keep_freed_memory()
    files.require_writable(args.output)
    result = measured(args)
    on_gpu = args.what == "tensorrt" or (args.what in IN_TRAINING and args.device == "cuda")
    device = torch.cuda.get_device_name() if on_gpu else machine.cpu_name()
    name = args.what
    if name in OF_NETWORKS:  # and whether integers are faster hangs on VNNI
        vnni = machine.has_vnni() and not on_gpu
        name += f"-{result['model']}" + "-vnni" * vnni
    elif on_gpu and name != "ablations":  # of speeds, those of a CPU are kept beside it
        name += "-cuda"
    path = Path(args.output, f"{name}.json")
    files.write_json(path, result | {"hardware": device} | machine.provenance())
    print(json.dumps(result, indent=1))  # last, for a reader that stops reading ends the program
    print(path)
    if result.get("faults"):
        sys.exit(1)


if __name__ == "__main__":
    main()
