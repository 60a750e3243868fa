"""Networks by name. A new one is a file in this folder and a line here.

>>> build("mobilevit_xxs", num_classes=10)
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from lab.cli import BadInput, known
from lab.models.ablations import ABLATED
from lab.models.deeplab import DeepLab
from lab.models.efficientnet import EfficientNetLite0
from lab.models.resnet import resnet18
from lab.models.ssdlite import SSDLite
from lab.models.vit import VARIANTS as VIT
from lab.models.vit import ViT
from mobilevit import VARIANTS, MobileViT

# name -> function from settings (num_classes and what else the network takes) to the network
MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"mobilevit_{variant}": partial(MobileViT, variant) for variant in VARIANTS},
    **{f"ssdlite_mobilevit_{variant}": partial(SSDLite, variant) for variant in VARIANTS},
    **{f"deeplab_mobilevit_{variant}": partial(DeepLab, variant) for variant in VARIANTS},
    **{f"mobilevit_xxs_{name}": partial(network, "xxs") for name, network in ABLATED.items()},
    **{variant: partial(ViT, variant) for variant in VIT},
    "resnet18": resnet18,
    "efficientnet_lite0": EfficientNetLite0,
}
SHORT = {variant: f"mobilevit_{variant}" for variant in VARIANTS}
# name -> the task that the network is made for, where that is not to classify
TASK_OF = {
    **{f"ssdlite_mobilevit_{variant}": "detection" for variant in VARIANTS},
    **{f"deeplab_mobilevit_{variant}": "segmentation" for variant in VARIANTS},
}
# name -> side of the images to train on, in pixels, where it is not 256 as in MobileViT's paper
IMG_SIZES = {variant: v.img_size for variant, v in VIT.items()}
IMG_SIZES |= {"resnet18": 32, "efficientnet_lite0": 224}
IMG_SIZES |= {name: {"detection": 320, "segmentation": 512}[task] for name, task in TASK_OF.items()}

NAMES = ", ".join((*MODELS, *SHORT))


def full_name(name: str) -> str:
    """Return the registered name for a name or its short form: mobilevit_xxs for "xxs".

    Names that are no short form are returned as they are.
    """
    return SHORT.get(name, name)


def registered(name: str) -> str:
    """Return `full_name(name)`: the type of a command's option.

    argparse.ArgumentTypeError for a name that is not registered.
    """
    return full_name(known((*MODELS, *SHORT), "network")(name))


def default_img_size(name: str) -> int:
    """Return the side in pixels of the images that the network `name` is trained on by default."""
    return IMG_SIZES.get(name, 256)


def require_img_size(model: nn.Module, img_size: int, where: str) -> None:
    """Raise BadInput if `model` takes only images of another side than `img_size` pixels.

    Such a model has an attribute `img_size`. The message begins with `where` the size came from.
    """
    fixed = getattr(model, "img_size", img_size)
    if fixed != img_size:
        sizes = f"{fixed}x{fixed} pixels, not {img_size}x{img_size}"
        raise BadInput(f"{where}: the network takes images of {sizes}")


def require_task(name: str, task: str) -> None:
    """Raise BadInput unless the network `name` gives the answers that `task` asks for."""
    ours = TASK_OF.get(name)
    if ours != (task if task in TASK_OF.values() else None):
        fitting = [other for other in MODELS if TASK_OF.get(other) == task]
        raise BadInput(
            f"--task {task} is not for {name}: choose from {', '.join(fitting)}"
            if fitting
            else f"{name} is for --task {ours}, not for {task}"
        )


def require_mobilevit(name: str, option: str) -> None:
    """Raise BadInput if `option`, which only MobileViT knows, is given for another network."""
    if name not in SHORT.values():
        raise BadInput(f"{option} is for MobileViT, not for {name}")


def require_heads(name: str) -> None:
    """Raise BadInput for a network whose attention heads can't be chosen."""
    if "mobilevit" not in name:
        raise BadInput(f"--heads is for MobileViT, not for {name}")


def build(name: str, /, **settings) -> nn.Module:
    """Return the network `name`, a key of MODELS, with fresh weights.

    ValueError for settings that it does not take.
    """
    try:
        if settings.get("num_classes", 1) < 1:
            raise ValueError(f"num_classes must be at least 1, got {settings['num_classes']}")
        return MODELS[name](**settings)
    except (TypeError, ArithmeticError, RuntimeError) as error:  # from sizes that torch refuses
        raise ValueError(f"{name} can't be built with {settings}: {error}") from error


def settings_of(model: nn.Module) -> dict:
    """Return the settings that build the same network by its registered name, as plain values."""
    return {name: value for name, value in model.settings.items() if name != "variant"}


def run_name(model: str, task: str) -> str:
    """Return a run's name in paths and tables: the network, and the task unless it is cifar10."""
    return model if task == "cifar10" else f"{model}-{task}"
