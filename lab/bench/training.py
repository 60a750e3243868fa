"""Speed of training and of the loader."""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torchvision import transforms

from lab import machine
from lab.cli import BadInput
from lab.models import build
from lab.tasks import TASKS, cifar10
from lab.tasks.augment import POLICIES, Augmentation
from lab.tasks.batches import TrainBatches, loader_workers
from lab.tasks.classification import batch
from lab.training.optimizer import arithmetic, build_optimizer, weight_groups

ROUNDS = {"cpu": 5, "cuda": 3}  # of each contender, taking turns


def train(model: str, img_size: int, batch_size: int, precision: str, device: str, seconds: float):
    """Measure training images/s, data included, of each contender for `seconds` in every round.

    The contenders are our network; timm's of the same architecture in the same loop; our network
    in the published script's loop (its loader, contiguous tensors, an optimizer that is not fused,
    on a CPU in FP32); and ours with one thing changed. On a GPU ours is also compiled, trained with
    Muon, and with half and twice the batch. BadInput without timm.
    """
    try:
        import timm
    except ImportError as error:
        raise BadInput("the comparison needs timm: pip install timm") from error
    n_classes = len(cifar10.CLASSES)
    theirs = timm.create_model(model, num_classes=n_classes)

    ours = partial(arithmetic, device, precision)
    # Contenders share loaders: eight processes each, for every one of them, take a while to start.
    endless = cache(lambda batches, size: batches(img_size, size, device))

    def contender(network=None, batches=our_batches, context=ours, size=batch_size, **changes):
        network = network or build(model, num_classes=n_classes, heads=4)
        return trainer(network, endless(batches, size), device, context, **changes), size

    autocast = partial(torch.autocast, device, torch.bfloat16)
    published = {
        "memory_format": torch.contiguous_format,
        "optimizer": unfused,
        "context": partial(autocast, enabled=device == "cuda"),
    }
    steps = {
        "ours": contender(),
        "timm": contender(theirs),
        "published": contender(batches=published_batches, **published),
        "published batches": contender(batches=published_batches),
        "contiguous": contender(memory_format=torch.contiguous_format),
        "unfused": contender(optimizer=unfused),
    }
    if precision != "fp32":
        steps["fp32"] = contender(context=partial(arithmetic, device, "fp32"))
    if (device, precision) == ("cpu", "bf16"):
        steps["fused attention"] = contender(context=autocast)
    if device == "cuda":
        steps["compiled"] = contender(compiled=True)
        steps["muon"] = contender(optimizer=muon)
        steps["muon of timm"] = contender(optimizer=muon_of_timm)
        steps["half the batch"] = contender(size=batch_size // 2)
        steps["twice the batch"] = contender(size=2 * batch_size)
    rounds = []
    for _ in range(ROUNDS[device]):
        rounds.append({})
        for name, step in steps.items():
            rounds[-1][name] = images_per_s(*step, device, seconds)
            print(f"{name}: {rounds[-1][name]:.1f} images/s", file=sys.stderr)
    return {
        "images_per_s": {name: statistics.median(r[name] for r in rounds) for name in steps},
        "ratio": {
            name: statistics.median(r["ours"] / r[name] for r in rounds)
            for name in steps
            if name != "ours"
        },
        "model": model,
        "img_size": img_size,
        "batch_size": batch_size,
        "precision": precision,
        "timm": timm.__version__,
    }


def loader(
    model: str,
    img_size: int,
    batch_size: int,
    precision: str,
    device: str,
    seconds: float,
    data_dir: str,
) -> dict:
    """Return the images/s that one loader process makes, and that the network takes.

    `seconds`: how long each augmentation and the training are measured.
    """
    images = TASKS["cifar10"].load(data_dir, train=True)
    made = {}
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for policy in POLICIES:
        batches = TrainBatches(batch, images, batch_size, 0, Augmentation(policy))
        began, n = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            batches[n]
            n += 1
        made[policy] = n * batch_size / (time.perf_counter() - began)
    torch.set_num_threads(torch_threads)
    x = cifar10.to_input(images.images[:batch_size].to(device), img_size)
    labels = images.labels[:batch_size].to(device)
    network = build(model, num_classes=len(cifar10.CLASSES))
    same = itertools.repeat((x, labels))
    step = trainer(network, same, device, partial(arithmetic, device, precision))
    return {
        "loader_images_per_s": made,
        "training_images_per_s": images_per_s(step, batch_size, device, seconds),
        "model": model,
        "img_size": img_size,
        "batch_size": batch_size,
        "precision": precision,
        "device": device,
    }


def fused(model):
    return torch.optim.AdamW(model.parameters(), fused=True)


def unfused(model):
    return torch.optim.AdamW(model.parameters())


def muon(model):
    return build_optimizer(model, "muon", lr=1e-3, weight_decay=0.05)


def muon_of_timm(model):
    """Return timm's Muon: the same rule, one matrix after the other."""
    from timm.optim import Muon

    return Muon(weight_groups(model, 0.05), lr=1e-3, nesterov=True)


def trainer(
    model,
    batches,
    device: str,
    context,
    memory_format=torch.channels_last,
    optimizer=fused,
    compiled=False,
) -> Callable[[], None]:
    """Return a function that does one training step: the loop that all contenders share.

    `batches` yields (input [b, 3, S, S], labels [b]) on the device; `context()` is that of the
    forward pass; `optimizer` makes one for a model.
    """
    model = model.train().to(device, memory_format=memory_format)
    update = optimizer(model)
    network = torch.compile(model, dynamic=False) if compiled else model

    def step():
        x, labels = next(batches)
        with context():
            logits = network(x)
        update.zero_grad()
        F.cross_entropy(logits.float(), labels).backward()
        update.step()

    return step


def images_per_s(step, batch_size: int, device: str, seconds: float) -> float:
    for _ in range(2):  # the first to warm up, the second to know how long one takes
        machine.wait_for(device)
        began = time.perf_counter()
        step()
        machine.wait_for(device)
    # Without a wait after each step, which would leave a GPU idle.
    at_once = max(1, int(0.1 / (time.perf_counter() - began)))
    n, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(at_once):
            step()
            n += batch_size
        machine.wait_for(device)
    return n / (time.perf_counter() - began)


def our_batches(img_size: int, batch_size: int, device: str):
    """Yield batches without end as train.py makes them.

    Images are augmented at 32x32 pixels and resized on the device.
    """
    images = TASKS["synthetic"].load(None, train=True)  # as fast as any others
    loader = torch.utils.data.DataLoader(
        TrainBatches(batch, images, batch_size, 0, Augmentation("autoaugment")),
        batch_size=None,
        sampler=range(sys.maxsize),
        num_workers=loader_workers(device),
        pin_memory=device == "cuda",
    )
    for images, labels in loader:
        x = cifar10.to_input(images.to(device, non_blocking=True), img_size)
        yield x, labels.to(device, non_blocking=True)


def published_batches(img_size: int, batch_size: int, device: str):
    """Yield batches without end as the published script makes them.

    Two loader processes make them image by image with PIL, at the input's size.
    """
    to_input = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.Resize(img_size),
            transforms.RandomCrop(img_size, padding=img_size // 8),
            transforms.RandomHorizontalFlip(),
            transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
            transforms.ToTensor(),
            transforms.Normalize(cifar10.MEAN, cifar10.STD),
        ]
    )

    images = TASKS["synthetic"].load(None, train=True)
    loader = torch.utils.data.DataLoader(
        list(zip(images.images, images.labels)),
        batch_size=batch_size,
        num_workers=2,
        shuffle=True,
        collate_fn=partial(_inputs_and_labels, to_input),
        pin_memory=device == "cuda",
        drop_last=True,
    )
    while True:
        for x, labels in loader:
            yield x.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _inputs_and_labels(to_input, pairs):
    images, labels = zip(*pairs)
    return torch.stack([to_input(image) for image in images]), torch.stack(labels)
