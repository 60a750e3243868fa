"""Train MobileViT on CIFAR-10, resume, evaluate.

    python train.py --variant xxs                                     # the full recipe, one GPU
    python train.py --variant xxs --resolutions 64:8,128:3,256:1 ...  # a short run on a CPU
    python train.py --variant xxs --resume                            # go on where it stopped
    python train.py --eval --checkpoint checkpoints/mobilevit_xxs/best.pth
    python train.py --dataset synthetic --img-size 64 --epochs 2 --warmup-epochs 0.5   # smoke, 30 s
    torchrun --nproc-per-node=2 train.py ...                          # data-parallel

Writes into --output: best.pth (weights chosen on held-out training images), last.pth (all that a
bit-exact resume needs), log.csv (a line an epoch), config.json and, at the end, metrics.json with
the accuracy on the test set, which is read that once. The last line printed:

    mobilevit_xxs: epoch 12 chosen, validation 86.10 %, test 85.80 % (8580 of 10000)
"""

import argparse
import csv
import io
import math
import resource
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
import rows
from distributed import World
from engines import predict
from mobilevit import MIN_IMG_SIZE, VARIANTS, MobileViT
from rows import BadInput
from weights import load_checkpoint, load_timm, load_weights, model_from_checkpoint, save_checkpoint

EVAL_BATCH = 100  # images; small enough for the activations to stay near the cache of a CPU
SAVE_EVERY_S = 120  # seconds between saves within an epoch
MAY_CHANGE = ("max_minutes", "workers", "resume", "data_dir", "output", "tensorboard")


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, number = p.add_argument, {"type": float, "metavar": "X"}
    add("--variant", choices=VARIANTS, default="xxs", help="size of the network")
    add("--heads", type=int, help="attention heads in every block, instead of the variant's")
    add("--dataset", choices=data.DATASETS, default="cifar10", help="synthetic needs no download")
    add("--data-dir", default="data", help="folder of cifar-10-batches-py, downloaded if absent")
    add("--val-size", type=int, help="training images held out to choose on (default: 2000, of the synthetic ones 200)")  # fmt: skip
    add("--augment", choices=data.AUGMENTATIONS, default="autoaugment", help="the last one adds to the second")  # fmt: skip
    add("--img-size", type=int, help="input side in pixels (256 unless --resolutions)")
    add("--epochs", type=int, help="passes over the training images (100 unless --resolutions)")
    add("--resolutions", help="sides and epochs in place of the two above, as 64:8,128:3,256:1")
    add("--batch-size", type=int, default=128, help="images a step, over all processes")
    add("--lr", default=2e-3, help="peak learning rate", **number)
    add("--warmup-epochs", default=10, help="linear warm-up", **number)
    add("--weight-decay", default=0.01, help="AdamW's, not on norms and biases", **number)
    add("--label-smoothing", default=0.1, help="share spread over all classes", **number)
    add("--clip-norm", default=1.0, help="largest norm of the gradient", **number)
    add("--ema-decay", default=0.0, help="average the weights for evaluation; 0: do not", **number)
    add("--precision", choices=("fp32", "bf16", "fp16"), help="autocast (default: bf16 on CUDA, fp32 on CPU, where bf16 pays only with AVX-512 BF16 or AMX)")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the model")
    add("--init", metavar="CHECKPOINT", help="start from these weights")
    add("--pretrained", action="store_true", help="start from timm's ImageNet weights (four heads)")
    add("--seed", type=int, default=0, help="of initialisation, shuffling and augmentation")
    add("--workers", type=int, help="loader processes (default: 0 on CPU, up to 8 on CUDA)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--output", help="folder of the run (default: checkpoints/mobilevit_VARIANT)")
    add("--resume", action="store_true", help="continue the run in --output")
    add("--max-minutes", help="stop cleanly after this time, to be resumed", **number)
    add("--tensorboard", action="store_true", help="also log to --output/tensorboard")
    add("--eval", action="store_true", help="print --checkpoint's test accuracy and stop")
    add("--checkpoint", help="the checkpoint for --eval")
    args = p.parse_args()

    if args.eval != (args.checkpoint is not None):
        p.error("--eval and --checkpoint go together")
    if args.resolutions and (args.img_size or args.epochs):
        p.error("--resolutions replaces --img-size and --epochs")
    if args.init and args.pretrained:
        p.error("--init and --pretrained exclude each other")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch sees no CUDA device")
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    if args.precision == "fp16" and args.device == "cpu":
        p.error("--precision fp16 needs CUDA")
    args.resolutions = args.resolutions or f"{args.img_size or 256}:{args.epochs or 100}"
    args.stages = parse_resolutions(args.resolutions)
    args.img_size, args.epochs = args.stages[-1][0], sum(epochs for _, epochs in args.stages)
    if not 0 <= args.warmup_epochs < args.epochs:
        p.error(f"--warmup-epochs must be at least 0 and less than the {args.epochs} epochs")
    for name, low, high in (
        ("lr", 0, 10), ("clip_norm", 0, math.inf), ("max_minutes", 0, math.inf)
    ):  # fmt: skip
        if getattr(args, name) is not None and not low < getattr(args, name) <= high:
            p.error(f"--{name.replace('_', '-')} must be above {low} and at most {high}")
    for name, high in (("weight_decay", 10), ("label_smoothing", 0.99), ("ema_decay", 0.99999)):
        if not 0 <= getattr(args, name) <= high:
            p.error(f"--{name.replace('_', '-')} must be within 0 and {high}")
    if args.val_size is None:
        args.val_size = 2000 if args.dataset == "cifar10" else 200
    if args.workers is None:
        args.workers = min(8, torch.multiprocessing.cpu_count()) if args.device == "cuda" else 0
    if args.workers < 0 or args.seed < 0:
        p.error("--workers and --seed must be at least 0")
    args.output = Path(args.output or f"checkpoints/{model_name(args.variant, args.dataset)}")
    return args


def model_name(variant: str, dataset: str) -> str:
    """What a run is called in paths and tables; the stand-in data set shows in it."""
    return f"mobilevit_{variant}" + ("" if dataset == "cifar10" else f"-{dataset}")


def parse_resolutions(text: str) -> list[tuple[int, int]]:
    """"64:8,128:3" -> [(64, 8), (128, 3)]: 8 epochs at 64x64, then 3 at 128x128."""
    try:
        stages = [tuple(int(n) for n in stage.split(":")) for stage in text.split(",")]
    except ValueError:
        stages = []
    if not stages or any(len(s) != 2 or s[0] < MIN_IMG_SIZE or s[1] < 1 for s in stages):
        raise BadInput(
            f"--resolutions {text}: give SIDE:EPOCHS,... with sides of at least {MIN_IMG_SIZE} "
            "pixels and whole epochs"
        )
    return stages


class Schedule:
    """Image side and learning rate of every step.

    The rate rises linearly for `warmup_epochs`, then falls as a cosine over the pixels still to be
    seen. With one resolution that is the usual cosine over steps; with several, the last and most
    expensive one still gets a rate at which the network can adapt to it.
    """

    def __init__(self, stages, steps_per_epoch: int, peak_lr: float, warmup_epochs: float):
        self.peak_lr, self.warmup_steps = peak_lr, round(warmup_epochs * steps_per_epoch)
        self.sides = [side for side, epochs in stages for _ in range(epochs * steps_per_epoch)]
        self.pixels = [0]  # seen per image slot of the batch, before each step
        for side in self.sides:
            self.pixels.append(self.pixels[-1] + side**2)

    def __len__(self) -> int:
        return len(self.sides)

    def lr(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        start, end = self.pixels[self.warmup_steps], self.pixels[-1]
        progress = (self.pixels[step] - start) / (end - start)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * progress))


def build_model(args) -> MobileViT:
    torch.manual_seed(args.seed)
    try:
        model = MobileViT(args.variant, len(data.CLASSES), 4 if args.pretrained else args.heads)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if args.init:
        load_weights(model, load_checkpoint(args.init), args.init)
    if args.pretrained:
        load_timm(model)
    return model


def weight_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters with two or more dimensions decay; norms and biases do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


class Run:
    """A training run: everything that changes from step to step, and its files."""

    def __init__(self, args, world: World, n_train: int):
        self.args, self.world = args, world
        self.steps_per_epoch = n_train // args.batch_size
        self.schedule = Schedule(args.stages, self.steps_per_epoch, args.lr, args.warmup_epochs)
        self.model = build_model(args).to(world.device, memory_format=torch.channels_last)
        self.trained = world.parallel(world.synchronised(self.model))
        if args.compile:
            self.trained = torch.compile(self.trained)
        self.ema = None
        if args.ema_decay:
            average = get_ema_multi_avg_fn(args.ema_decay)
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.optimizer = torch.optim.AdamW(
            weight_groups(self.model, args.weight_decay), lr=args.lr, fused=True
        )
        self.scaler = torch.amp.GradScaler(enabled=args.precision == "fp16")
        self.step = 0
        self.sums = torch.zeros(3, device=world.device)  # of the epoch: loss, correct, images
        self.seconds = 0.0  # of the epoch, training only
        self.history = []  # a dict an epoch
        self.best_accuracy = -1.0
        self.config = {
            k: v for k, v in vars(args).items()
            if k not in (*MAY_CHANGE, "eval", "checkpoint", "stages")
        } | {"world_size": world.size}  # fmt: skip

    def train_step(self, images, labels) -> None:
        args, device = self.args, self.world.device
        lr = self.schedule.lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x = data.to_input(images.to(device, non_blocking=True), self.schedule.sides[self.step])
        labels = labels.to(device, non_blocking=True)
        dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
        with torch.autocast(device.type, dtype, enabled=args.precision != "fp32"):
            logits = self.trained(x)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=args.label_smoothing)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), args.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update_parameters(self.model)
        correct = (logits.detach().argmax(1) == labels).sum()
        self.sums += torch.stack((loss.detach() * len(labels), correct, correct.new_tensor(len(labels))))
        self.step += 1

    def check_finite(self) -> None:
        if not math.isfinite(self.world.sum(self.sums)[0].item()):
            raise BadInput(
                f"the loss is not finite near step {self.step}: lower --lr or use --precision "
                f"fp32; {self.args.output / 'last.pth'} keeps the last good state, if one was saved"
            )

    def network(self) -> MobileViT:
        """The weights to evaluate and ship."""
        return self.ema.module if self.ema else self.model

    def evaluate(self, images: data.Images, img_size: int) -> tuple[float, float]:
        """Loss and accuracy in percent, each process taking its share of the images."""
        world, model = self.world, self.network().eval()
        share = images[world.rank :: world.size]
        batches = data.eval_batches(share, img_size, EVAL_BATCH, world.device)
        logits, labels = predict(model, batches, math.ceil(len(share) / EVAL_BATCH))
        self.model.train()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums = torch.stack((loss, (logits.argmax(1) == labels).sum().float()))
        loss, correct = world.sum(sums.to(world.device)).tolist()
        return loss / len(images), 100 * correct / len(images)

    def end_epoch(self, val: data.Images) -> None:
        """Log the epoch, keep the weights if they are the best yet, save."""
        world, side = self.world, self.schedule.sides[self.step - 1]
        loss, correct, n = world.sum(self.sums).tolist()
        val_loss, val_accuracy_pct = self.evaluate(val, side)
        row = {
            "epoch": len(self.history) + 1,
            "img_size": side,
            "lr": f"{self.schedule.lr(self.step - 1):.3g}",
            "train_loss": f"{loss / n:.4f}",
            "train_accuracy_pct": f"{100 * correct / n:.2f}",
            "val_loss": f"{val_loss:.4f}",
            "val_accuracy_pct": f"{val_accuracy_pct:.2f}",
            "images_per_s": f"{n / self.seconds:.1f}",
            "peak_memory_mb": f"{peak_memory_bytes(world.device) / rows.MB:.0f}",
            "seconds": f"{self.seconds:.1f}",
        }
        self.history.append(row)
        self.sums.zero_()
        self.seconds = 0.0
        # An epoch at another resolution than the last one can't be chosen.
        if side == self.args.img_size and val_accuracy_pct > self.best_accuracy:
            self.best_accuracy = val_accuracy_pct
            if world.rank == 0:
                save_checkpoint(self.args.output / "best.pth", self.shippable())
        self.save()
        if world.rank == 0:
            tqdm.write("  ".join(f"{k} {v}" for k, v in row.items()))
            log_to_tensorboard(self.args, row)

    def shippable(self) -> dict:
        return {
            "model": self.model.variant,
            "num_classes": self.model.num_classes,
            "heads": list(self.model.heads),
            "img_size": self.args.img_size,
            "state_dict": {k: v.contiguous().cpu() for k, v in self.network().state_dict().items()},
            "test_accuracy_pct": None,
            "val_accuracy_pct": self.best_accuracy,
            "epoch": len(self.history),
            "config": self.config,
            "commit": rows.provenance()["commit"],
        }

    def save(self) -> None:
        """Write last.pth and the log. The data and its augmentation are functions of the step, so
        no random state is alive between steps and none needs saving."""
        sums = self.world.sum(self.sums)
        if self.world.rank:
            return
        state = {name: getattr(self, name).state_dict() for name in self.parts()}
        state |= {name: getattr(self, name) for name in RUN_STATE}
        save_checkpoint(self.args.output / "last.pth", state | {"sums": sums.cpu()})
        if self.history:
            text = io.StringIO()
            writer = csv.DictWriter(text, self.history[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)
            rows.write_text(self.args.output / "log.csv", text.getvalue())

    def parts(self) -> list[str]:
        return ["model", "optimizer", "scaler"] + (["ema"] if self.ema else [])

    def resume(self) -> None:
        path = self.args.output / "last.pth"
        state = load_checkpoint(path, (*RUN_STATE, "sums", "model", "optimizer", "scaler"))
        changed = [k for k, v in self.config.items() if state["config"].get(k) != v]
        if changed:
            told = ", ".join(
                f"--{k.replace('_', '-')} {state['config'].get(k)} (now {self.config[k]})"
                for k in changed
            )
            raise BadInput(f"{path} began with {told}: resume with the same options")
        for name in self.parts():
            getattr(self, name).load_state_dict(state[name])
        for name in RUN_STATE:
            setattr(self, name, state[name])
        if self.world.rank == 0:  # the saved sums are those of all processes
            self.sums.copy_(state["sums"])


RUN_STATE = ("step", "seconds", "history", "best_accuracy", "config")


def peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def log_to_tensorboard(args, row: dict) -> None:
    if not args.tensorboard:
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BadInput("--tensorboard needs tensorboard: pip install tensorboard") from error
    with SummaryWriter(args.output / "tensorboard") as writer:
        for name, value in row.items():
            writer.add_scalar(name, float(value), row["epoch"])


def train(args, world: World) -> None:
    output = args.output
    if not args.resume and any((output / name).exists() for name in ("best.pth", "last.pth")):
        raise BadInput(f"{output} already holds a run: --resume it or choose another --output")
    images = data.load(args.dataset, args.data_dir, train=True)
    train_indices, val_indices = data.split(images.labels, args.val_size)
    val = images[val_indices]
    batches = data.TrainBatches(
        images[train_indices], args.batch_size, args.seed, args.augment, world.rank, world.size
    )
    run = Run(args, world, len(train_indices))
    if args.resume:
        run.resume()
    elif world.rank == 0:
        rows.write_json(output / "config.json", run.config | rows.provenance())
    fit(run, batches, val)
    if run.step == len(run.schedule) and world.rank == 0:
        finish(run)


def fit(run: Run, batches: data.TrainBatches, val: data.Images) -> None:
    """Train from where `run` stands to its end, to --max-minutes, or to SIGINT or SIGTERM."""
    args, world = run.args, run.world
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=range(run.step, len(run.schedule)),
        num_workers=args.workers,
        pin_memory=world.device.type == "cuda",
    )
    # Looking at the loss waits for the device, which costs nothing on a CPU.
    check_every = 1 if world.device.type == "cpu" else 20
    asked_to_stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked_to_stop.append(True))
    began = saved = clock = time.monotonic()
    bar = tqdm(total=len(run.schedule), initial=run.step, unit="step", disable=None)
    run.model.train()
    for batch in loader:
        run.train_step(*batch)
        bar.update()
        epoch_ends = run.step % run.steps_per_epoch == 0
        if run.step % check_every and not epoch_ends:
            continue
        run.check_finite()
        now = time.monotonic()
        run.seconds += now - clock
        late = args.max_minutes is not None and now - began > 60 * args.max_minutes
        stop = world.any(late or bool(asked_to_stop))
        save = world.any(now - saved > SAVE_EVERY_S)
        if epoch_ends:
            run.end_epoch(val)
        elif stop or save:
            run.save()
        if epoch_ends or save:
            saved = time.monotonic()
        clock = time.monotonic()
        if stop and run.step < len(run.schedule):
            if world.rank == 0:
                print(f"stopped at step {run.step} of {len(run.schedule)}: --resume goes on")
            return


def finish(run: Run) -> None:
    """Read the test set, once, with the chosen weights."""
    args = run.args
    path = args.output / "best.pth"
    best = load_checkpoint(path)
    if best["test_accuracy_pct"] is None:
        n_correct, n = test_accuracy(path, args.data_dir, args.device)
        best["test_accuracy_pct"] = 100 * n_correct / n
        save_checkpoint(path, best)
        metrics = {
            "epoch": best["epoch"],
            "val_accuracy_pct": best["val_accuracy_pct"],
            "test_accuracy_pct": best["test_accuracy_pct"],
            "n_correct": n_correct,
            "n_images": n,
            "train_s": sum(float(row["seconds"]) for row in run.history),
            "config": run.config,
        }
        rows.write_json(args.output / "metrics.json", metrics | rows.provenance())
    metrics = rows.read_json(args.output / "metrics.json")
    print(
        f"{model_name(args.variant, args.dataset)}: epoch {metrics['epoch']} chosen, validation "
        f"{metrics['val_accuracy_pct']:.2f} %, test {metrics['test_accuracy_pct']:.2f} % "
        f"({metrics['n_correct']} of {metrics['n_images']})"
    )


def test_accuracy(path, data_dir, device) -> tuple[int, int]:
    """Correct and all test images of a checkpoint's data set, at its image size."""
    model, checkpoint = model_from_checkpoint(path)
    test = data.load(checkpoint["config"]["dataset"], data_dir, train=False)
    batches = data.eval_batches(test, checkpoint["img_size"], EVAL_BATCH, device)
    logits, labels = predict(model.to(device), batches, math.ceil(len(test) / EVAL_BATCH))
    return int((logits.argmax(1) == labels).sum()), len(labels)


@rows.command
def main():
    args = parse_args()
    rows.keep_freed_memory()
    if args.eval:
        n_correct, n = test_accuracy(args.checkpoint, args.data_dir, args.device)
        print(f"{args.checkpoint}: test {100 * n_correct / n:.2f} % ({n_correct} of {n})")
        return
    with World(args.device).join() as world:
        train(args, world)


if __name__ == "__main__":
    main()
