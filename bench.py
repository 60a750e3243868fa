"""Benchmarks behind the README's claims of speed, each side by side in one run.

    python bench.py train     # training images/s at 256x256, ours against others', 3 min on a CPU
    python bench.py loader    # images/s that the loader makes, against what the model takes, 1 min
    python bench.py engines   # latency of methods and engines, all in turn, 15 min
    python bench.py profile   # where OpenVINO spends these milliseconds, under a minute
    python bench.py sweep     # a tenth of the sweep, ours against the published way, 6 min

Each prints what it writes: results/benchmarks/NAME.json, or, for engines and profile on CPUs with
VNNI, NAME-vnni.json. Only ratios carry over to other machines.
"""

import contextlib
import functools
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision import transforms

import data
import ptq
import rows
from augment import POLICIES, Augmentation
from engines import (
    EngineMissing,
    latency,
    nncf_openvino,
    openvino_bf16,
    openvino_cpu,
    torch_eager,
    torch_fx,
)
from engines.registry import engines_for
from mobilevit import MIN_IMG_SIZE, VARIANTS, MobileViT
from ptq import RECIPES
from ptq.recipes import PROTOCOL
from rows import BadInput
from weights import model_from_checkpoint

ROUNDS = 5  # of each contender, taking turns
PROFILED = (
    ("fp32", openvino_cpu),
    ("int8-nncf", openvino_cpu),
    ("w8a8", openvino_cpu),
    ("w8a8", openvino_bf16),
)


def parse_args():
    p = rows.parser(__doc__)
    add = p.add_argument
    add("what", choices=BENCHMARKS)
    add("--variant", default="xxs", choices=VARIANTS, help="for train and loader")
    add("--img-size", type=int, default=256, help="input side in pixels, for train and loader")
    add("--batch-size", type=int, default=32, help="images a training step, for train and loader")
    add("--seconds", type=float, default=8, help="of each round, for train and loader")
    add("--device", choices=("cpu", "cuda"), help="for train and loader (default: cuda if any)")
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
    args.device = rows.device(p, args.device)
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


def trainer(model, batches, args, memory_format=torch.channels_last, fused=True):
    """A training step as a function: the loop that all contenders share. `batches` yields (input,
    labels) on the device."""
    model = model.train().to(args.device, memory_format=memory_format)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)

    def step():
        x, labels = next(batches)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            logits = model(x)
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def images_per_s(step, args) -> float:
    step()  # warm-up
    n, began = 0, time.perf_counter()
    while time.perf_counter() - began < args.seconds:
        step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        n += args.batch_size
    return n / (time.perf_counter() - began)


def our_batches(args):
    """Batches as train.py makes them, augmented at 32x32 and resized on the device; without end."""
    images = data.load("synthetic", None, train=True)  # as fast as any others
    loader = torch.utils.data.DataLoader(
        data.TrainBatches(images, args.batch_size, 0, Augmentation("autoaugment")),
        batch_size=None,
        sampler=range(sys.maxsize),
        num_workers=data.loader_workers(args.device),
        pin_memory=args.device == "cuda",
    )
    for images, labels in loader:
        x = data.to_input(images.to(args.device, non_blocking=True), args.img_size)
        yield x, labels.to(args.device, non_blocking=True)


def published_batches(args):
    """Batches as the published script makes them, image by image with PIL at the input's size, in
    two loader processes; without end."""
    side = args.img_size
    augmented = (
        transforms.RandomCrop(side, padding=side // 8),
        transforms.RandomHorizontalFlip(),
        transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
    )
    loader = pil_loader(
        data.load("synthetic", None, train=True),
        side,
        augmented,
        batch_size=args.batch_size,
        shuffle=True,
        pin_memory=args.device == "cuda",
        drop_last=True,
    )
    while True:
        for x, labels in loader:
            yield x.to(args.device, non_blocking=True), labels.to(args.device, non_blocking=True)


def bench_train(args) -> dict:
    """Training throughput, data included, of our network, of timm's of the same architecture in the
    same loop, and of our network in the published script's loop: its loader, contiguous tensors and
    an optimizer that is not fused."""
    try:
        import timm
    except ImportError as error:
        raise BadInput("the comparison needs timm: pip install timm") from error
    theirs = timm.create_model(f"mobilevit_{args.variant}", num_classes=len(data.CLASSES))
    ours, published = (MobileViT(args.variant, len(data.CLASSES), heads=4) for _ in range(2))
    steps = {
        "ours": trainer(ours, our_batches(args), args),
        "timm": trainer(theirs, our_batches(args), args),
        "published": trainer(
            published, published_batches(args), args, torch.contiguous_format, fused=False
        ),
    }
    rounds = [{k: images_per_s(step, args) for k, step in steps.items()} for _ in range(ROUNDS)]
    speeds = {name: statistics.median(r[name] for r in rounds) for name in steps}
    return {
        "images_per_s": speeds,
        "ratio": statistics.median(r["ours"] / r["timm"] for r in rounds),
        "ratio_published": statistics.median(r["ours"] / r["published"] for r in rounds),
        "variant": args.variant,
        "img_size": args.img_size,
        "batch_size": args.batch_size,
        "timm": timm.__version__,
    }


def bench_loader(args) -> dict:
    """What one loader process makes and what the network takes in the same time."""
    images = data.load("cifar10", args.data_dir, train=True)
    made = {}
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for policy in POLICIES:
        batches = data.TrainBatches(images, args.batch_size, 0, Augmentation(policy))
        began, n = time.perf_counter(), 0
        while time.perf_counter() - began < args.seconds:
            batches[n]
            n += 1
        made[policy] = n * args.batch_size / (time.perf_counter() - began)
    torch.set_num_threads(torch_threads)
    x = data.to_input(images.images[: args.batch_size].to(args.device), args.img_size)
    labels = images.labels[: args.batch_size].to(args.device)
    model = MobileViT(args.variant, len(data.CLASSES))
    step = trainer(model, itertools.repeat((x, labels)), args)
    return {
        "loader_images_per_s": made,
        "training_images_per_s": images_per_s(step, args),
        "variant": args.variant,
        "img_size": args.img_size,
        "device": args.device,
    }


def published_way(args) -> float:
    """Seconds of the four rows as the published script makes them: a PIL resize an image in two
    loader processes, contiguous tensors, batches of 128, torch's own histograms, all arithmetic on
    one thread."""
    model, checkpoint = model_from_checkpoint(args.checkpoint)
    if (checkpoint["config"]["dataset"], checkpoint["img_size"]) != ("cifar10", 256):
        raise BadInput(f"{args.checkpoint} is not of CIFAR-10 at 256x256, as what was published")
    model = model.to(memory_format=torch.contiguous_format)

    def loader(train: bool, n: int):
        part = data.load("cifar10", args.data_dir, train)[:n]
        return pil_loader(part, 256, batch_size=128)

    test, calibration = loader(False, args.test_images), loader(True, args.calibration_images)
    example = torch.rand(1, 3, 256, 256)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.perf_counter()
    for recipe in PROTOCOL:
        load, batches = torch_eager.load, None
        if recipe.peer:
            load = functools.partial(torch_fx.load, histograms=contextlib.nullcontext)
            batches = list(calibration)
        try:
            run = load(ptq.quantize(model, recipe), recipe, batches, example).run
        except EngineMissing:  # then quantize.py leaves the row out, too
            continue
        with torch.inference_mode():
            for x, _ in test:
                run(x)
        latency({"row": functools.partial(run, example)}, args.latency_runs)
    seconds = time.perf_counter() - began
    torch.set_num_threads(threads)
    return seconds


def pil_loader(part: data.Images, side: int, augmented=(), **how):
    """The published script's loader: each image resized by PIL, in two processes."""
    to_tensor = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.Resize(side),
            *augmented,
            transforms.ToTensor(),
            transforms.Normalize(data.MEAN, data.STD),
        ]
    )
    dataset = _Transformed(list(zip(part.images, part.labels)), to_tensor)
    return torch.utils.data.DataLoader(dataset, num_workers=2, **how)


class _Transformed(torch.utils.data.Dataset):
    def __init__(self, items, transform):
        self.items, self.transform = items, transform

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        image, label = self.items[i]
        return self.transform(image), label


def bench_sweep(args) -> dict:
    """quantize.py on a part of the test set against the same rows made the published way."""
    theirs = published_way(args)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            Path(__file__).with_name("quantize.py"),
            "--checkpoint",
            args.checkpoint,
            "--data-dir",
            args.data_dir,
            "--test-images",
            args.test_images,
            "--calibration-images",
            args.calibration_images,
            "--latency-runs",
            args.latency_runs,
            "--output",
            folder,
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            raise BadInput(f"quantize.py failed: {done.stderr}")
        ours = sum(rows.read_json(path)["wall_s"] for path in Path(folder).rglob("*.json"))
    return {
        "ours_s": ours,
        "published_way_s": theirs,
        "ratio": theirs / ours,
        "test_images": args.test_images,
        "calibration_images": args.calibration_images,
        "latency_runs": args.latency_runs,
        "threads": torch.get_num_threads(),
    }


def bench_engines(args) -> dict:
    """Milliseconds an image of every method on every engine, all called in turn on one thread.

    Values do not matter for speed: calibration is on noise, and all weights round to nearest.
    """
    model, checkpoint, batches, example = on_noise(args)
    runs, versions = {}, {}
    peers = [recipe.name for recipe in RECIPES.values() if recipe.peer]
    for name in ("fp32", "w7a8-convs", "w7a8", "w8a8", "w4", *peers):
        recipe = replace(RECIPES[name], rounding="nearest")
        network = ptq.quantize(model, recipe, batches)
        for engine in engines_for(recipe):
            if recipe.simulated and engine is torch_eager:
                continue
            try:
                versions[engine.NAME] = engine.version()
                run = engine.load(network, recipe, batches, example).run
                runs[f"{name}@{engine.NAME}"] = functools.partial(run, example)
            except EngineMissing as missing:
                print(f"{name}@{engine.NAME}: left out, {missing}")
            except Exception as error:  # such as no compiler for PT2E; the others go on
                reason = str(error).split("\n")[0]
                print(f"{name}@{engine.NAME}: failed, {type(error).__name__}: {reason}")
    return {
        "model": checkpoint["model"],
        "img_size": checkpoint["img_size"],
        "engine_versions": versions,
        "latency_ms": latency(runs, args.latency_runs),
    }


def bench_profile(args) -> dict:
    """Where OpenVINO spends a call, type by type of its nodes, for some methods in turn."""
    model, checkpoint, batches, example = on_noise(args)
    networks = {}
    for name, engine in PROFILED:
        recipe = replace(RECIPES[name], rounding="nearest")
        what = f"{name}@{engine.NAME}"
        try:
            engine.version()
            network = ptq.quantize(model, recipe, batches)
            if recipe.peer:
                network = nncf_openvino.quantized(network, batches, example)
            else:
                network, _ = openvino_cpu.exported(network, example)
        except EngineMissing as missing:
            print(f"{what}: left out, {missing}")
            continue
        networks[what] = network, engine.PRECISION
    if not networks:
        raise BadInput("nothing can be profiled here")
    return {
        "model": checkpoint["model"],
        "img_size": checkpoint["img_size"],
        "engine_version": openvino_cpu.version(),
        "calls": args.latency_runs,
        "ms": openvino_cpu.operators_ms(networks, example, args.latency_runs),
    }


def on_noise(args) -> tuple:
    """A checkpoint's network and fields, eight images of noise to calibrate on, and one of them."""
    model, checkpoint = model_from_checkpoint(args.checkpoint)
    noise = torch.randint(256, (8, 3, data.SIDE, data.SIDE), dtype=torch.uint8)
    x = data.to_input(noise, checkpoint["img_size"])
    return model, checkpoint, [(x, torch.zeros(8))], x[:1]


BENCHMARKS = {
    "train": bench_train,
    "loader": bench_loader,
    "engines": bench_engines,
    "profile": bench_profile,
    "sweep": bench_sweep,
}


@rows.command
def main():
    args = parse_args()
    rows.keep_freed_memory()
    rows.require_writable(args.output)
    result = BENCHMARKS[args.what](args)
    on_gpu = args.device == "cuda" and args.what in ("train", "loader")
    device = torch.cuda.get_device_name() if on_gpu else rows.cpu_name()
    print(json.dumps(result, indent=1))
    # Whether integers are faster hangs on VNNI: CPUs with and without it have a table each.
    vnni = "-vnni" if args.what in ("engines", "profile") and rows.has_vnni() else ""
    path = Path(args.output, f"{args.what}{vnni}.json")
    rows.write_json(path, result | {"hardware": device} | rows.provenance())
    print(path)


if __name__ == "__main__":
    main()
