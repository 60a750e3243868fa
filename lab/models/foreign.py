"""Weights from elsewhere: plain state dicts with our names or with those of other projects.

>>> network, layout = read_weights("model.safetensors", "mobilevit_s")
>>> save_checkpoint("mine.pth", as_checkpoint(network, "mobilevit_s", layout))

MobileViT is read with the names of timm, Hugging Face transformers and Apple's ml-cvnets, DeepLab
and SSDLite on it with those of the projects that have them, ViT with those of timm and
transformers. For MobileViT all compute the same. They differ in names, in attention heads (those
three have four in every block) and in the order of the colours that the weights were trained on;
a network read here always takes RGB. Names and colours are from the projects' code, v0.1 of
ml-cvnets.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lab.cli import BadInput
from lab.models import (
    TASK_OF,
    build,
    default_img_size,
    efficientnet,
    full_name,
    mobilevit_names,
    require_heads,
    settings_of,
    vit,
)
from lab.models.checkpoint import FORMAT, load_state, read_tensors, tensor, without_prefix
from lab.schema import mapping
from lab.tasks import TASKS, cifar10
from lab.tasks.imagefolder import RESIZE
from mobilevit import VARIANTS, from_timm

# Where scripts keep the state dict in what they save. Averaged weights come first: where a file
# has both, they are the ones that the script evaluated.
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model_state", "model",
)  # fmt: skip

NO_WEIGHT = "n_averaged"  # the step count of torch's averaged models


@dataclass(frozen=True)
class Layout:
    """How a project names the tensors of a network, and what network and pixels they are for."""

    name: str
    to_ours: Callable[[dict], dict]  # a state dict of that project -> one with our names
    heads: int | None = None  # attention heads in every block, if not the variant's own
    bgr: bool = False  # whether the weights take blue, green, red
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # of pixels in [0, 1], per channel
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resize: dict = field(default_factory=dict)  # where it differs from imagefolder.RESIZE

    def pixels(self) -> dict:
        """Return how photos are made its network's input, as a checkpoint and Photos have it."""
        normalize = {"mean": list(self.mean), "std": list(self.std)}
        return {"normalize": normalize, "resize": RESIZE | self.resize}


@dataclass(frozen=True)
class Family:
    """Networks of the registry that differ in sizes alone, and the layouts that are read."""

    title: str
    names: tuple[str, ...]
    layouts: tuple[Layout, ...]
    classifier: str = "classifier"  # name of the last layer
    num_classes: Callable[[int], int] = int  # of as many rows of its weights


CIFAR10 = {"mean": cifar10.MEAN, "std": cifar10.STD}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
TIMM_NAMES = {"efficientnet_lite0": "tf_efficientnet_lite0"}  # its own variant pads otherwise
TIMM = {"crop": 0.9, "interpolation": "bicubic"}  # as its configurations of these networks say
LITE = {"crop": 0.875, "interpolation": "bicubic"}


def _vits(prefix: str, pixels: dict, of_transformers: dict) -> Family:
    """Return the family of the ViTs whose names begin with `prefix`.

    timm and transformers give the same `pixels` to networks of the same weights. Those with our
    names were trained by train.py.
    """
    squeezed = {"stretch": True} | of_transformers
    return Family(
        "ViT",
        tuple(name for name in vit.VARIANTS if name.startswith(prefix)),
        (
            Layout("lab/models/vit.py", dict, **CIFAR10),
            Layout("timm", vit.from_timm, resize=TIMM, **pixels),
            Layout("transformers", vit.from_transformers, resize=squeezed, **pixels),
        ),
    )


FAMILIES = (
    Family(
        "MobileViT",
        tuple(map(full_name, VARIANTS)),
        (
            Layout("mobilevit.py", dict, **CIFAR10),
            Layout("timm", from_timm, heads=4, resize=TIMM),
            Layout("transformers", mobilevit_names.from_transformers, heads=4, bgr=True),
            Layout("ml-cvnets", mobilevit_names.from_cvnets, heads=4, bgr=True),
        ),
    ),
    Family(
        "DeepLab",
        tuple(f"deeplab_{full_name(variant)}" for variant in VARIANTS),
        (
            Layout("lab/models/deeplab.py", dict),
            Layout("transformers", mobilevit_names.deeplab_from_transformers, heads=4, bgr=True),
            Layout("ml-cvnets", mobilevit_names.deeplab_from_cvnets, heads=4, bgr=True),
        ),
    ),
    Family(
        "SSDLite",
        tuple(f"ssdlite_{full_name(variant)}" for variant in VARIANTS),
        (
            Layout("lab/models/ssdlite.py", dict),
            Layout("ml-cvnets", mobilevit_names.ssd_from_cvnets, heads=4, bgr=True),
        ),
        classifier="heads.5",
        num_classes=lambda rows: rows // 4 - 5,  # of 4 boxes, each 4 offsets, background, classes
    ),
    # timm's default weights: of vit_* from Google ("augreg"), of deit_* from Facebook.
    _vits("vit_cifar", CIFAR10, {}),
    _vits("deit_", IMAGENET, {"crop": 0.875, "interpolation": "bicubic"}),
    _vits("vit_base", HALVES, {"crop": 1.0}),
    _vits("vit_large", HALVES, {"crop": 1.0}),
    Family("ResNet", ("resnet18",), (Layout("torchvision", dict, **CIFAR10),), classifier="fc"),
    Family(
        "EfficientNet",
        ("efficientnet_lite0",),
        (
            Layout("lab/models/efficientnet.py", dict, **CIFAR10),
            Layout("efficientnet_lite_pytorch", efficientnet.from_pypi, resize=LITE, **HALVES),
            Layout("timm", efficientnet.from_timm, resize=LITE, **HALVES),
        ),
    ),
)


def family_of(name: str) -> Family:
    """Return the family of the network `name`.

    One that is in none of FAMILIES is known by its own names alone.
    """
    own = Family(name, (name,), (Layout(name, dict, **CIFAR10),))
    return next((family for family in FAMILIES if name in family.names), own)


def timm_layout(name: str) -> Layout:
    """Return how timm names the tensors of the network `name`.

    BadInput if timm has no weights for it.
    """
    layouts = [layout for layout in family_of(name).layouts if layout.name == "timm"]
    if not layouts or name == "vit_cifar":
        raise BadInput(f"--pretrained: timm has no weights for {name}")
    return layouts[0]


def read_weights(path, name: str, heads=None) -> tuple[nn.Module, Layout]:
    """Return the network `name` with the weights in a file, and the file's layout.

    The file is .safetensors or a torch file of tensors: a state dict, as it is or under one of the
    names in WRAPPERS. The number of classes follows from the classifier's rows. `heads` overrides
    the attention heads of a MobileViT's layout. Settings that no weight shows, such as dilations,
    are taken to be the network's own. It comes in evaluation mode and channels-last. BadInput for
    everything that does not fit.
    """
    if heads is not None:
        require_heads(name)
    state = _read_state(path)
    family, expected = family_of(name), _shapes(name)
    layout, state = _recognised(state, expected, family, path)
    classifier = state.get(f"{family.classifier}.weight")
    if classifier is None or classifier.dim() == 0:
        raise BadInput(f"{path} has the names of {layout.name}, but no classifier's weights")
    _require_variant(state, name, family, path)
    for counter in expected:
        if counter.endswith(".num_batches_tracked"):  # not needed, and often left out
            state.setdefault(counter, torch.tensor(0))
    heads = layout.heads if heads is None else heads
    settings = {"num_classes": family.num_classes(len(classifier))} | (
        {} if heads is None else {"heads": heads}
    )
    try:
        network = build(name, **settings)
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from error
    load_state(network, state, f"{path}, with the names of {layout.name} turned into ours,")
    if layout.bgr:
        flip_colours(network)
    return network.eval().to(memory_format=torch.channels_last), layout


def flip_colours(network: nn.Module) -> None:
    """Reverse the order of colours that a MobileViT, or a network on one, takes.

    One that took blue, green, red then takes red, green, blue, or the other way round.
    """
    stem = getattr(network, "backbone", network).stem.conv
    stem.weight.data = stem.weight.data.flip(1)


def as_checkpoint(network: nn.Module, name: str, layout: Layout, classes=None, source="") -> dict:
    """Return a checkpoint of format 2 for a network that `read_weights` read from `source`, a file.

    `classes` are the names of its classes, by default "class 0" and so on. BadInput if they are not
    as many as the network has.
    """
    settings, task = settings_of(network), TASK_OF.get(name, "imagefolder")
    metric = TASKS[task].objective.METRIC
    n = settings["num_classes"]
    classes = [f"class {k}" for k in range(n)] if classes is None else list(classes)
    if len(classes) != n:
        raise BadInput(f"the weights are for {n} classes, but {len(classes)} are named")
    return {
        "format": FORMAT,
        "model": name,
        "settings": settings,
        "task": task,
        "classes": classes,
        "img_size": default_img_size(name),
        "state_dict": network.state_dict(),
        f"val_{metric}": None,
        f"test_{metric}": None,
        "epoch": 0,
        "config": {"weights": str(source), "layout": layout.name},
        **layout.pixels(),
    }


def _read_state(path) -> dict[str, Tensor]:
    """Return the state dict in a file, out of its wrapper and without prefixes."""
    if Path(path).suffix == ".safetensors":
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{path} is not a readable .safetensors file: {error}") from error
    else:
        state = read_tensors(path)
        if "state_dict" in state and ("settings" in state or "heads" in state):
            raise BadInput(f"{path} is a checkpoint of this project: give it as --checkpoint")
        wrapper = next((name for name in WRAPPERS if isinstance(state.get(name), dict)), None)
        state = state[wrapper] if wrapper else state
    mapping(tensor)(state, str(path))
    for name, value in state.items():
        if value.dim() and not value.is_floating_point():
            raise BadInput(f"{path}: {name} is {value.dtype}, but weights should be floats")
    return without_prefix({n: t for n, t in state.items() if n != NO_WEIGHT})


def _shapes(name: str) -> dict[str, torch.Size]:
    """Return {name of a tensor: its shape} of the network `name` with one class."""
    with torch.device("meta"):
        return {n: t.shape for n, t in build(name, num_classes=1).state_dict().items()}


def _recognised(state: dict, expected: dict, family: Family, path) -> tuple[Layout, dict]:
    """Return the layout whose names fit most tensors, and the state dict with our names.

    BadInput if it fits less than half of the `expected` ones.
    """
    read = [(layout, layout.to_ours(state)) for layout in family.layouts]
    layout, ours = max(read, key=lambda pair: len(pair[1].keys() & expected.keys()))
    if 2 * len(ours.keys() & expected.keys()) < len(expected):
        first = f", its first name is {next(iter(state))}" if state else ""
        raise BadInput(
            f"{path} holds no {family.title} with the names of "
            f"{', '.join(layout.name for layout in family.layouts)}: "
            f"it has {len(state)} tensors{first}"
        )
    return layout, ours


def _require_variant(state: dict, name: str, family: Family, path) -> None:
    """Raise BadInput if the shapes are those of another network of the kind than `name`."""

    last = family.classifier.split(".")[0] + "."

    def fits(variant: str) -> bool:
        body = {n: s for n, s in _shapes(variant).items() if not n.startswith(last)}
        return all(n not in state or state[n].shape == shape for n, shape in body.items())

    if not fits(name):
        for other in (n for f in FAMILIES if f.title == family.title for n in f.names):
            if fits(other):
                raise BadInput(f"{path}: these are weights of {other}, not of {name}")


def load_timm(model: nn.Module, name: str) -> None:
    """Load timm's ImageNet weights, all but the classifier, into `model`.

    It is the network `name` with the heads of `timm_layout`. BadInput if timm is not installed or
    its weights can't be fetched.
    """
    layout = timm_layout(name)
    try:
        import timm

        source = timm.create_model(TIMM_NAMES.get(name, name), pretrained=True)
    except ImportError as error:
        raise BadInput("--pretrained needs timm: pip install timm") from error
    except (OSError, RuntimeError) as error:  # no network, or no such file on the hub
        raise BadInput(f"--pretrained: timm's weights can't be fetched ({error})") from error
    body = layout.to_ours(source.state_dict())
    body = {k: v for k, v in body.items() if not k.startswith("classifier.")}
    model.load_state_dict(model.state_dict() | body)
