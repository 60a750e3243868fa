"""A checkpoint with its images: the float network, test images, calibration batches."""

import contextlib
import functools
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import ptq
from lab.cli import BadInput, shortened
from lab.files import sha256
from lab.models import TASK_OF, require_img_size, require_task, run_name, settings_of
from lab.models.checkpoint import model_from_checkpoint
from lab.models.foreign import as_checkpoint, read_weights
from lab.tasks import TASKS, classification
from lab.tasks.batches import EvalBatches, balanced_subset, require_classes, split
from lab.tasks.cifar10 import MEAN, STD
from lab.tasks.imagefolder import RESIZE, Photos

ADAPT_IMAGES, ADAPT_BATCH = 256, 32  # that batch norms meet another image size with
LABELLED = 64  # images at a time, as masks take memory


@dataclass(frozen=True, eq=False)  # each is its own, so that what is made of it can be kept
class Subject:
    """A float network with the images that it is quantized and judged on.

    `name`: model and task, as tables call it. `images`: those of `split`, "test" or "held-out".
    `seed` chooses among the training images those to calibrate on.
    """

    path: Path
    sha256: str
    name: str
    model: nn.Module
    checkpoint: dict
    task: str
    img_size: int
    split: str
    images: object
    data_dir: str
    seed: int

    @property
    def folder(self) -> str:
        """Return the name of the folder of its rows.

        There is one for each run, so that no other run's rows get among those of shipped weights.
        """
        run = self.path.resolve().parent
        name = run.parent.name if run.name == self.name else run.name  # of runs/mobilevit_xxs: runs
        shipped = run.is_relative_to(Path(__file__).parents[1] / "checkpoints")
        return self.name if name == "checkpoints" and shipped else f"{self.name}-{name}"

    @property
    def classifies(self) -> bool:
        """Say whether its answer to an image is one class."""
        return TASKS[self.task].objective is classification

    @property
    def adapts(self) -> bool:
        """Say whether images have another size than the network was trained at."""
        return self.img_size != self.checkpoint["img_size"]

    def sample(self, img_size: int) -> Tensor:
        """Return one image [1, 3, S, S] for timing."""
        return self.images[:1].inputs(img_size)

    @functools.cached_property
    def network(self) -> nn.Module:
        """Return the float network, its batch norms adapted to the size of the images."""
        if not self.adapts:
            return self.model
        images, _ = self.calibration(ADAPT_IMAGES)
        sizes = (self.img_size, self.checkpoint["img_size"])
        return ptq.adapted(self.model, *(EvalBatches(images, s, ADAPT_BATCH) for s in sizes))

    @functools.cached_property
    def train(self):
        """Return the training images."""
        images = TASKS[self.task].load(self.data_dir, train=True)
        return as_known(images, self.task, self.checkpoint)

    def calibration(self, n: int) -> tuple[object, dict]:
        """Return `n` training images, or all if there are fewer, and their description.

        They are drawn with `seed`, as many of each class where an image has one class. Images that
        the run held out are not among them. The description is {"n", "seed", "indices_sha256"}.
        """
        none = torch.zeros(len(self.train), dtype=torch.int64)
        labels = self.train.labels if self.classifies else none
        val_size = held_out_size(self.checkpoint, self.task)
        usable = split(labels, val_size)[0] if val_size else torch.arange(len(labels))
        n = min(n, len(usable))
        chosen = balanced_subset(labels, usable, n, self.seed)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
        digest = sha256(chosen.numpy().tobytes())
        return self.train[chosen[order]], {"n": n, "seed": self.seed, "indices_sha256": digest}

    def calibration_batches(self, recipe, n: int) -> tuple[EvalBatches | None, dict]:
        """Return what `recipe` calibrates on, `n` images in all, and their description.

        None and {"n": 0} if `n` is 0.
        """
        if n == 0:
            return None, {"n": 0}
        images, described = self.calibration(n)
        return EvalBatches(images, self.img_size, recipe.calibration_batch), described

    @functools.cached_property
    def images_sha256(self) -> str:
        """Return the digest of the images' labels, and of their files' names and sizes, if any."""
        digest = hashlib.sha256()
        for i in range(0, len(self.images), LABELLED):
            some = self.images[i : i + LABELLED]
            of_files = [(file.name, file.stat().st_size) for file in getattr(some, "files", ())]
            digest.update(repr(of_files).encode())
            digest.update(some.labels.numpy().tobytes())
        return digest.hexdigest()

    def origin(self, recipe) -> dict:
        """Return what a result says of the network, its images and the recipe."""
        return {
            "model": self.name,
            "settings": json.loads(json.dumps(settings_of(self.model))),  # as a file gives it back
            "task": self.task,
            "split": self.split,
            "img_size": self.img_size,
            "checkpoint_sha256": self.sha256,
            "images_sha256": self.images_sha256,
            "recipe": recipe.asdict(),
        }

    def identity(self, recipe, engine: str, n_calibration: int, latency_runs: int) -> dict:
        """Return what makes a row the same row: asked for again, it need not be measured again."""
        return self.origin(recipe) | {
            "engine": engine,
            "seed": self.seed,
            "calibration_images": n_calibration,
            "adapt_images": ADAPT_IMAGES if self.adapts else None,
            "n_images": len(self.images),
            "latency_runs": latency_runs,
        }


@contextlib.contextmanager
def named(recipe: str):
    """Turn an error into a BadInput that names the recipe.

    The reason is weights or calibration images that do not suit it, or a package that it lacks.
    """
    try:
        yield
    except (ValueError, ImportError) as error:
        raise BadInput(f"recipe {recipe}: {error}") from error


@functools.lru_cache(maxsize=1)  # for rows of one checkpoint, one after the other
def load_subject(
    path,
    data_dir: str,
    task: str | None = None,
    img_size: int | None = None,
    held_out: bool = False,
    n_images: int | None = None,
    seed: int = 0,
    weights_of: str | None = None,
    heads: int | None = None,
) -> Subject:
    """Return the checkpoint at `path` with the images of its task, or of `task`.

    `img_size`: side of the images in pixels, if not the one that it was trained at. `held_out`:
    judge on the images that its run chose the weights on, not on the test images. `n_images`: only
    the first so many. `seed`: of the choice of calibration images. `weights_of`: the file holds
    mere weights of the network of this name, ours or another project's, with `heads` attention
    heads if not the usual number. BadInput if the checkpoint or the images are no good or do not
    fit each other.
    """
    path = Path(path)
    digest = sha256(path) if path.is_file() else None
    if weights_of:
        task = task or TASK_OF.get(weights_of, "imagefolder")
        require_task(weights_of, task)
        model, layout = read_weights(path, weights_of, heads)
    else:
        model, checkpoint = model_from_checkpoint(path)
        task = task or checkpoint["task"]
        require_task(checkpoint["model"], task)
    if task not in TASKS:
        raise BadInput(f"{path} was trained on {task}: known are {', '.join(TASKS)}")
    if sha256(path) != digest:
        raise BadInput(f"{path} changed while it was read: try again")
    source = TASKS[task]
    if img_size:
        require_img_size(model, img_size, "--img-size")
    own_val = held_out and hasattr(source, "load_val")
    images = source.load_val(data_dir) if own_val else source.load(data_dir, train=held_out)
    if weights_of:
        checkpoint = as_checkpoint(model, weights_of, layout, images.classes, str(path))
    images = as_known(images, task, checkpoint)
    if held_out and not own_val:
        val_size = held_out_size(checkpoint, task)
        if not val_size:
            raise BadInput(f"{path} does not say how many training images its run held out")
        images = images[split(images.labels, val_size)[1]]
    return Subject(
        path=path,
        sha256=digest,
        name=run_name(checkpoint["model"], task),
        model=model,
        checkpoint=checkpoint,
        task=task,
        img_size=img_size or checkpoint["img_size"],
        split="held-out" if held_out else "test",
        images=images[:n_images],
        data_dir=data_dir,
        seed=seed,
    )


def held_out_size(checkpoint: dict, task: str) -> int | None:
    """Return how many training images of `task` a checkpoint's run held out.

    None if it had its own to choose weights on, was trained on another task, or does not say.
    """
    return checkpoint["config"].get("val_size") if task == checkpoint["task"] else None


def as_known(images, task: str, checkpoint: dict):
    """Return `images` of `task` with pixels and labels as the checkpoint's network knows them.

    BadInput if the network tells other classes apart. Folders of photos may name all of them
    otherwise, as by WordNet's ids: their order then counts.
    """
    ours, theirs = images.classes, tuple(checkpoint["classes"])
    if len(ours) != len(theirs):
        raise BadInput(f"{task} has {len(ours)} classes, the network tells {len(theirs)} apart")
    foreign = [name for name in ours if name not in theirs]
    if ours != theirs and not foreign and TASKS[task].objective is classification:
        number = torch.tensor([theirs.index(name) for name in ours])
        images = replace(images, labels=number[images.labels], classes=theirs)
    elif task == checkpoint["task"] and not isinstance(images, Photos):
        require_classes(images, theirs, "the images", "the checkpoint")
    elif 0 < len(foreign) < len(ours):
        known = shortened(", ".join(theirs))
        raise BadInput(f"{task} has a class {foreign[0]}, which the network does not know: {known}")
    if isinstance(images, Photos):
        pixels = {"normalize": {"mean": MEAN, "std": STD}, "resize": RESIZE}
        images = replace(images, **{k: checkpoint.get(k, v) for k, v in pixels.items()})
    return images
