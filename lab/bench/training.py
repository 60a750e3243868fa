"""Speed of training and of the loader."""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from lab.bench.published import training_batches
from lab.cli import BadInput
from lab.models import build
from lab.tasks import TASKS, cifar10
from lab.tasks.augment import POLICIES, Augmentation
from lab.tasks.batches import TrainBatches, loader_workers
from lab.training.optimizer import arithmetic

ROUNDS = 5  # of each contender, taking turns


def train(args) -> dict:
    """Training throughput, data included, of our network, of timm's of the same architecture in the
    same loop, of our network in the published script's loop (its loader, contiguous tensors, an
    optimizer that is not fused, on a CPU in FP32), and of ours with one thing changed."""
    try:
        import timm
    except ImportError as error:
        raise BadInput("the comparison needs timm: pip install timm") from error
    theirs = timm.create_model(args.model, num_classes=len(cifar10.CLASSES))

    def contender(model=None, batches=our_batches, **changes):
        model = model or build(args.model, num_classes=len(cifar10.CLASSES), heads=4)
        return trainer(model, batches(args), args, **changes)

    on_cuda, plain = args.device == "cuda", torch.contiguous_format
    published = {"memory_format": plain, "fused": False}
    published["context"] = partial(torch.autocast, args.device, torch.bfloat16, enabled=on_cuda)
    steps = {
        "ours": contender(),
        "timm": contender(theirs),
        "published": contender(batches=training_batches, **published),
        "published batches": contender(batches=training_batches),
        "contiguous": contender(memory_format=plain),
        "unfused": contender(fused=False),
    }
    if args.precision != "fp32":
        steps["fp32"] = contender(context=partial(arithmetic, args.device, "fp32"))
    if args.precision == "bf16" and not on_cuda:
        steps["fused attention"] = contender(context=partial(torch.autocast, "cpu"))
    rounds = [{k: images_per_s(step, args) for k, step in steps.items()} for _ in range(ROUNDS)]
    return {
        "images_per_s": {name: statistics.median(r[name] for r in rounds) for name in steps},
        "ratio": {
            name: statistics.median(r["ours"] / r[name] for r in rounds)
            for name in steps
            if name != "ours"
        },
        "model": args.model,
        "img_size": args.img_size,
        "batch_size": args.batch_size,
        "precision": args.precision,
        "timm": timm.__version__,
    }


def loader(args) -> dict:
    """Images/s that one loader process makes, and that the network takes."""
    images = TASKS["cifar10"].load(args.data_dir, train=True)
    made = {}
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for policy in POLICIES:
        batches = TrainBatches(images, args.batch_size, 0, Augmentation(policy))
        began, n = time.perf_counter(), 0
        while time.perf_counter() - began < args.seconds:
            batches[n]
            n += 1
        made[policy] = n * args.batch_size / (time.perf_counter() - began)
    torch.set_num_threads(torch_threads)
    x = cifar10.to_input(images.images[: args.batch_size].to(args.device), args.img_size)
    labels = images.labels[: args.batch_size].to(args.device)
    model = build(args.model, num_classes=len(cifar10.CLASSES))
    step = trainer(model, itertools.repeat((x, labels)), args)
    return {
        "loader_images_per_s": made,
        "training_images_per_s": images_per_s(step, args),
        "model": args.model,
        "img_size": args.img_size,
        "batch_size": args.batch_size,
        "precision": args.precision,
        "device": args.device,
    }


def trainer(
    model, batches, args, context=None, memory_format=torch.channels_last, fused=True
) -> Callable[[], None]:
    """A training step: the loop that all contenders share. `batches` yields (input, labels) on the
    device; `context()` is that of the forward pass."""
    model = model.train().to(args.device, memory_format=memory_format)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    context = context or partial(arithmetic, args.device, args.precision)

    def step():
        x, labels = next(batches)
        with context():
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
    images = TASKS["synthetic"].load(None, train=True)  # as fast as any others
    loader = torch.utils.data.DataLoader(
        TrainBatches(images, args.batch_size, 0, Augmentation("autoaugment")),
        batch_size=None,
        sampler=range(sys.maxsize),
        num_workers=loader_workers(args.device),
        pin_memory=args.device == "cuda",
    )
    for images, labels in loader:
        x = cifar10.to_input(images.to(args.device, non_blocking=True), args.img_size)
        yield x, labels.to(args.device, non_blocking=True)
