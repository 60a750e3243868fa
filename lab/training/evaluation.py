"""What a network makes of images: of those held out while it trains, and of the test set."""

from dataclasses import replace

import torch
from torch import Tensor

from lab.cli import BadInput
from lab.engines.measure import CPU_BATCH, over
from lab.models import default_img_size, settings_of
from lab.models.checkpoint import model_from_checkpoint
from lab.models.foreign import flip_colours, read_weights
from lab.tasks import TASKS, imagefolder
from lab.tasks.batches import EvalBatches, balanced_subset, require_classes
from lab.tasks.classification import top_pct

EVAL_BATCH = {"cpu": CPU_BATCH, "cuda": 200}  # images of at most 256x256
# MobileViT's top-1 and top-5 accuracy in percent on ImageNet's validation images (the paper's
# section 4.1).
PAPER = {"mobilevit_xxs": (69.0, 88.9), "mobilevit_xs": (74.8, 92.3), "mobilevit_s": (78.4, 94.1)}
PROBED = 200  # images by which the order of colours is decided
TRAINABLE = ("cifar10", "synthetic", "detection", "segmentation")  # the tasks that train.py knows


def judged(model, data, img_size: int, task, device: torch.device) -> tuple[Tensor, ...]:
    """Return what the objective of `task` keeps of `model`'s answers to `data`, a row an image.

    On a CPU, each core takes batches of its own.
    """
    batch_size = max(1, EVAL_BATCH[device.type] * 256**2 // max(256, img_size) ** 2)
    batches = EvalBatches(data, img_size, batch_size, device)

    def act(x, labels):
        return task.objective.judge(model(x).float(), labels)

    return over(batches, act, torch.get_num_threads() if device.type == "cpu" else 1)


def trained_task(checkpoint: dict, path):
    """Return the module of the task that train.py trained the checkpoint at `path` on.

    BadInput if that is no task of TRAINABLE.
    """
    if checkpoint["task"] not in TRAINABLE:
        known = ", ".join(TRAINABLE)
        raise BadInput(f"{path} was trained on {checkpoint['task']}; --eval knows {known}")
    return TASKS[checkpoint["task"]]


def score_on_test_set(path, data_dir, device) -> tuple[dict, str]:
    """Return the score of a checkpoint on its task's test images, and the same in words.

    The images have the checkpoint's size.
    """
    model, checkpoint = model_from_checkpoint(path)
    task = trained_task(checkpoint, path)
    test = task.load(data_dir, train=False)
    require_classes(test, checkpoint["classes"], "the test images", str(path))
    device = torch.device(device)
    columns = judged(model.to(device), test, checkpoint["img_size"], task, device)
    score = task.objective.score(*columns, test.classes)
    return score, task.objective.written(score)


def weights_score(path, name: str, heads: int | None, data_dir, device) -> str:
    """Return a line with the top-1 and top-5 accuracy, in percent, of the mere weights in a file.

    They are those of the network `name`, on photos in folders of classes. Where it is MobileViT of
    another project, both orders of colours are tried. What the paper reports is named beside any
    MobileViT of 1,000 classes.
    """
    model, layout = read_weights(path, name, heads)
    photos = imagefolder.load_all(data_dir)
    n, size = settings_of(model)["num_classes"], default_img_size(name)
    if len(photos.classes) != n:  # mere weights do not name their classes
        raise BadInput(f"{path} tells {n} classes apart, {data_dir} has {len(photos.classes)}")
    photos = replace(photos, **layout.pixels())
    model, device = model.to(device), torch.device(device)
    probed = layout.heads is not None  # MobileViT of another project
    colours = probed_colours(model, photos, size, device) if probed else ""
    logits, labels = judged(model, photos, size, imagefolder, device)
    top_1, top_5 = (top_pct(logits, labels, k) for k in (1, 5))
    printed = (
        f"{name} of {path} ({layout.name}{colours}): top-1 {top_1:.2f} %, top-5 {top_5:.2f} % "
        f"({len(labels)} images at {size})"
    )
    if name in PAPER and n == 1000:
        printed += "; the paper: {} and {} % of ImageNet's 50000".format(*PAPER[name])
    return printed


def probed_colours(model, photos, img_size: int, device: torch.device) -> str:
    """Leave `model` with the order of colours that scores higher on some of `photos`.

    Return words for a line: which order that is, and how many photos are right with each.
    """
    n = min(PROBED, len(photos))
    some = photos[balanced_subset(photos.labels, torch.arange(len(photos)), n, seed=0)]
    right = []
    for _ in range(2):  # as it is, then reversed; reversed again, it is as it was
        logits, labels = judged(model, some, img_size, imagefolder, device)
        right.append(int((logits.argmax(1) == labels).sum()))
        flip_colours(model)
    if right[1] > right[0]:
        flip_colours(model)
    kept = "as that project trains" if right[0] >= right[1] else "the reverse of that project's"
    return f", colours {kept}: {max(right)} of {n} right, else {min(right)}"
