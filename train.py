"""Train MobileViT on CIFAR-10, resume, evaluate.

    python train.py --model xxs                                     # the full recipe, one GPU
    python train.py --model xxs --resolutions 64:8,128:3,256:1 ...  # a short run on a CPU
    python train.py --model xxs --resume                            # go on where it stopped
    python train.py --eval --checkpoint checkpoints/mobilevit_xxs/best.pth
    python train.py --task synthetic --img-size 64 --epochs 3 --batch-size 32 \\
        --warmup-epochs 0.5 --augment none              # smoke run, no download, under a minute
    torchrun --nproc-per-node=2 train.py ...                          # data-parallel

Writes into --output: best.pth (weights chosen on held-out training images), last.pth (all that a
bit-exact resume needs), log.csv (a line an epoch), config.json and, at the end, metrics.json with
the accuracy on the test set, which is read that once. The last line printed:

    mobilevit_xxs: epoch 12 chosen, validation 86.10 %, test 85.80 % (8580 of 10000)
"""

import math
import os
import signal
import time
from pathlib import Path

import torch
from tqdm import tqdm

from lab import cli, files, machine
from lab.cli import BadInput
from lab.models import NAMES, registered, run_name
from lab.models.checkpoint import load_checkpoint, model_from_checkpoint, save_checkpoint
from lab.tasks import TASKS
from lab.tasks.augment import POLICIES, Augmentation
from lab.tasks.batches import TrainBatches, loader_workers, split
from lab.tasks.cifar10 import Images
from lab.training.distributed import World
from lab.training.run import Run, evaluated
from lab.training.schedule import parse_resolutions
from mobilevit import MIN_IMG_SIZE

BEGAN = time.monotonic()  # what --max-minutes counts from
SAVE_EVERY_S = 120  # seconds between saves within an epoch


def parse_args():
    p = cli.parser(__doc__)
    add, number = p.add_argument, {"type": float, "metavar": "X"}
    add("--model", default="mobilevit_xxs", type=registered, help=f"a network: {NAMES}")
    add("--heads", type=int, help="attention heads in every block, instead of the variant's")
    add("--task", choices=TASKS, default="cifar10", help="synthetic needs no download")
    add("--data-dir", default="data", help="folder of cifar-10-batches-py, downloaded if absent")
    add(
        "--val-size",
        type=int,
        help="training images held out to choose on (default: 2000; synthetic: 200)",
    )
    add(
        "--augment",
        choices=POLICIES,
        default="autoaugment",
        help="of 32x32 images; autoaugment comes after crop-flip",
    )
    add("--erase", default=0.0, help="probability of erasing a part of an image", **number)
    add("--mixup", default=0.0, help="alpha of mixing two images; 0: do not", **number)
    add("--cutmix", default=0.0, help="alpha of swapping patches of two; 0: do not", **number)
    add("--img-size", type=int, help="input side in pixels (256 unless --resolutions)")
    add("--epochs", type=int, help="passes over the training images (100 unless --resolutions)")
    add(
        "--resolutions",
        help="in place of the two above: 64:8,128/256:4,256:0.5 is 8 epochs at 64 pixels, then 4 "
        "on 128-pixel windows of 256-pixel images, then half a one at 256",
    )
    add("--batch-size", type=int, default=128, help="images a step, over all processes")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon needs timm")
    add("--lr", default=2e-3, help="peak learning rate", **number)
    add("--warmup-epochs", default=10, help="linear warm-up", **number)
    add("--weight-decay", default=0.01, help="not on norms and biases", **number)
    add("--label-smoothing", default=0.1, help="share spread over all classes", **number)
    add("--clip-norm", default=1.0, help="largest norm of the gradient", **number)
    add("--ema-decay", default=0.0, help="average the weights for evaluation; 0: do not", **number)
    add(
        "--precision",
        choices=cli.PRECISIONS,
        help="autocast (default: fp32 on CPU, on CUDA bf16 or, where the GPU lacks it, fp16)",
    )
    add("--compile", action="store_true", help="torch.compile the model")
    add("--init", metavar="CHECKPOINT", help="start from these weights")
    add("--widen", metavar="CHECKPOINT", help="start from a narrower variant's weights")
    add("--pretrained", action="store_true", help="start from timm's ImageNet weights (four heads)")
    add("--seed", type=int, default=0, help="of initialisation, shuffling and augmentation")
    add("--workers", type=int, help="loader processes (default: 0 on CPU, up to 8 on CUDA)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--output", help="folder of the run (default: runs/mobilevit_VARIANT)")
    add("--resume", action="store_true", help="continue the run in --output")
    add("--max-minutes", help="stop cleanly after this time, to be resumed", **number)
    add("--tensorboard", action="store_true", help="also log to --output/tensorboard")
    add("--eval", action="store_true", help="print --checkpoint's test accuracy and stop")
    add("--checkpoint", help="the checkpoint for --eval")
    args = p.parse_args()

    if args.eval != (args.checkpoint is not None):
        p.error("--eval and --checkpoint go together")
    taken = ("eval", "checkpoint", "data_dir", "device")
    other = [k for k, v in vars(args).items() if k not in taken and v != p.get_default(k)]
    if args.eval and other:
        p.error(f"--eval takes all from the checkpoint, --{other[0].replace('_', '-')} excluded")
    if args.resolutions is not None and (args.img_size, args.epochs) != (None, None):
        p.error("--resolutions replaces --img-size and --epochs")
    if args.epochs is not None and args.epochs < 1:
        p.error("--epochs must be at least 1")
    if args.img_size is not None and args.img_size < MIN_IMG_SIZE:
        p.error(f"--img-size must be at least {MIN_IMG_SIZE}")
    if sum(map(bool, (args.init, args.widen, args.pretrained))) > 1:
        p.error("only one of --init, --widen and --pretrained")
    if args.pretrained and args.heads is not None:
        p.error("--pretrained excludes --heads")
    args.device = cli.device(p, args.device)
    args.precision = cli.precision(p, args.precision, args.device)
    if args.resolutions is None:
        side, epochs = (256 if args.img_size is None else args.img_size, args.epochs)
        args.resolutions = f"{side}:{100 if epochs is None else epochs}"
    args.stages = parse_resolutions(args.resolutions)
    args.img_size, args.epochs = args.stages[-1].img_size, sum(s.epochs for s in args.stages)
    if not 0 <= args.warmup_epochs < args.epochs:
        p.error(f"--warmup-epochs must be at least 0 and less than the {args.epochs} epochs")
    for name, low, high in (
        ("lr", 0, 10),
        ("clip_norm", 0, math.inf),
        ("max_minutes", 0, math.inf),
    ):
        if getattr(args, name) is not None and not low < getattr(args, name) <= high:
            p.error(f"--{name.replace('_', '-')} must be above {low} and at most {high}")
    for name, high in (
        ("weight_decay", 10),
        ("label_smoothing", 0.99),
        ("ema_decay", 0.99999),
        ("erase", 1),
        ("mixup", 100),
        ("cutmix", 100),
    ):
        if not 0 <= getattr(args, name) <= high:
            p.error(f"--{name.replace('_', '-')} must be within 0 and {high}")
    if args.val_size is None:
        args.val_size = 2000 if args.task == "cifar10" else 200
    if args.workers is None:
        args.workers = loader_workers(args.device)
    if args.workers < 0:
        p.error("--workers must be at least 0")
    cli.check_seed(p, args.seed)
    if args.batch_size == 1 and any(stage.side == MIN_IMG_SIZE for stage in args.stages):
        p.error(f"--batch-size 1 needs more than {MIN_IMG_SIZE} pixels: batch norms see one value")
    args.output = Path(args.output or f"runs/{run_name(args.model, args.task)}")
    return args


def train(args, world: World) -> None:
    output = args.output
    if not args.resume and any((output / name).exists() for name in ("best.pth", "last.pth")):
        raise BadInput(f"{output} already holds a run: --resume it or choose another --output")
    if args.val_size < world.size:
        raise BadInput(f"--val-size {args.val_size} leaves some of {world.size} processes nothing")
    with world.first_then_others():  # one of them may have to download it
        images = TASKS[args.task].load(args.data_dir, train=True)
    train_indices, val_indices = split(images.labels, args.val_size)
    val = images[val_indices]
    windows = [stage.window for stage in args.stages for _ in range(math.ceil(stage.epochs))]
    batches = TrainBatches(
        images[train_indices],
        args.batch_size,
        args.seed,
        Augmentation(args.augment, args.erase, args.mixup, args.cutmix),
        world.rank,
        world.size,
        windows,
    )
    run = Run(args, world, batches.steps_per_epoch)
    if args.resume:
        run.resume()
    else:
        if world.rank == 0:
            files.write_json(output / "config.json", run.config | machine.provenance())
        run.save()
    if fit(run, batches, val) and world.rank == 0:
        finish(run)


def fit(run: Run, batches: TrainBatches, val: Images) -> bool:
    """Train from where `run` stands to its end, to --max-minutes, or to SIGINT or SIGTERM; whether
    it came to its end."""
    args, world = run.args, run.world
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=range(run.step, len(run.schedule)),
        num_workers=args.workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=detach,
    )
    # Looking at the loss waits for the device, which costs nothing on a CPU.
    check_every = 1 if world.device.type == "cpu" else 20
    asked_to_stop = []
    handlers = {
        number: signal.signal(number, lambda *_: asked_to_stop.append(True))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    silent = True if world.rank else None  # None: where the output is no terminal
    bar = tqdm(total=len(run.schedule), initial=run.step, unit="step", disable=silent)
    if run.epoch_due:  # it stopped before that
        run.end_epoch(val)
    run.model.train()
    saved = clock = time.monotonic()
    stop = False
    for batch in loader:
        run.train_step(*batch)
        bar.update()
        epoch_ends = run.epoch_due
        if run.step % check_every and not epoch_ends:
            continue
        run.check_finite()
        now = time.monotonic()
        run.seconds += now - clock
        # Another round of the same length must still fit.
        late = args.max_minutes is not None and 2 * now - clock > BEGAN + 60 * args.max_minutes
        stop = world.any(late or bool(asked_to_stop))
        save = world.any(now - saved > SAVE_EVERY_S)
        if epoch_ends and not stop:  # validation takes its time, too
            run.end_epoch(val)
        elif stop or save:
            run.save()
        if epoch_ends or save:
            saved = time.monotonic()
        clock = time.monotonic()
        if stop:
            if world.rank == 0:
                print(f"stopped at step {run.step} of {len(run.schedule)}: --resume goes on")
            break
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return not stop


def detach(_) -> None:
    """Take a loader process out of the trainer's group: a signal to the group, such as that of
    Ctrl-C or `timeout`, would end it before the trainer has stopped."""
    os.setpgrp()


def finish(run: Run) -> None:
    """Read the test set, once, with the chosen weights."""
    args = run.args
    path, metrics_path = args.output / "best.pth", args.output / "metrics.json"
    best = load_checkpoint(path)
    if best["test_accuracy_pct"] is None:
        n_correct, n = test_accuracy(path, args.data_dir, args.device)
        test_accuracy_pct = 100 * n_correct / n
        name = run_name(args.model, args.task)
        printed = (
            f"{name}: epoch {best['epoch']} chosen, validation {best['val_accuracy_pct']:.2f} %, "
            f"test {test_accuracy_pct:.2f} % ({n_correct} of {n})"
        )
        metrics = {
            "epoch": best["epoch"],
            "val_accuracy_pct": best["val_accuracy_pct"],
            "test_accuracy_pct": test_accuracy_pct,
            "n_correct": n_correct,
            "n_images": n,
            "train_s": sum(float(row["seconds"]) for row in run.history),
            "hardware": hardware(run.world),
            "printed": printed,
            "config": run.config,
        }
        files.write_json(metrics_path, metrics | machine.provenance())
        save_checkpoint(path, best | {"test_accuracy_pct": test_accuracy_pct})
    print(files.read_json(metrics_path)["printed"])


def hardware(world: World) -> str:
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
    else:
        name = f"{machine.cpu_name()}, {torch.get_num_threads()} threads"
    return name if world.size == 1 else f"{world.size} x {name}"


def test_accuracy(path, data_dir, device) -> tuple[int, int]:
    """Correct and all test images of a checkpoint's data set, at its image size."""
    model, checkpoint = model_from_checkpoint(path)
    test = TASKS[checkpoint["task"]].load(data_dir, train=False)
    device = torch.device(device)
    logits, labels = evaluated(model.to(device), test, checkpoint["img_size"], device)
    return int((logits.argmax(1) == labels).sum()), len(labels)


@cli.command
def main():
    args = parse_args()
    machine.keep_freed_memory()
    if args.eval:
        n_correct, n = test_accuracy(args.checkpoint, args.data_dir, args.device)
        print(f"{args.checkpoint}: test {100 * n_correct / n:.2f} % ({n_correct} of {n})")
        return
    with World(args.device).join() as world:
        train(args, world)


if __name__ == "__main__":
    main()
