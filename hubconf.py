"""Entry points for torch.hub, which adds this folder to the import path.

>>> model = torch.hub.load(".", "mobilevit_xxs", source="local", pretrained=True)
"""

from pathlib import Path

from lab.models.checkpoint import model_from_checkpoint
from mobilevit import MobileViT

dependencies = ["torch"]


def _network(variant: str, pretrained: bool, num_classes: int) -> MobileViT:
    if not pretrained:
        return MobileViT(variant, num_classes)
    if num_classes != 10:
        raise ValueError(f"the shipped weights have 10 classes, not {num_classes}")
    path = Path(__file__).parent / "checkpoints" / f"mobilevit_{variant}" / "best.pth"
    return model_from_checkpoint(path)[0]


def mobilevit_xxs(pretrained: bool = False, num_classes: int = 10) -> MobileViT:
    """MobileViT XXS; `pretrained`: with the shipped CIFAR-10 weights, in evaluation mode."""
    return _network("xxs", pretrained, num_classes)


def mobilevit_xs(pretrained: bool = False, num_classes: int = 10) -> MobileViT:
    """MobileViT XS; `pretrained`: with the shipped CIFAR-10 weights, in evaluation mode."""
    return _network("xs", pretrained, num_classes)


def mobilevit_s(pretrained: bool = False, num_classes: int = 10) -> MobileViT:
    """MobileViT S; `pretrained`: with the shipped CIFAR-10 weights, in evaluation mode."""
    return _network("s", pretrained, num_classes)
