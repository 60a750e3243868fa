"""What the parts of MobileViT are worth: networks without one, trained alike, with several seeds.

Every run is train.py's own. It takes the same number of steps, all of as many pixels, and is judged
once, at its end, on a fifth of the training images, which no run learns from.
"""

import math
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from lab.bench.forked import ROOT
from lab.cli import BadInput
from lab.models import build
from lab.report.ablations import BASE, ablations_table
from lab.report.runs import read_metrics
from lab.tasks import TASKS
from lab.tasks.sampler import Sampler
from lab.training.options import parse_args
from lab.training.run import changed_options
from lab.training.start import network_settings
from ptq.analysis.energy import count

VARIANTS = {  # name -> what it is, and the options of train.py that make it so
    BASE: ("MobileViT XXS: patches of 2x2 pixels, one head", "--model mobilevit_xxs"),
    "mv2": (
        "MV2 blocks of equal MACs in place of MobileViT blocks",
        "--model mobilevit_xxs_mv2 --settings side={img_size}",
    ),
    "transformer": ("transformers without convolutions", "--model mobilevit_xxs_transformer"),
    "unfused": ("the input of a block not fused with its output", "--model mobilevit_xxs_unfused"),
    "patch-1": ("patches of one pixel", "--settings patches=1"),
    "patch-4": ("patches of 4x4 pixels", "--settings patches=4"),
    "heads-2": ("two heads", "--settings heads=2"),
    "heads-4": ("four heads", "--settings heads=4"),
    "multi-scale": ("images of several sides", "--multi-scale"),
}
HELD_OUT = 0.2  # of the training images
WARM_UP = 0.1  # of the steps
POLL_S = 0.1  # seconds from one look at the runs to the next


def ablations(
    variants: list[str],
    seeds: int,
    epochs: float,
    task: str,
    data_dir: str,
    img_size: int,
    batch_size: int,
    precision: str,
    device: str,
    runs: str,
    jobs: int,
) -> dict:
    """Train the base and `variants`, keys of VARIANTS, with each seed; return how they are judged.

    What is judged is accuracy in percent on held-out images. Also prints a table.
    `epochs` are those of a run on images of one side. `runs` is the folder of the runs' folders: a
    run that has its metrics.json stays as it is, whatever device made it, and one that was stopped
    goes on. `jobs`: runs side by side. BadInput for an image size that does not fit the patches.
    """
    names = [name for name in VARIANTS if name in (BASE, *variants)]
    multiple = 32 * (4 if "patch-4" in names else 2)
    if img_size % multiple:
        raise BadInput(f"--img-size {img_size} does not fit the patches: {multiple} must divide it")
    images = TASKS[task].load(data_dir, train=True)
    val_size = int(HELD_OUT * len(images))
    alike = {
        "task": task,
        "data-dir": data_dir,
        "val-size": val_size,
        "augment": "crop-flip",
        "batch-size": batch_size,
        "precision": precision,
        "device": device,
    }
    sampled = len(images) - val_size, batch_size
    steps = max(1, round(epochs * steps_per_epoch(*sampled, multi_scale=False)))
    options = {name: VARIANTS[name][1].format(img_size=img_size) for name in names}
    folders = {name: [Path(runs, f"{name}-seed{i}") for i in range(seeds)] for name in names}
    commands = []
    for seed in range(seeds):  # all variants once, then all again
        for name in names:
            per_epoch = steps_per_epoch(*sampled, multi_scale="--multi-scale" in options[name])
            given = alike | schedule(steps / per_epoch, img_size) | {"seed": seed}
            arguments = to_train(options[name], given, folders[name][seed])
            if not finished(folders[name][seed], arguments):
                commands.append([sys.executable, str(ROOT / "train.py"), *arguments])
    run_all(commands, jobs)

    metrics = {name: [read_metrics(folder) for folder in folders[name]] for name in names}
    of_all = [of_run for of_variant in metrics.values() for of_run in of_variant]
    result = {
        "task": task,
        "img_size": img_size,
        "batch_size": batch_size,
        "steps": steps,
        "precision": precision,
        "n_val": val_size,
        "seeds": list(range(seeds)),
        "trained_on": sorted({of_run["hardware"] for of_run in of_all}),
        "commits": sorted({str(of_run.get("commit")) for of_run in of_all}),
        "variants": {
            name: {
                "title": VARIANTS[name][0],
                "options": options[name],
                "parameters": of_variant[0]["parameters"],
                "macs": macs(of_variant[0]["config"], len(images.classes), img_size),
                "val_accuracy_pct": [of_run["val_accuracy_pct"] for of_run in of_variant],
                "train_s": [of_run["train_s"] for of_run in of_variant],
            }
            for name, of_variant in metrics.items()
        },
    }
    print(ablations_table([result]))
    return result


def steps_per_epoch(n_images: int, batch_size: int, multi_scale: bool) -> int:
    """Return the number of training steps in which each of `n_images` comes once, at most."""
    sampler = Sampler(n_images, batch_size, seed=0, multi_scale=multi_scale)
    if not sampler.rounds:
        raise BadInput(f"--batch-size {batch_size} is too large for {n_images} images")
    return sampler.steps_per_epoch


def schedule(epochs: float, img_size: int) -> dict:
    """Return options of train.py for a run of so many epochs, with one validation at its end."""
    return {
        "resolutions": f"{img_size}:{epochs:.9g}",
        "warmup-epochs": f"{WARM_UP * epochs:.9g}",
        "validate-every": math.ceil(epochs),
    }


def to_train(options: str, given: dict, folder: Path) -> list[str]:
    """Return what train.py is told to train in `folder`, or to go on there."""
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    resume = ["--resume"] if (folder / "last.pth").exists() else []
    return [*options.split(), *flags, "--output", str(folder), *resume]


def finished(folder: Path, arguments: list[str]) -> bool:
    """Say whether `folder` has the metrics.json of this run, on any device.

    BadInput if it has that of another run.
    """
    if not (folder / "metrics.json").exists():
        return False
    found, asked = read_metrics(folder)["config"], vars(parse_args("", arguments))
    alike = {k: v for k, v in asked.items() if k in found and k != "device"}
    if changed := changed_options(found, alike):
        raise BadInput(f"{folder} has a run with {changed}: choose another --runs")
    return True


def run_all(commands: list[list[str]], jobs: int) -> None:
    """Run commands, `jobs` side by side; the first that fails ends all, with its exit code."""
    running = []

    def wait():
        """Return when at least one has ended, whichever that is."""
        while all(process.poll() is None for process in running):
            time.sleep(POLL_S)
        for process in [process for process in running if process.poll() is not None]:
            running.remove(process)
            if process.returncode < 0:
                raise BadInput(f"a run was killed by {signal.Signals(-process.returncode).name}")
            if process.returncode:  # it has said why
                sys.exit(process.returncode)

    try:
        for i, argv in enumerate(commands, start=1):
            if len(running) == jobs:
                wait()
            print(f"run {i} of {len(commands)}: {shlex.join(argv[1:])}", flush=True)
            running.append(subprocess.Popen(argv))
        while running:
            wait()
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def macs(config: dict, n_classes: int, img_size: int) -> int:
    """Count multiply-accumulates for an image of the network that a run's `config` names."""
    model = build(config["model"], num_classes=n_classes, **network_settings(config["settings"]))
    layers, _ = count(model.eval(), torch.zeros(1, 3, img_size, img_size))
    return sum(layer.macs for layer in layers.values())
