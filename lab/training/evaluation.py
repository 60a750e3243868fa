"""What a network makes of images: of those held out while it trains, and of the test set."""

import torch
from torch import Tensor

from lab.cli import BadInput
from lab.engines.measure import CPU_BATCH, over
from lab.models.checkpoint import model_from_checkpoint
from lab.tasks import TASKS
from lab.tasks.batches import EvalBatches

EVAL_BATCH = {"cpu": CPU_BATCH, "cuda": 200}  # images of at most 256x256
TRAINABLE = ("cifar10", "synthetic", "detection")  # the tasks that train.py knows


def judged(model, data, img_size: int, task, device: torch.device) -> tuple[Tensor, ...]:
    """What the objective of `task` keeps of `model`'s answers to `data`, a row an image.

    On a CPU, each core takes batches of its own.
    """
    batch_size = max(1, EVAL_BATCH[device.type] * 256**2 // max(256, img_size) ** 2)
    batches = EvalBatches(data, img_size, batch_size, device)

    def act(x, labels):
        return task.objective.judge(model(x).float(), labels)

    return over(batches, act, torch.get_num_threads() if device.type == "cpu" else 1)


def trained_task(checkpoint: dict, path):
    """The module of the task that train.py trained the checkpoint at `path` on."""
    if checkpoint["task"] not in TRAINABLE:
        known = " and ".join(TRAINABLE)
        raise BadInput(f"{path} was trained on {checkpoint['task']}, --eval knows {known}")
    return TASKS[checkpoint["task"]]


def test_score(path, data_dir, device) -> tuple[dict, str]:
    """The score of a checkpoint on its task's test images, at its image size, also in words."""
    model, checkpoint = model_from_checkpoint(path)
    task = trained_task(checkpoint, path)
    test = task.load(data_dir, train=False)
    if len(test.classes) != len(checkpoint["classes"]):
        n = len(checkpoint["classes"])
        raise BadInput(
            f"{path} tells {n} classes apart, {checkpoint['task']} has {len(test.classes)}"
        )
    device = torch.device(device)
    columns = judged(model.to(device), test, checkpoint["img_size"], task, device)
    score = task.objective.score(*columns, test.classes)
    return score, task.objective.written(score)
