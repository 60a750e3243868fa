"""What a network makes of images: of those held out while it trains, and of the test set."""

import torch
from torch import Tensor

from lab.cli import BadInput
from lab.engines.measure import CPU_BATCH, predict
from lab.models.checkpoint import model_from_checkpoint
from lab.tasks import TASKS
from lab.tasks.batches import EvalBatches
from lab.tasks.cifar10 import Images

EVAL_BATCH = {"cpu": CPU_BATCH, "cuda": 200}  # images of at most 256x256
TRAINABLE = ("cifar10", "synthetic")  # tasks whose images are 32x32 and all in memory


def evaluated(model, images: Images, img_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits and labels of `images`; on a CPU, each core takes batches of its own."""
    batch_size = max(1, EVAL_BATCH[device.type] * 256**2 // max(256, img_size) ** 2)
    batches = EvalBatches(images, img_size, batch_size, device)
    return predict(model, batches, torch.get_num_threads() if device.type == "cpu" else 1)


def test_accuracy(path, data_dir, device) -> tuple[int, int]:
    """Correct and all test images of a checkpoint's task, at its image size."""
    model, checkpoint = model_from_checkpoint(path)
    task = checkpoint["task"]
    if task not in TRAINABLE:
        raise BadInput(f"{path} was trained on {task}, --eval knows {' and '.join(TRAINABLE)}")
    test = TASKS[task].load(data_dir, train=False)
    if len(test.classes) != len(checkpoint["classes"]):
        n = len(checkpoint["classes"])
        raise BadInput(f"{path} tells {n} classes apart, {task} has {len(test.classes)}")
    device = torch.device(device)
    logits, labels = evaluated(model.to(device), test, checkpoint["img_size"], device)
    return int((logits.argmax(1) == labels).sum()), len(labels)
