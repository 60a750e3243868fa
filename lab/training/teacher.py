"""A trained network whose answers another one learns."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.cli import BadInput
from lab.models import require_img_size
from lab.models.checkpoint import network
from lab.tasks.cifar10 import to_input
from lab.training.optimizer import arithmetic
from lab.training.schedule import Stage
from lab.training.start import checkpoint_for


class Teacher:
    """A frozen network, and the loss of a student that learns from it and from the labels.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015
    (arXiv:1503.02531), section 2; the sum is that of Touvron et al. (DeiT, ICML 2021), section 4.

    Args:
        path: its checkpoint, of the same task and of no image that the run holds out.
        weight: the share of its part in the loss, from 0 to 1.
        temperature: what both networks' logits are divided by in that part.
    """

    def __init__(self, path, task, classes, val_size, weight, temperature, device, precision):
        checkpoint = checkpoint_for(path, task, val_size)
        if (checkpoint["task"], len(checkpoint["classes"])) != (task, len(classes)):
            raise BadInput(f"{path} was trained on {checkpoint['task']}, not on this run's {task}")
        model = network(checkpoint, path).to(device, memory_format=torch.channels_last)
        self.model = model.eval().requires_grad_(False)
        self.name, self.img_size = checkpoint["model"], checkpoint["img_size"]
        self.weight, self.temperature = weight, temperature
        self.device, self.precision = device, precision

    def side(self, stage: Stage) -> int:
        """Return the pixels a side that the teacher is shown in `stage`.

        It sees the student's window, in images of its own size.
        """
        return self.img_size * stage.side // stage.img_size

    def require_sides(self, stages: list[Stage]) -> None:
        """Raise BadInput if it does not take the images of one of `stages`."""
        for stage in stages:
            window = torch.zeros(1, 3, stage.window, stage.window, device=self.device)
            try:
                require_img_size(self.model, self.side(stage), self.name)
                self.logits(window, stage)
            except (BadInput, ValueError) as error:
                raise BadInput(f"--teacher in windows of {stage.side}: {error}") from error

    @torch.no_grad()
    def logits(self, images: Tensor, stage: Stage) -> Tensor:
        """Return the teacher's logits float32 [b, K] of images uint8 [b, 3, w, w] on its device."""
        x = to_input(images, self.side(stage))
        with arithmetic(self.device.type, self.precision):
            return self.model(x).float()

    def loss(self, logits: Tensor, taught: Tensor, loss: Tensor) -> Tensor:
        """Return the weighted sum of `loss`, that of the labels, and what the teacher adds to it.

        That is the divergence of a student's `logits` [b, K] from those `taught` [b, K].
        """
        t = self.temperature
        student, teacher = (logits / t).log_softmax(1), (taught / t).log_softmax(1)
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return (1 - self.weight) * loss + self.weight * t**2 * divergence
