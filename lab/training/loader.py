"""Training batches, made beside the training by processes of their own."""

from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lab.cli import BadInput
from lab.tasks.batches import TrainBatches
from lab.training.distributed import World, leave_process_group


class _Told(Dataset):
    """Batches by step, with the BadInput of one that can't be made in its place.

    As a value it leaves a worker as it is. Raised there, torch would put the worker's traceback
    into its message.
    """

    def __init__(self, batches: TrainBatches):
        self.batches = batches

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor] | BadInput:
        try:
            return self.batches[step]
        except BadInput as error:
            return error


def loader(
    batches: TrainBatches, steps: range, workers: int, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of `steps` in turn, made by `workers` processes, or by this one if 0.

    Raises the BadInput of a batch that can't be made.
    """
    made = DataLoader(
        _Told(batches),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=leave_process_group,
    )
    for batch in made:
        if isinstance(batch, BadInput):
            raise batch
        yield batch
