"""A training run: everything that changes from step to step, and the files that hold it."""

import csv
import io
import math
import resource
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from lab import files, machine
from lab.cli import BadInput
from lab.engines.measure import CPU_BATCH, predict
from lab.models import build, settings_of
from lab.models.checkpoint import (
    FORMAT,
    load_checkpoint,
    load_timm,
    load_weights,
    network,
    read_tensors,
    save_checkpoint,
)
from lab.models.widen import widen
from lab.tasks import cifar10
from lab.tasks.batches import EvalBatches
from lab.training.distributed import World
from lab.training.optimizer import arithmetic, build_optimizer
from lab.training.schedule import Schedule

EVAL_BATCH = {"cpu": CPU_BATCH, "cuda": 200}  # images
# Options that a resumed run may be given anew, and those that are not about the run.
MAY_CHANGE = ("max_minutes", "workers", "resume", "data_dir", "output", "tensorboard")
DERIVED = ("eval", "checkpoint", "stages")
OPTIONS = {"world_size": "processes:"}  # what is none of train.py's own
SAVED = ("step", "seconds", "history", "best_accuracy", "config")  # besides the weights and sums


def build_model(args) -> nn.Module:
    torch.manual_seed(args.seed)
    try:
        heads = {"heads": 4 if args.pretrained else args.heads}
        settings = {k: v for k, v in heads.items() if v is not None}
        model = build(args.model, num_classes=len(cifar10.CLASSES), **settings)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if args.resume:
        return model
    source = args.init or args.widen
    if source:
        checkpoint = load_checkpoint(source)
        before = checkpoint["config"]
        if checkpoint["task"] == args.task and before["val_size"] < args.val_size:
            raise BadInput(
                f"{source} was trained on images that this run holds out: "
                f"use its --val-size {before['val_size']}"
            )
    if args.init:
        load_weights(model, args.model, checkpoint, args.init)
    elif args.widen:
        try:
            widen(network(checkpoint, args.widen), model)
        except ValueError as error:
            raise BadInput(f"{args.widen}: {error}") from error
    elif args.pretrained:
        load_timm(model, args.model)
    return model


class Run:
    """A training run: everything that changes from step to step, and its files."""

    def __init__(self, args, world: World, steps_per_epoch: int):
        self.args, self.world = args, world
        self.steps_per_epoch = steps_per_epoch
        self.schedule = Schedule(args.stages, self.steps_per_epoch, args.lr, args.warmup_epochs)
        self.model = build_model(args).to(world.device, memory_format=torch.channels_last)
        self.trained = world.parallel(world.synchronised(self.model))
        if args.compile:
            self.trained = torch.compile(self.trained)
        self.ema = None
        if args.ema_decay:
            average = get_ema_multi_avg_fn(args.ema_decay)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.optimizer = build_optimizer(self.model, args)
        self.scaler = torch.amp.GradScaler(enabled=args.precision == "fp16")
        self.tensorboard = None
        if args.tensorboard and world.rank == 0:
            self.tensorboard = tensorboard_writer(args.output / "tensorboard")
        self.step = 0
        # Of the epoch so far:
        self.sums = torch.zeros(3, device=world.device)  # loss, correct, gradient norm
        self.seconds = 0.0  # training only
        self.history = []  # a dict an epoch
        self.best_accuracy = -1.0
        options = {k: v for k, v in vars(args).items() if k not in (*MAY_CHANGE, *DERIVED)}
        self.config = options | {"world_size": world.size}

    def train_step(self, images, labels) -> None:
        args, device = self.args, self.world.device
        lr = self.schedule.lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x = cifar10.to_input(
            images.to(device, non_blocking=True), self.schedule.stages[self.step].side
        )
        labels = labels.to(device, non_blocking=True)
        with arithmetic(device.type, args.precision):
            logits = self.trained(x)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.label_smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), args.clip_norm)
        if self.scaler.is_enabled():  # skips steps whose gradients overflow: nothing to report
            norm = torch.zeros_like(norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update_parameters(self.model)
        likeliest = labels if labels.dim() == 1 else labels.argmax(1)  # of mixed images
        correct = (logits.detach().argmax(1) == likeliest).sum()
        self.sums += torch.stack((loss.detach() * len(labels), correct, norm))
        self.step += 1

    def check_finite(self) -> None:
        """Raise BadInput, before anything is saved, if a loss or gradient of the epoch was not."""
        if not math.isfinite(self.world.sum(self.sums).sum().item()):
            raise BadInput(
                f"the loss or its gradient is not finite near step {self.step}: lower --lr or use "
                f"--precision fp32; {self.args.output / 'last.pth'} keeps the last good state"
            )

    @property
    def epoch_due(self) -> bool:
        """Whether an epoch has had its last step, but not yet its validation and line."""
        ended = self.step % self.steps_per_epoch == 0 or self.step == len(self.schedule)
        return ended and math.ceil(self.step / self.steps_per_epoch) > len(self.history)

    def network(self) -> nn.Module:
        """The weights to evaluate and ship."""
        return self.ema.module if self.ema else self.model

    def evaluate(self, images: cifar10.Images, img_size: int) -> tuple[float, float]:
        """Loss and accuracy in percent, each process taking its share of the images."""
        world, model = self.world, self.network().eval()
        share = images[world.rank :: world.size]
        logits, labels = evaluated(model, share, img_size, world.device)
        self.model.train()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums = torch.stack((loss, (logits.argmax(1) == labels).sum().float()))
        loss, correct = world.sum(sums.to(world.device)).tolist()
        return loss / len(images), 100 * correct / len(images)

    def end_epoch(self, val: cifar10.Images) -> None:
        """Log the epoch, keep the weights if they are the best yet, save."""
        world, stage = self.world, self.schedule.stages[self.step - 1]
        loss, correct, _ = world.sum(self.sums).tolist()
        steps = self.step % self.steps_per_epoch or self.steps_per_epoch  # the last can be short
        n = steps * self.args.batch_size
        val_loss, val_accuracy_pct = self.evaluate(val, stage.img_size)
        row = {
            "epoch": len(self.history) + 1,
            "img_size": stage.img_size,
            "window": stage.side,
            "lr": f"{self.schedule.lr(self.step - 1):.3g}",
            "train_loss": f"{loss / n:.4f}",
            "train_accuracy_pct": f"{100 * correct / n:.2f}",
            "val_loss": f"{val_loss:.4f}",
            "val_accuracy_pct": f"{val_accuracy_pct:.2f}",
            "images_per_s": f"{n / self.seconds:.1f}",
            "peak_memory_mb": f"{peak_memory_bytes(world.device) / files.MB:.0f}",
            "seconds": f"{self.seconds:.1f}",
        }
        self.history.append(row)
        self.sums.zero_()
        self.seconds = 0.0
        # An epoch at another resolution than the last one can't be chosen.
        if stage.img_size == self.args.img_size and val_accuracy_pct > self.best_accuracy:
            self.best_accuracy = val_accuracy_pct
            if world.rank == 0:
                save_checkpoint(self.args.output / "best.pth", self.shippable())
        self.save()
        if world.rank == 0:
            tqdm.write("  ".join(f"{k} {v}" for k, v in row.items()))
            sys.stdout.flush()
            if self.tensorboard:
                for name, value in row.items():
                    self.tensorboard.add_scalar(name, float(value), row["epoch"])
                self.tensorboard.flush()

    def shippable(self) -> dict:
        return {
            "format": FORMAT,
            "model": self.args.model,
            "settings": settings_of(self.model),
            "task": self.args.task,
            "classes": list(cifar10.CLASSES),
            "img_size": self.args.img_size,
            "state_dict": {k: v.contiguous().cpu() for k, v in self.network().state_dict().items()},
            "test_accuracy_pct": None,
            "val_accuracy_pct": self.best_accuracy,
            "epoch": len(self.history),
            "config": self.config,
            "commit": machine.provenance()["commit"],
        }

    def save(self) -> None:
        """Write last.pth and the log. The data and its augmentation are functions of the step, so
        no random state is alive between steps and none needs saving."""
        sums = self.world.sum(self.sums)
        if self.world.rank:
            return
        state = {name: getattr(self, name).state_dict() for name in self.parts()}
        state |= {name: getattr(self, name) for name in SAVED}
        save_checkpoint(self.args.output / "last.pth", state | {"sums": sums.cpu()})
        if self.history:
            text = io.StringIO()
            writer = csv.DictWriter(text, self.history[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)
            files.write_text(self.args.output / "log.csv", text.getvalue())

    def parts(self) -> list[str]:
        return ["model", "optimizer", "scaler"] + (["ema"] if self.ema else [])

    def resume(self) -> None:
        path = self.args.output / "last.pth"
        state = read_tensors(path)
        changed = [k for k, v in self.config.items() if state["config"].get(k) != v]
        if changed:
            told = ", ".join(
                f"{OPTIONS.get(k) or '--' + k.replace('_', '-')} {state['config'].get(k)} "
                f"(now {self.config[k]})"
                for k in changed
            )
            raise BadInput(f"{path} began with {told}: resume with the same options")
        for name in self.parts():
            getattr(self, name).load_state_dict(state[name])
        for name in SAVED:
            setattr(self, name, state[name])
        if self.world.rank == 0:  # the saved sums are those of all processes
            self.sums.copy_(state["sums"])


def evaluated(model, images: cifar10.Images, img_size: int, device: torch.device):
    """Logits and labels of `images`; on a CPU, each core takes batches of its own."""
    batches = EvalBatches(images, img_size, EVAL_BATCH[device.type], device)
    return predict(model, batches, torch.get_num_threads() if device.type == "cpu" else 1)


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tensorboard_writer(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BadInput("--tensorboard needs tensorboard: pip install tensorboard") from error
    files.require_writable(folder)
    return SummaryWriter(folder)
