"""Entry points for torch.hub.

>>> model = torch.hub.load(".", "mobilevit_xxs", source="local", pretrained=True)

torch.hub puts this folder in front of the import path for as long as it loads. A project may have a
`mobilevit.py` or a `lab/` of its own, so nothing of ours is imported under such a name here unless
the project itself would find ours by it.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import torch
from torch import nn

dependencies = ["torch"]

_HERE = Path(__file__).resolve().parent
_PRIVATE_NAME = "mobilevit_from_torch_hub"


def _mobilevit():
    """Return the module mobilevit.py of this folder.

    Where `import mobilevit` gives ours, it is that one, so that its classes are the same. Otherwise
    it has a private name.
    """
    file = _HERE / "mobilevit.py"
    if "mobilevit" in sys.modules:
        found = sys.modules["mobilevit"].__spec__
    else:  # torch.hub names this module "hubconf.py" and has put our folder first
        found = PathFinder.find_spec("mobilevit", sys.path[__name__ == "hubconf.py" :])
    if found and found.origin and Path(found.origin).resolve() == file:
        return importlib.import_module("mobilevit")
    if _PRIVATE_NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(_PRIVATE_NAME, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[_PRIVATE_NAME] = module  # where pickle looks for its classes
    return sys.modules[_PRIVATE_NAME]


def _network(variant: str, pretrained: bool, num_classes: int) -> nn.Module:
    MobileViT = _mobilevit().MobileViT
    if not pretrained:
        return MobileViT(variant, num_classes)
    if num_classes != 10:
        raise ValueError(f"the shipped weights have 10 classes, not {num_classes}")
    path = _HERE / "checkpoints" / f"mobilevit_{variant}" / "best.pth"
    shipped = torch.load(path, map_location="cpu", weights_only=True)
    model = MobileViT(variant, **shipped["settings"])
    model.load_state_dict(shipped["state_dict"])
    return model.eval().to(memory_format=torch.channels_last)


def mobilevit_xxs(pretrained: bool = False, num_classes: int = 10) -> nn.Module:
    """Return MobileViT XXS: images [B, 3, H, W] -> logits [B, num_classes].

    `pretrained`: with the shipped CIFAR-10 weights, in evaluation mode. ValueError if it is asked
    for with another number of classes than their 10.
    """
    return _network("xxs", pretrained, num_classes)


def mobilevit_xs(pretrained: bool = False, num_classes: int = 10) -> nn.Module:
    """Return MobileViT XS: images [B, 3, H, W] -> logits [B, num_classes].

    `pretrained`: with the shipped CIFAR-10 weights, in evaluation mode. ValueError if it is asked
    for with another number of classes than their 10.
    """
    return _network("xs", pretrained, num_classes)


def mobilevit_s(pretrained: bool = False, num_classes: int = 10) -> nn.Module:
    """Return MobileViT S: images [B, 3, H, W] -> logits [B, num_classes].

    `pretrained`: with the shipped CIFAR-10 weights, in evaluation mode. ValueError if it is asked
    for with another number of classes than their 10.
    """
    return _network("s", pretrained, num_classes)
