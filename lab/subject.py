"""One checkpoint on the bench: every recipe on every engine as one row, kept when it is there."""

import contextlib
import functools
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import ptq
from lab import files, machine
from lab.cli import BadInput
from lab.engines import EngineMissing, onnx_runtime, torch_eager
from lab.engines.measure import CPU_BATCH, latency, predict
from lab.engines.registry import PEERS
from lab.models.checkpoint import model_from_checkpoint
from lab.tasks import cifar10
from lab.tasks.batches import EvalBatches, balanced_subset, split
from ptq import packing
from ptq.analysis.sensitivity import sensitivities
from ptq.layers import QuantizedAttentionCore, QuantizedLayer, Quantizer
from ptq.packing import estimated_size_bytes, packed
from ptq.recipe import Recipe

# Of the images for calibration, on which a report per layer looks at the logits.
REPORT_IMAGES, REPORT_BATCH = 64, 16
ADAPT_IMAGES, ADAPT_BATCH = 256, 32  # that batch norms meet another image size with
PARITY_IMAGES = 200  # that an exported file is checked on


@dataclass(frozen=True)
class Prepared:
    """A quantized network, before any engine: `file_bytes` of its packed file, where it has one,
    `described` its calibration images, and the `seconds` that it took."""

    recipe: Recipe
    network: torch.nn.Module
    file_bytes: int | None
    batches: EvalBatches | None
    described: dict
    seconds: float


class Workbench:
    """One checkpoint with its test images, ready to measure recipes on."""

    def __init__(self, path, args):
        self.path, self.args = Path(path), args
        self.model, self.checkpoint = model_from_checkpoint(path)
        cifar10.require_known(self.checkpoint, path)
        self.config = self.checkpoint["config"]
        self.img_size = args.img_size or self.checkpoint["img_size"]
        self.sha256 = files.sha256(self.path)
        dataset = self.config["dataset"]
        self.name = files.model_name(self.checkpoint["model"], dataset)
        images = cifar10.load(dataset, args.data_dir, train=args.held_out)
        if args.held_out:
            images = images[split(images.labels, self.config["val_size"])[1]]
        self.images = images[: args.test_images]
        self.split = "held-out" if args.held_out else "test"
        self.prepared = None
        # One image [1, 3, S, S] for timing, also at the size that the network was trained for.
        self.sample, self.trained_sample = (
            cifar10.to_input(self.images.images[:1], size)
            for size in (self.img_size, self.checkpoint["img_size"])
        )

    def identity(self, recipe, engine) -> dict:
        """What makes a row the same row: asked for again, it need not be measured again."""
        return {
            "model": self.name,
            "dataset": self.config["dataset"],
            "split": self.split,
            "img_size": self.img_size,
            "checkpoint_sha256": self.sha256,
            "recipe": recipe.asdict(),
            "engine": engine.NAME,
            "seed": self.args.seed,
            "calibration_images": self.n_calibration(recipe),
            "adapt_images": ADAPT_IMAGES if self.adapts else None,
            "n_images": len(self.images),
            "latency_runs": self.args.latency_runs,
        }

    def n_calibration(self, recipe) -> int:
        asked_for = self.args.calibration_images or recipe.calibration_images
        return recipe.calibration_images and asked_for

    def row_path(self, recipe, engine) -> Path:
        split = "" if self.split == "test" else f"-{self.split}"
        return self.folder() / f"{recipe.name}{self.setting()}{split}@{engine.NAME}.json"

    def report_path(self, recipe) -> Path:
        return self.folder() / "per-layer" / f"{recipe.name}{self.setting()}.json"

    def setting(self) -> str:
        """What a file's name says of image size and seed where they are not the usual ones."""
        size = "" if self.img_size == 256 else f"-{self.img_size}"
        return size + (f"-seed{self.args.seed}" if self.args.seed else "")

    def folder(self) -> Path:
        """One for each run, so that rows of one's own never get among those of shipped weights."""
        run = self.path.resolve().parent
        name = run.parent.name if run.name == self.name else run.name  # runs/mobilevit_xxs: runs
        suffix = "" if name == "checkpoints" else f"-{name}"
        return Path(self.args.output, self.name + suffix)

    @property
    def adapts(self) -> bool:
        """Whether images have another size than the network was trained at."""
        return self.img_size != self.checkpoint["img_size"]

    @functools.cached_property
    def network(self) -> torch.nn.Module:
        """The float network, its batch norms adapted to the size of the images."""
        if not self.adapts:
            return self.model
        images, _ = self.calibration(ADAPT_IMAGES)
        sizes = (self.img_size, self.checkpoint["img_size"])
        return ptq.adapted(self.model, *(EvalBatches(images, s, ADAPT_BATCH) for s in sizes))

    def calibration(self, n: int) -> tuple[cifar10.Images, dict]:
        """`n` training images, drawn by classes alike, and their description."""
        train = cifar10.load(self.config["dataset"], self.args.data_dir, train=True)
        usable, _ = split(train.labels, self.config["val_size"])
        chosen = balanced_subset(train.labels, usable, n, self.args.seed)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.args.seed))
        digest = files.sha256(chosen.numpy().tobytes())
        return train[chosen[order]], {"n": n, "seed": self.args.seed, "indices_sha256": digest}

    def batches(self, recipe) -> tuple[EvalBatches | None, dict]:
        """What the recipe calibrates on, and its description."""
        n = self.n_calibration(recipe)
        if n == 0:
            return None, {"n": 0}
        images, described = self.calibration(n)
        return EvalBatches(images, self.img_size, recipe.calibration_batch), described

    def prepare(self, recipe) -> Prepared:
        """Calibration images and quantized network, made once for all engines of a recipe."""
        if self.prepared is None or self.prepared.recipe is not recipe:
            model, began = self.network, time.monotonic()
            batches, described = self.batches(recipe)
            with named(recipe):
                network, file_bytes = ptq.quantize(model, recipe, batches), None
            if recipe.layers:
                network, file_bytes = reloaded(network, recipe, model)
            seconds = time.monotonic() - began
            self.prepared = Prepared(recipe, network, file_bytes, batches, described, seconds)
        return self.prepared

    def measure(self, recipe, engine) -> dict:
        """Quantize, store, load, evaluate, time; the whole row."""
        version = engine.version()  # before long work: it may be missing
        prepared, began = self.prepare(recipe), time.monotonic()
        loaded = engine.load(prepared.network, recipe, prepared.batches, self.sample)
        quantize_s = prepared.seconds + time.monotonic() - began
        size_bytes = loaded.size_bytes or prepared.file_bytes
        if size_bytes is None and recipe.storable:
            size_bytes = written_size_bytes(packed(loaded.state, recipe))
        elif size_bytes is None:
            size_bytes = estimated_size_bytes(self.model, recipe)
        images = EvalBatches(self.images, self.img_size, CPU_BATCH)
        logits, labels = predict(loaded.run, images, self.args.workers)
        if not logits.isfinite().all():
            raise BadInput("the logits are not finite")
        predictions = logits.argmax(1)
        n_correct = int((predictions == labels).sum())
        timed = {
            "row": lambda: loaded.run(self.sample),
            "fp32": lambda: self.model(self.trained_sample),
        }
        times = latency(timed, self.args.latency_runs)
        return self.identity(recipe, engine) | {
            "checkpoint": str(self.path),
            "engine_version": version,
            "simulated": recipe.simulated and engine is torch_eager,
            "n_correct": n_correct,
            "accuracy_pct": 100 * n_correct / len(labels),
            "predictions": "".join(str(k) for k in predictions.tolist()),
            "confusion": confusion(labels, predictions),
            "size_bytes": size_bytes,
            "size_is_estimate": not recipe.storable and loaded.size_bytes is None,
            "products": loaded.products and loaded.products | asked_for(prepared),
            "latency_ms": times["row"],
            "fp32_latency_ms": times["fp32"],
            "calibration": prepared.described,
            "quantize_s": quantize_s,
            "wall_s": prepared.seconds + time.monotonic() - began,
            **machine.provenance(),
        }

    def parity(self, recipe, path) -> str:
        """On how many training images ONNX Runtime predicts with an exported file what the
        simulation does, in words."""
        images, described = self.calibration(PARITY_IMAGES)
        batches = EvalBatches(images, self.img_size, CPU_BATCH)
        with tempfile.TemporaryDirectory() as folder:  # the engine leaves a file beside its own
            try:
                run = onnx_runtime.loaded(Path(shutil.copy(path, folder))).run
            except (EngineMissing, ValueError) as reason:  # or its version can't read the file
                return f"not checked: {reason}"
            networks = (run, self.prepare(recipe).network)
            ours, theirs = (predict(n, batches, self.args.workers)[0].argmax(1) for n in networks)
        same = int((ours == theirs).sum())
        return f"predicts as simulated on {same} of {described['n']} training images"

    def report(self, recipe) -> dict:
        """Noise in the logits from each single tensor that a recipe of `looks_into` quantizes."""
        began = time.monotonic()
        batches, described = self.batches(recipe)
        shown = EvalBatches(batches.data[:REPORT_IMAGES], self.img_size, REPORT_BATCH)

        def logits(network):
            return predict(network, shown, self.args.workers)[0]

        with named(recipe):
            noises = looks_into(recipe)(self.network, recipe, batches, logits)
        identity = self.identity(recipe, torch_eager)
        kept_fields = ("model", "img_size", "checkpoint_sha256", "recipe", "seed")
        return {
            **{name: identity[name] for name in kept_fields},
            **noises,
            "n_images": len(shown.data),
            "calibration": described,
            "wall_s": time.monotonic() - began,
            **machine.provenance(),
        }


def looks_into(recipe):
    """The function that tells of each tensor that a recipe quantizes how much it changes, if there
    is one: for our recipes that calibrate layers, and for torch FX."""
    if recipe.peer:
        return getattr(PEERS[recipe.peer], "sensitivities", None)
    return sensitivities if recipe.layers and recipe.calibration_images else None


@contextlib.contextmanager
def named(recipe):
    """Name the recipe that weights or calibration images are no good for."""
    try:
        yield
    except ValueError as error:
        raise BadInput(f"recipe {recipe.name}: {error}") from error


def asked_for(prepared: Prepared) -> dict[str, dict[str, int]]:
    """Convolutions and matrix products whose factors are both quantized, {"asked": {...}}, or
    nothing of a network that is not quantized here."""
    if not prepared.recipe.layers:
        return {}
    counts = Counter()
    for module in prepared.network.modules():
        if isinstance(module, QuantizedLayer):
            if module.format and isinstance(module.input, Quantizer):
                counts["Conv" if isinstance(module.layer, nn.Conv2d) else "MatMul"] += 1
        elif isinstance(module, QuantizedAttentionCore):
            counts["MatMul"] += 2
    return {"asked": dict(counts)}


def confusion(labels, predictions) -> list[list[int]]:
    """Images of each true class (outer) that were given each class (inner)."""
    n = len(cifar10.CLASSES)
    return torch.bincount(n * labels + predictions, minlength=n**2).view(n, n).tolist()


def reloaded(quantized, recipe, model) -> tuple:
    """The network as it comes back from the file that it is stored in, and the file's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.safetensors")
        packing.save(quantized, recipe, path)
        return packing.load(path, model)[0], path.stat().st_size


def written_size_bytes(state: dict) -> int:
    """Bytes of a file that holds `state`, written to find out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        torch.save(state, path)
        return path.stat().st_size
