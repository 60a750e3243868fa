"""Weights in and out: this project's checkpoints and timm's ImageNet weights.

A checkpoint is a file of tensors and plain values: {"format", "model": variant, "num_classes",
"heads", "img_size", "state_dict", "test_accuracy_pct", "val_accuracy_pct", "epoch", "config",
"commit"}.
It is always read with `weights_only=True`, so it can't run code.
"""

import torch

from lab.cli import BadInput
from lab.files import atomic
from mobilevit import MobileViT, from_timm

FORMAT = 1  # of a checkpoint; one without a number is of the first, too
NETWORK_KEYS = ("model", "num_classes", "heads", "img_size", "state_dict", "config")


def save_checkpoint(path, checkpoint: dict) -> None:
    """Write `checkpoint` to `path`, whole or not at all."""
    with atomic(path) as tmp, open(tmp, "wb") as file:  # a full disk is then an OSError
        torch.save(checkpoint, file)


def load_checkpoint(path, keys=NETWORK_KEYS) -> dict:
    """Read a checkpoint onto the CPU; BadInput if it is unreadable or lacks one of `keys`."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadInput(f"no checkpoint at {path}") from error
    except Exception as error:  # truncated, no archive, pickled objects: torch has no common base
        reason = str(error).split("\n")[0].split(". ")[0]
        raise BadInput(f"{path} is not a readable checkpoint of tensors: {reason}") from error
    if isinstance(checkpoint, dict) and checkpoint.get("format", 1) != FORMAT:
        theirs = checkpoint["format"]
        raise BadInput(f"{path} has checkpoint format {theirs}, this code reads format {FORMAT}")
    missing = [k for k in keys if not isinstance(checkpoint, dict) or k not in checkpoint]
    if missing:
        raise BadInput(f"{path} is not a checkpoint of this project: it lacks {', '.join(missing)}")
    if keys is NETWORK_KEYS and not {"dataset", "val_size"} <= set(checkpoint["config"]):
        raise BadInput(f"{path} does not say which images it was trained on")
    return checkpoint


def load_weights(model: MobileViT, checkpoint: dict, path) -> None:
    """Load a checkpoint of the same network into `model`; BadInput names both sides otherwise."""
    theirs = (checkpoint["model"], checkpoint["num_classes"], checkpoint["heads"])
    ours = tuple(model.settings.values())
    if ours != theirs:
        what = "{} with {} classes and heads {}".format
        raise BadInput(f"{path} holds {what(*theirs)}, but asked for is {what(*ours)}")
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError) as error:
        raise BadInput(f"{path} does not fit mobilevit_{model.variant}: {error}") from error


def network(checkpoint: dict, path) -> MobileViT:
    """The network in a checkpoint that was read from `path`."""
    try:
        model = MobileViT(checkpoint["model"], checkpoint["num_classes"], checkpoint["heads"])
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path}: {error}") from error
    load_weights(model, checkpoint, path)
    return model


def model_from_checkpoint(path) -> tuple[MobileViT, dict]:
    """The float network in a checkpoint, in eval mode and channels-last, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    model = network(checkpoint, path)
    return model.eval().to(memory_format=torch.channels_last), checkpoint


def load_timm(model: MobileViT) -> None:
    """Load timm's ImageNet weights, all but the classifier, into a `model` with four heads."""
    try:
        import timm

        source = timm.create_model(f"mobilevit_{model.variant}", pretrained=True)
    except ImportError as error:
        raise BadInput("--pretrained needs timm: pip install timm") from error
    except (OSError, RuntimeError) as error:  # no network, or no such file on the hub
        raise BadInput(f"--pretrained: timm's weights can't be fetched ({error})") from error
    body = {k: v for k, v in from_timm(source.state_dict()).items() if "classifier." not in k}
    model.load_state_dict(model.state_dict() | body)
