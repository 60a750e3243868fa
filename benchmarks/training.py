"""Speed of training and of the loader."""

import itertools
import statistics
import sys
import time

import torch
import torch.nn.functional as F

import data
import rows
from augment import POLICIES, Augmentation
from benchmarks.published import training_batches
from mobilevit import MobileViT
from rows import BadInput
from run import arithmetic

ROUNDS = 5  # of each contender, taking turns


def train(args) -> dict:
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
            published, training_batches(args), args, torch.contiguous_format, fused=False
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


def loader(args) -> dict:
    """Images/s of one loader process, and what the network takes in the same time."""
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


def trainer(model, batches, args, memory_format=torch.channels_last, fused=True):
    """A training step as a function: the loop that all contenders share. `batches` yields (input,
    labels) on the device."""
    model = model.train().to(args.device, memory_format=memory_format)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    precision = rows.precision(args.device)

    def step():
        x, labels = next(batches)
        with arithmetic(args.device, precision):
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
