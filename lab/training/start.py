"""What a training run starts from: a network with fresh weights, or with those of another."""

import copy
from pathlib import Path

import torch
from torch import nn

from lab import machine
from lab.cli import BadInput
from lab.models import build, require_heads, require_img_size, require_mobilevit, settings_of
from lab.models import checkpoint as checkpoints
from lab.models.checkpoint import load_checkpoint, load_state, load_weights, network
from lab.models.foreign import load_timm, timm_layout
from lab.models.widen import widen
from lab.tasks.batches import require_classes, split


def network_settings(pairs: list[str] | None) -> dict:
    """Return what `--settings NAME=NUMBER NAME=NUMBER,NUMBER` says, as {name: number or list}.

    BadInput for other texts, and for num_classes, which the images say.
    """
    settings = {}
    for pair in pairs or ():
        name, _, value = pair.partition("=")
        if name == "num_classes":
            raise BadInput("--settings num_classes: the images say how many classes there are")
        try:
            numbers = [int(number) for number in value.split(",")]
        except ValueError as error:
            raise BadInput(f"--settings {pair}: give NAME=NUMBER or NAME=NUMBER,...") from error
        settings[name] = numbers if "," in value else numbers[0]
    return settings


def heads_to_build(name: str, heads: int | None, widened, pretrained: bool) -> int | None:
    """Return the attention heads to build the network `name` with, None for its own.

    BadInput if its heads can't be chosen, or if it can't be `widened` or start from timm's weights.
    """
    if heads is not None:
        require_heads(name)
    if widened:
        require_mobilevit(name, "--widen")
    return timm_layout(name).heads if pretrained else heads


def fresh_model(
    name: str,
    num_classes: int,
    heads: int | None,
    seed: int,
    sides: list[int],
    settings: dict | None = None,
) -> nn.Module:
    """Return the network `name` with random weights, drawn with `seed`.

    `heads` replace its variant's, unless None. BadInput if it does not take images of all `sides`,
    in pixels, or does not take its `settings`.
    """
    torch.manual_seed(seed)
    settings = settings or {}
    if heads is not None:
        if "heads" in settings:
            raise BadInput("--settings heads: --heads or --pretrained says already how many")
        settings = settings | {"heads": heads}
    try:
        model = build(name, num_classes=num_classes, **settings)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if not hasattr(model, "settings"):
        raise BadInput(f"{name} has no attribute settings, by which its weights are loaded later")
    checkpoints.settings(settings_of(model), f"what builds {name}")
    for side in sides:
        require_img_size(model, side, name)
    return model


def training_data(task, data_dir, val_size: int | None, n_processes: int):
    """Return the images of `task` to train on, those to choose weights on, and those to test on.

    The second are `val_size` of the first, held out, or the task's own if that is None. BadInput
    if that leaves no image to train on, or less than one to each process to choose on. The test
    images are looked for before the training, and read in the end.
    """
    data, test = (task.load(data_dir, train) for train in (True, False))
    require_classes(test, data.classes, "the test images", "the training images")
    if val_size is None:
        val = task.load_val(data_dir)
        require_classes(val, data.classes, "the validation images", "the training images")
        if len(val) < n_processes:
            raise BadInput(f"{len(val)} images to validate on leave none to some of {n_processes}")
        return data, val, test
    if not n_processes <= val_size < len(data):
        raise BadInput(
            f"--val-size {val_size} leaves nothing to some of {n_processes} processes, or none "
            f"of {len(data)} images to train on"
        )
    train, val = split(data.labels, val_size)
    return data[train], data[val], test


def load_start(model, name, *, init=None, widened=None, pretrained=False, task, val_size) -> None:
    """Give `model`, the network `name`, the weights to start from, if any.

    They come from one of three places: `init`, a checkpoint of the same network or of the
    classifier that is its backbone; `widened`, one of a narrower variant; or, if `pretrained`,
    timm's ImageNet weights, for which it must have the heads that `heads_to_build` says. BadInput
    if the checkpoint was trained on images of `task` that a run with `val_size` holds out.
    """
    if init:
        checkpoint = checkpoint_for(init, task, val_size)
        if hasattr(model, "backbone") and checkpoint["model"] != name:
            load_backbone(model.backbone, checkpoint, init)
        else:
            load_weights(model, name, checkpoint, init)
    elif widened:
        narrow = checkpoint_for(widened, task, val_size)
        require_mobilevit(narrow["model"], "--widen")
        try:
            widen(network(narrow, widened), model)
        except ValueError as error:
            raise BadInput(f"{widened}: {error}") from error
    elif pretrained:
        load_timm(model, name)


def load_backbone(backbone: nn.Module, checkpoint: dict, path) -> None:
    """Give `backbone`, a MobileViT without its classifier, the weights of a whole one."""
    require_mobilevit(checkpoint["model"], "--init of a backbone")
    whole = network(checkpoint, path)
    (theirs, ours) = ((net.variant, net.heads, net.patches) for net in (whole, backbone))
    if theirs != ours:
        raise BadInput(f"{path} has variant, heads and patches {theirs}, the backbone has {ours}")
    names = backbone.state_dict()
    load_state(backbone, {k: v for k, v in whole.state_dict().items() if k in names}, path)


def checkpoint_for(path, task: str, val_size: int | None) -> dict:
    """Return the checkpoint at `path`, trained on no image that a run with `val_size` holds out.

    BadInput if it was trained on some of them, or does not say.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint["task"] == task and val_size is not None:  # else nothing of it is held out
        held_out = checkpoint["config"].get("val_size")
        if held_out is None:
            raise BadInput(f"{path} does not say how many training images it held out: val_size")
        if held_out < val_size:
            raise BadInput(
                f"{path} was trained on images that this run holds out: "
                f"use its --val-size {held_out}"
            )
    return checkpoint


def require_memory(model: nn.Module, batch_size: int, side: int, value_bytes: int) -> None:
    """Raise BadInput if a training step on images of `side` pixels is sure not to fit in memory."""
    limit = machine.memory_bytes()
    # A quarter of a second, so only asked where images are large for this machine.
    if 50 * batch_size * 3 * side**2 * 4 < limit:
        return
    kept = value_bytes * values_kept(model, batch_size, side)
    if kept > limit:
        raise BadInput(
            f"a step on {batch_size} images of {side}x{side} takes {kept / 2**30:.0f} GiB or more, "
            f"this machine has {limit / 2**30:.0f}: take smaller images or batches"
        )


def values_kept(model: nn.Module, batch_size: int, side: int) -> int:
    """Return how many values a step keeps, at least, to go backward: the inputs of all layers."""
    inputs = {}

    def keep(module, args):
        inputs[id(args[0])] = args[0]

    layers = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm)
    model = copy.deepcopy(model).to("meta")  # shapes without values: nothing is computed
    for module in model.modules():
        if isinstance(module, layers):
            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(torch.empty(batch_size, 3, side, side, device="meta"))
    return sum(x.numel() for x in inputs.values())


def require_no_run(output: Path) -> None:
    """Raise BadInput if the folder of a run holds one already."""
    if any((output / name).exists() for name in ("best.pth", "last.pth")):
        raise BadInput(f"{output} already holds a run: --resume it or choose another --output")


def require_compiler(device: torch.device) -> None:
    """Raise BadInput unless torch.compile works for `device`: it needs a compiler of C++."""
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except Exception as error:  # what its backends raise has no common base
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"--compile: torch can't compile here: {reason}") from error
