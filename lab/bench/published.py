"""Batches as the published script makes them, as we render it: what the benchmark compares with."""

import torch
from torchvision import transforms

from lab.tasks import TASKS, cifar10


def training_batches(img_size: int, batch_size: int, device: str):
    """Training batches, image by image with PIL at the input's size; without end.

    Two loader processes, as there.
    """
    to_tensor = transforms.Compose(
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
        _Transformed(list(zip(images.images, images.labels)), to_tensor),
        batch_size=batch_size,
        num_workers=2,
        shuffle=True,
        pin_memory=device == "cuda",
        drop_last=True,
    )
    while True:
        for x, labels in loader:
            yield x.to(device, non_blocking=True), labels.to(device, non_blocking=True)


class _Transformed(torch.utils.data.Dataset):
    def __init__(self, items, transform):
        self.items, self.transform = items, transform

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        image, label = self.items[i]
        return self.transform(image), label
