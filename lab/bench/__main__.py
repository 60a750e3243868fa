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

import json
import sys
from pathlib import Path

import torch

from lab import files, machine
from lab.bench import ablations, abuse, quantization, training
from lab.cli import above, at_least
from lab.models import registered
from lab.models.checkpoint import MAX_IMG_SIZE
from lab.training.schedule import MAX_EPOCHS
from mobilevit import MIN_IMG_SIZE
from ptq import RECIPES


def _of_training(args) -> dict:
    names = ("model", "img_size", "batch_size", "precision", "device", "seconds")
    return {name: getattr(args, name) for name in names}


def _of_ablations(args) -> dict:
    names = ("variants", "seeds", "epochs", "task", "data_dir", "img_size", "batch_size")
    how = ("precision", "device", "runs", "jobs")
    return {name: getattr(args, name) for name in (*names, *how)}


BENCHMARKS = {
    "train": lambda args: training.train(**_of_training(args)),
    "loader": lambda args: training.loader(**_of_training(args), data_dir=args.data_dir),
    "engines": lambda args: quantization.engines(args.checkpoint, args.recipes, args.latency_runs),
    "profile": lambda args: quantization.profile(args.checkpoint, args.latency_runs),
    "tensorrt": lambda args: quantization.tensorrt(args.checkpoint, args.latency_runs),
    "abuse": lambda args: abuse.abuse(args.inputs, args.kills, args.seed),
    "ablations": lambda args: ablations.ablations(**_of_ablations(args)),
}
IN_TRAINING = ("train", "loader", "ablations")  # on a GPU if there is one
OF_NETWORKS = ("engines", "profile", "tensorrt")  # a file for each model


def parse_args():
    p = cli.parser(__doc__)
    p.add_argument("what", choices=BENCHMARKS)
    p.add_argument("--output", default="results/benchmarks", help="folder of the result files")

    add = p.add_argument_group("train, loader and ablations").add_argument
    size = at_least(MIN_IMG_SIZE, MAX_IMG_SIZE)
    add("--img-size", type=size, help="input side in pixels (default: 256; ablations: 128)")
    help = "images a training step (default: 32, or 256 on a GPU; ablations: 128)"
    add("--batch-size", type=at_least(2), help=help)
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--precision", choices=cli.PRECISIONS, help="default: as train.py's")
    help = "folder of cifar-10-batches-py, for loader and ablations"
    add("--data-dir", default="data", help=help)

    add = p.add_argument_group("train and loader").add_argument
    add("--model", default="mobilevit_xxs", type=registered, help="the network to train")
    add("--seconds", type=above(0), help="of each round (default: 8, or 1 on a GPU)")

    add = p.add_argument_group("ablations").add_argument
    kinds, help = list(ablations.VARIANTS), "what to train beside the base"
    add("--variants", nargs="+", choices=kinds, default=kinds, metavar="NAME", help=help)
    add("--seeds", type=at_least(2, 100), default=3, help="how many runs of each")
    add("--epochs", type=above(0, MAX_EPOCHS), default=10, help="of each run")
    add("--task", choices=("cifar10", "synthetic"), default="cifar10", help="what to train on")
    help = "folder of the runs: a finished one is kept, and one that was stopped goes on"
    add("--runs", default="runs/ablations", help=help)
    add("--jobs", type=at_least(1, 100), default=1, help="runs side by side")

    add = p.add_argument_group("engines, profile and tensorrt").add_argument
    add("--checkpoint", default="checkpoints/mobilevit_xxs/best.pth", help="the network to run")
    add("--latency-runs", type=at_least(1, 10**6), default=100, help="timed calls")
    known, help = cli.known(RECIPES, "recipe"), "what engines times"
    add("--recipes", nargs="+", type=known, default=quantization.TIMED, help=help)

    add = p.add_argument_group("abuse").add_argument
    add("--inputs", type=at_least(0, 10**6), default=600, help="malformed inputs to try")
    add("--kills", type=at_least(0, 10**6), default=60, help="kills of training and quantize.py")
    add("--seed", type=cli.seed, default=0, help="of the choice of inputs and of the kills' times")

    args = p.parse_args()
    args.device = cli.device(p, args.device)
    on_gpu = args.device == "cuda"  # which is paid by the minute, and idle with few images
    side, batch_size = (128, 128) if args.what == "ablations" else (256, 256 if on_gpu else 32)
    args.img_size, args.batch_size = args.img_size or side, args.batch_size or batch_size
    args.seconds = args.seconds or (1 if on_gpu else 8)
    args.precision = cli.precision(p, args.precision, args.device)
    return args


@cli.command
def main():
    args = parse_args()
    machine.keep_freed_memory()
    files.require_writable(args.output)
    result = BENCHMARKS[args.what](args)
    on_gpu = args.what == "tensorrt" or (args.device == "cuda" and args.what in IN_TRAINING)
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
