"""Benchmarks behind the README's claims of speed, each side by side in one run.

    python -m lab.bench train     # training images/s at 256x256, ours against others, 6 min on a CPU
    python -m lab.bench loader    # images/s of the loader, against what the model takes, 1 min
    python -m lab.bench engines   # latency of methods and engines, all in turn, 5 to 7 min
    python -m lab.bench profile   # where OpenVINO spends these milliseconds, under a minute
    python -m lab.bench sweep     # a tenth of the sweep, ours against the published way, 6 min

Each prints what it writes: results/benchmarks/NAME.json, or, for engines and profile,
NAME-VARIANT.json, and NAME-VARIANT-vnni.json on CPUs with VNNI. Only ratios carry over to other
machines.
"""

import json
import math
from pathlib import Path

import torch

from lab import cli, files, machine
from lab.bench import quantization, training
from lab.models import registered
from mobilevit import MIN_IMG_SIZE

BENCHMARKS = {
    "train": training.train,
    "loader": training.loader,
    "engines": quantization.engines,
    "profile": quantization.profile,
    "sweep": quantization.sweep,
}
OF_NETWORKS = ("engines", "profile")  # a file for each variant


def parse_args():
    p = cli.parser(__doc__)
    add = p.add_argument
    add("what", choices=BENCHMARKS)
    add("--model", default="mobilevit_xxs", type=registered, help="for train and loader")
    add("--img-size", type=int, default=256, help="input side in pixels, for train and loader")
    add("--batch-size", type=int, default=32, help="images a training step, for train and loader")
    add("--seconds", type=float, default=8, help="of each round, for train and loader")
    add("--device", choices=("cpu", "cuda"), help="for train and loader (default: cuda if any)")
    add(
        "--precision",
        choices=cli.PRECISIONS,
        help="for train and loader (default: as train.py's)",
    )
    add(
        "--checkpoint",
        default="checkpoints/mobilevit_xxs/best.pth",
        help="for sweep, engines and profile",
    )
    add("--test-images", type=int, default=960, help="for sweep: about a tenth of the whole")
    add("--calibration-images", type=int, default=384, help="for sweep: about a tenth")
    add(
        "--latency-runs",
        type=int,
        help="timed calls (default: 10 for sweep, a tenth; else 100)",
    )
    add("--data-dir", default="data", help="folder of cifar-10-batches-py")
    add("--output", default="results/benchmarks", help="folder of the result files")
    args = p.parse_args()
    args.device = cli.device(p, args.device)
    args.precision = cli.precision(p, args.precision, args.device)
    if args.latency_runs is None:
        args.latency_runs = {"sweep": 10}.get(args.what, 100)
    if args.img_size < MIN_IMG_SIZE:
        p.error(f"--img-size must be at least {MIN_IMG_SIZE}")
    if not 0 < args.seconds < math.inf:
        p.error("--seconds must be above 0")
    lows = {"batch_size": 2, "test_images": 1, "calibration_images": 1, "latency_runs": 1}
    for name, low in lows.items():
        if getattr(args, name) < low:
            p.error(f"--{name.replace('_', '-')} must be at least {low}")
    return args


@cli.command
def main():
    args = parse_args()
    machine.keep_freed_memory()
    files.require_writable(args.output)
    result = BENCHMARKS[args.what](args)
    on_gpu = args.device == "cuda" and args.what in ("train", "loader")
    device = torch.cuda.get_device_name() if on_gpu else machine.cpu_name()
    print(json.dumps(result, indent=1))
    name = args.what
    if name in OF_NETWORKS:  # and whether integers are faster hangs on VNNI
        name += f"-{result['model']}" + "-vnni" * machine.has_vnni()
    path = Path(args.output, f"{name}.json")
    files.write_json(path, result | {"hardware": device} | machine.provenance())
    print(path)


if __name__ == "__main__":
    main()
