"""The published script's ways, as we render them: what the benchmarks compare with."""

import contextlib
import functools
import time

import torch
from torchvision import transforms

import ptq
from lab.cli import BadInput
from lab.engines import EngineMissing, torch_eager, torch_fx
from lab.engines.measure import latency
from lab.models.checkpoint import model_from_checkpoint
from lab.tasks import TASKS, cifar10
from ptq.recipes.baselines import PROTOCOL


def training_batches(args):
    """Batches as the published script makes them, image by image with PIL at the input's size, in
    two loader processes; without end."""
    side = args.img_size
    augmented = (
        transforms.RandomCrop(side, padding=side // 8),
        transforms.RandomHorizontalFlip(),
        transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
    )
    loader = pil_loader(
        TASKS["synthetic"].load(None, train=True),
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


def sweep_s(args) -> float:
    """Seconds of the four rows as the published script makes them: a PIL resize an image in two
    loader processes, contiguous tensors, batches of 128, torch's own histograms, all arithmetic on
    one thread."""
    model, checkpoint = model_from_checkpoint(args.checkpoint)
    if (checkpoint["config"]["dataset"], checkpoint["img_size"]) != ("cifar10", 256):
        raise BadInput(f"{args.checkpoint} is not of CIFAR-10 at 256x256, as what was published")
    model = model.to(memory_format=torch.contiguous_format)

    def loader(train: bool, n: int):
        part = TASKS["cifar10"].load(args.data_dir, train)[:n]
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


def pil_loader(part: cifar10.Images, side: int, augmented=(), **how):
    """The published script's loader: each image resized by PIL, in two processes."""
    to_tensor = transforms.Compose(
        [
            transforms.ToPILImage(),
            transforms.Resize(side),
            *augmented,
            transforms.ToTensor(),
            transforms.Normalize(cifar10.MEAN, cifar10.STD),
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
