"""Checkpoints: networks of the registry with their weights and what they were trained for.

    {"format": 2, "model": name in MODELS, "settings", "task", "classes", "img_size", "state_dict",
     "test_accuracy_pct", "val_accuracy_pct", "epoch", "config", "commit"}

Of a task that is judged by another metric than accuracy, that stands in these two names.
A file of tensors and plain values, always read with `weights_only=True`, so that it can't run code.
Format 1, which knew MobileViT on CIFAR-10 alone, is read as format 2.
"""

import io
import math
import warnings
import zipfile

import torch
from torch import Tensor, nn

from lab.cli import BadInput, shortened
from lab.files import atomic
from lab.models import MODELS, build, full_name, require_img_size, settings_of
from lab.schema import (
    Schema,
    flag,
    integer,
    mapping,
    maybe,
    number,
    one_of,
    percent,
    record,
    sequence,
    text,
)
from lab.tasks import TASKS
from lab.tasks.cifar10 import CLASSES
from mobilevit import MIN_IMG_SIZE

FORMAT = 2
MAX_IMG_SIZE = 4096  # pixels a side
MAX_CLASSES = 10**6
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile


def tensor(value, where: str) -> None:
    """Raise BadInput unless `value` is a plain tensor of finite real numbers on the CPU."""
    if not isinstance(value, Tensor):
        raise BadInput(f"{where} is a {type(value).__name__}, but should be a tensor")
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.is_complex():
        raise BadInput(
            f"{where} is {value.dtype}, {value.layout} on {value.device}, "
            "but should be a plain tensor of real numbers"
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise BadInput(f"{where} has the shape {list(value.shape)}, but holds fewer values")
    if value.is_floating_point() and not value.float().isfinite().all():
        raise BadInput(f"{where} has values that are not finite")


def plain(value, where: str) -> None:
    """Raise BadInput unless `value` is None, a flag, text, a finite number, or a list of these."""
    for part in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(part, bool | int | float | str | None):
            raise BadInput(f"{where} holds a {type(part).__name__}, but should be a plain value")
        if isinstance(part, float) and not math.isfinite(part):
            raise BadInput(f"{where} is {part}, but should be finite")


def whole(value, where: str) -> None:
    """Raise BadInput unless `value` is a setting of a network: `plain`, with whole numbers alone.

    A flag may stand alone, but not in a list.
    """
    plain(value, where)
    is_list = isinstance(value, list | tuple)
    no_integer = float | bool if is_list else float  # a setting can be a flag
    if any(isinstance(part, no_integer) for part in (value if is_list else [value])):
        raise BadInput(f"{where} is {value}, but should hold whole numbers")


def like(example) -> Schema:
    """Return the schema of a state dict with the keys, shapes and types of `example`.

    All values in it must be finite.
    """

    def check(value, where):
        if isinstance(example, dict):
            if not isinstance(value, dict):
                raise BadInput(f"{where} is a {type(value).__name__}, but should be a mapping")
            for key in example.keys() ^ value.keys():
                has = "lacks" if key in example else "has an unknown"
                raise BadInput(f"{where} {has} {shortened(key)}")
            for key, part in example.items():
                like(part)(value[key], f"{where}: {key}")
        elif isinstance(example, Tensor):
            tensor(value, where)
            theirs, ours = ((x.dtype, list(x.shape)) for x in (value, example))
            if theirs != ours:
                raise BadInput(f"{where} is {theirs}, but should be {ours}")
        else:
            plain(value, where)
            if type(value) is not type(example):
                raise BadInput(f"{where} is {value}, but should be like {example}")

    return check


def settings(value, where: str) -> None:
    """Raise BadInput unless `value` is what builds a network: num_classes, and others it takes."""
    record({"num_classes": integer(1, MAX_CLASSES)})(value, where)
    mapping(whole)(value, where)


def config(value, where: str) -> None:
    """Raise BadInput unless `value` holds the options of a run, as plain values.

    `val_size`, where it is given, is None or at least 1: later commands must know which images the
    run held out.
    """
    mapping(plain)(value, where)
    record({}, optional={"val_size": maybe(integer(1))})(value, where)


of_channels = sequence(number(), 3)
PIXELS = {  # how a photo becomes the network's input, where that is known
    "normalize": record({"mean": of_channels, "std": sequence(number(1e-6), 3)}),
    "resize": record(
        {
            "crop": number(0.1, 1),
            "interpolation": one_of("bilinear", "bicubic"),
            "stretch": flag,
        }
    ),
}
CHECKPOINT = record(
    {
        "model": one_of(*MODELS),
        "settings": settings,
        "task": text,
        "classes": sequence(text),
        "img_size": integer(MIN_IMG_SIZE, MAX_IMG_SIZE),
        "state_dict": mapping(tensor),
        "epoch": integer(0),
        "config": config,
    },
    optional=PIXELS,
)


def save_checkpoint(path, checkpoint: dict) -> None:
    """Write `checkpoint` to `path`, whole or not at all."""
    content = io.BytesIO()
    torch.save(checkpoint, content)  # not to the file, as a full disk would be a RuntimeError
    with atomic(path) as new:
        new.write_bytes(content.getbuffer())


def read_tensors(path) -> dict:
    """Return the dict that a file of tensors and plain values holds, on the CPU.

    BadInput for a file that is missing or damaged, or holds anything else.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum
                damaged = archive.testzip()
            if damaged:
                raise BadInput(f"{path} is damaged: the checksum of {damaged} does not fit")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors that are refused later
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadInput(f"no checkpoint at {path}") from error
    except BadInput:
        raise
    except Exception as error:  # truncated, no archive, pickled objects: torch has no common base
        reason = str(error).split("\n")[0].split(". ")[0]
        raise BadInput(f"{path} is not a readable checkpoint of tensors: {reason}") from error
    if not isinstance(loaded, dict):
        raise BadInput(f"{path} holds a {type(loaded).__name__}, but should hold a dict")
    return loaded


def load_checkpoint(path) -> dict:
    """Read and check a checkpoint, and return it with the keys of format 2.

    BadInput names what it lacks or has wrong.
    """
    checkpoint = read_tensors(path)
    version = checkpoint.get("format", 1)
    if not isinstance(version, int) or version not in (1, FORMAT):
        raise BadInput(
            f"{path} has checkpoint format {shortened(version)}, this code reads format {FORMAT}"
        )
    if "state_dict" not in checkpoint:
        raise BadInput(
            f"{path} is not a checkpoint of this project: it lacks state_dict; mere weights go to "
            "--weights"
        )
    if version == 1:
        checkpoint = _from_format_1(checkpoint, path)
    CHECKPOINT(checkpoint, str(path))
    task = TASKS.get(checkpoint["task"])
    metric = task.objective.METRIC if task else "accuracy_pct"
    scores = {f"{split}_{metric}": maybe(percent) for split in ("test", "val")}
    record(scores)(checkpoint, str(path))
    n = checkpoint["settings"]["num_classes"]
    if n != len(checkpoint["classes"]):
        raise BadInput(f"{path} names {len(checkpoint['classes'])} classes of {n}")
    return checkpoint


def _from_format_1(old: dict, path) -> dict:
    record(
        {
            "model": text,
            "num_classes": integer(1, MAX_CLASSES),
            "heads": sequence(integer(1), 3),
            "config": record({"dataset": text, "val_size": integer(1)}),
        }
    )(old, str(path))
    n = old["num_classes"]
    return old | {
        "model": full_name(old["model"]),
        "settings": {"num_classes": n, "heads": list(old["heads"])},
        "task": old["config"]["dataset"],
        "classes": list(CLASSES) if n == len(CLASSES) else [f"class {k}" for k in range(n)],
        "test_accuracy_pct": old.get("test_accuracy_pct"),
        "val_accuracy_pct": old.get("val_accuracy_pct"),
    }


def without_prefix(state_dict: dict) -> dict:
    """Return the state dict without the prefixes of DataParallel and torch.compile.

    They give them to every name.
    """
    for prefix in PREFIXES:
        if state_dict and all(name.startswith(prefix) for name in state_dict):
            return without_prefix({n.removeprefix(prefix): t for n, t in state_dict.items()})
    return state_dict


def load_state(model: nn.Module, state_dict: dict, path) -> None:
    """Load `state_dict`, which the file `path` holds, into `model`.

    A prefix of DataParallel or torch.compile is taken off. BadInput names the first tensor that
    does not fit.
    """
    state_dict, ours = without_prefix(state_dict), model.state_dict()
    wrong = [f"lacks {name}" for name in ours if name not in state_dict]
    wrong += [f"has {name}, which the network has not" for name in state_dict if name not in ours]
    wrong += [
        f"has {name} as {list(t.shape)} instead of {list(ours[name].shape)}"
        for name, t in state_dict.items()
        if name in ours and t.shape != ours[name].shape
    ]
    wrong += [
        f"has {name} as {t.dtype} instead of {ours[name].dtype}"
        for name, t in state_dict.items()
        if name in ours and t.is_floating_point() != ours[name].is_floating_point()
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more such things)" if len(wrong) > 1 else ""
        raise BadInput(f"{path} does not fit the network: it {wrong[0]}{more}")
    model.load_state_dict(state_dict)


def load_weights(model: nn.Module, name: str, checkpoint: dict, path) -> None:
    """Load a checkpoint into `model`, the network `name`.

    BadInput if it holds another network, or one with other settings.
    """
    theirs = checkpoint["model"], checkpoint["settings"]
    ours = name, settings_of(model)
    if theirs != ours:
        (their_name, theirs), (our_name, ours) = theirs, ours
        raise BadInput(
            f"{path} holds {their_name} with {theirs}, but asked for is {our_name} with {ours}"
        )
    load_state(model, checkpoint["state_dict"], path)


def network(checkpoint: dict, path) -> nn.Module:
    """Return the network in a checkpoint that was read from `path`.

    BadInput if settings, size of the images or weights do not fit each other.
    """
    try:
        model = build(checkpoint["model"], **checkpoint["settings"])
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from error
    if settings_of(model) != checkpoint["settings"]:  # with another default, weights fit as well
        given, all_of_them = checkpoint["settings"], settings_of(model)
        raise BadInput(f"{path}: settings are {given}, but should name all: {all_of_them}")
    require_img_size(model, checkpoint["img_size"], str(path))
    load_state(model, checkpoint["state_dict"], path)
    return model


def model_from_checkpoint(path) -> tuple[nn.Module, dict]:
    """Return the network in a checkpoint, and the checkpoint.

    The network computes in floats and is in evaluation mode and channels-last.
    """
    checkpoint = load_checkpoint(path)
    model = network(checkpoint, path)
    return model.eval().to(memory_format=torch.channels_last), checkpoint
