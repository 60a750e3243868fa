"""Train MobileViT on CIFAR-10, resume, evaluate.

    python train.py --model xxs --epochs 100 --amp                  # the full recipe, one GPU
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

A run that stops before its end exits with 3 (--max-minutes), 130 (Ctrl-C) or 143 (SIGTERM), so that
`train.py ... && quantize.py ...` does not go on.
"""

from lab import cli

if __name__ == "__main__":
    cli.exit_on_signals()  # while the imports below take their seconds

import contextlib
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lab import files, machine
from lab.cli import BadInput, above, at_least, within
from lab.models import NAMES, registered, run_name, settings_of
from lab.models.checkpoint import MAX_IMG_SIZE
from lab.tasks import TASKS
from lab.tasks.augment import POLICIES, Augmentation
from lab.tasks.batches import TrainBatches, loader_workers, split
from lab.tasks.cifar10 import Images, to_input
from lab.training.distributed import World, leave_process_group
from lab.training.evaluation import TRAINABLE, test_accuracy
from lab.training.optimizer import arithmetic, averaged, build_optimizer
from lab.training.options import settle
from lab.training.run import Run, tensorboard_writer
from lab.training.schedule import MAX_EPOCHS, Schedule, parse_resolutions
from lab.training.start import (
    fresh_model,
    heads_to_build,
    load_start,
    require_memory,
    require_no_run,
)
from mobilevit import MIN_IMG_SIZE

BEGAN = time.monotonic()  # what --max-minutes counts from
SAVE_EVERY_S = 120  # seconds between saves within an epoch
# Options that a resumed run may be given anew, and those that are not about a run.
NOT_IN_CONFIG = (
    *("amp", "data_dir", "max_minutes", "output", "resume", "tensorboard", "workers"),
    *("eval", "checkpoint"),
)


class StepOptions(NamedTuple):
    precision: str
    label_smoothing: float
    clip_norm: float


def parse_args():
    p = cli.parser(__doc__)
    add = p.add_argument_group("data").add_argument
    add("--task", choices=TRAINABLE, default="cifar10", help="synthetic needs no download")
    add("--data-dir", default="data", help="folder of cifar-10-batches-py, downloaded if absent")
    help = "training images held out to choose on (default: 2000; synthetic: 200)"
    add("--val-size", type=at_least(1), help=help)
    help = "of 32x32 images; autoaugment comes after crop-flip"
    add("--augment", choices=POLICIES, default="autoaugment", help=help)
    add("--erase", type=within(0, 1), default=0.0, help="probability of erasing a part of an image")
    add("--mixup", type=within(0, 100), default=0.0, help="alpha of mixing two images; 0: do not")
    help = "alpha of swapping patches of two images; 0: do not"
    add("--cutmix", type=within(0, 100), default=0.0, help=help)
    help = "loader processes (default: 0 on CPU, up to 8 on CUDA)"
    add("--workers", type=at_least(0, 128), help=help)

    network = p.add_argument_group("network")
    add = network.add_argument
    add("--model", default="mobilevit_xxs", type=registered, help=f"a network: {NAMES}")
    add("--heads", type=at_least(1), help="attention heads in every block, not the variant's")
    add = network.add_mutually_exclusive_group().add_argument
    add("--init", metavar="CHECKPOINT", help="start from these weights")
    add("--widen", metavar="CHECKPOINT", help="start from a narrower variant's weights")
    add("--pretrained", action="store_true", help="start from timm's ImageNet weights (four heads)")

    add = p.add_argument_group("schedule").add_argument
    help = "passes over the training images (100 unless --resolutions)"
    add("--epochs", type=at_least(1, MAX_EPOCHS), help=help)
    help = "input side in pixels (the network's own unless --resolutions: 256 for MobileViT)"
    add("--img-size", type=at_least(MIN_IMG_SIZE, MAX_IMG_SIZE), help=help)
    help = (
        "in place of the two above: 64:8,128/256:4,256:0.5 is 8 epochs at 64 pixels, then 4 on "
        "128-pixel windows of 256-pixel images, then half a one at 256"
    )
    add("--resolutions", help=help)
    add("--batch-size", type=at_least(1), default=128, help="images a step, over all processes")
    add("--lr", type=above(0, 10), default=2e-3, help="peak learning rate")
    add("--min-lr", type=within(0, 10), default=0.0, help="floor that the cosine falls to")
    warmup = {"type": within(0, MAX_EPOCHS), "default": 10, "help": "linear warm-up of the rate"}
    add("--warmup-epochs", "--warmup", **warmup)

    optimizer = p.add_argument_group("optimizer")
    add = optimizer.add_argument
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon needs timm")
    decay = {"type": within(0, 10), "default": 0.01, "help": "not on norms and biases"}
    add("--weight-decay", "--wd", **decay)
    smoothing = {"type": within(0, 0.99), "default": 0.1, "help": "share spread over all classes"}
    add("--label-smoothing", "--label-smooth", **smoothing)
    add("--clip-norm", type=above(0), default=1.0, help="largest norm of the gradient")
    help = "average the weights for evaluation; 0: do not"
    add("--ema-decay", type=within(0, 0.99999), default=0.0, help=help)
    add("--compile", action="store_true", help="torch.compile the model")
    add = optimizer.add_mutually_exclusive_group().add_argument
    help = "mixed precision of whatever the device has: BF16, or FP16 on older GPUs"
    add("--amp", action="store_true", help=help)
    help = "autocast to this (default: fp32 on CPU, as --amp on CUDA)"
    add("--precision", choices=cli.PRECISIONS, help=help)

    add = p.add_argument_group("run").add_argument
    add("--seed", type=cli.seed, default=0, help="of initialisation, shuffling and augmentation")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--output", help="folder of the run (default: runs/MODEL)")
    add("--resume", action="store_true", help="continue the run in --output")
    add("--max-minutes", type=above(0), help="stop cleanly after this time, to be resumed")
    add("--tensorboard", action="store_true", help="also log to --output/tensorboard")
    add("--eval", action="store_true", help="print --checkpoint's test accuracy and stop")
    add("--checkpoint", help="the checkpoint for --eval")
    why = "is not known: the best epoch is kept anyway, and --epochs or --max-minutes end a run"
    cli.refused(p, "--patience", why=why)

    args = p.parse_args()
    settle(p, args)
    args.device = cli.device(p, args.device)
    args.precision = cli.precision(p, args.precision, args.device, args.amp)
    if args.val_size is None:
        args.val_size = 2000 if args.task == "cifar10" else 200
    if args.workers is None:
        args.workers = loader_workers(args.device)
    args.output = Path(args.output or f"runs/{run_name(args.model, args.task)}")
    return args


@cli.command
def main() -> int:
    args = parse_args()
    machine.keep_freed_memory()
    if args.eval:
        n_correct, n = test_accuracy(args.checkpoint, args.data_dir, args.device)
        print(f"{args.checkpoint}: test {100 * n_correct / n:.2f} % ({n_correct} of {n})")
        return 0
    with World(args.device).join() as world:
        return train(args, world)


def train(args, world: World) -> int:
    """Train as the options say and, at the end, read the test set; the command's exit code."""
    heads = heads_to_build(args.model, args.heads, args.widen, args.pretrained)
    if not args.resume:
        require_no_run(args.output)
    if args.amp and args.precision == "fp32" and world.rank == 0:
        print("--amp: this CPU has no instructions for BF16, so this run computes in FP32")

    with world.first_then_others():  # one of them may have to download it
        images = TASKS[args.task].load(args.data_dir, train=True)
    if not world.size <= args.val_size < len(images):
        raise BadInput(
            f"--val-size {args.val_size} leaves nothing to some of {world.size} processes, or none "
            f"of {len(images)} images to train on"
        )
    train_indices, val_indices = split(images.labels, args.val_size)
    stages = parse_resolutions(args.resolutions)
    batches = TrainBatches(
        images[train_indices],
        args.batch_size,
        args.seed,
        Augmentation(args.augment, args.erase, args.mixup, args.cutmix),
        world.rank,
        world.size,
        [stage.window for stage in stages for _ in range(math.ceil(stage.epochs))],
    )
    per_epoch = batches.steps_per_epoch
    schedule = Schedule(stages, per_epoch, args.lr, args.warmup_epochs, args.min_lr)

    sides = [stage.side for stage in stages]
    model = fresh_model(args.model, len(images.classes), heads, args.seed, sides)
    if not args.resume:
        source = {"init": args.init, "widened": args.widen, "pretrained": args.pretrained}
        load_start(model, args.model, **source, task=args.task, val_size=args.val_size)
    if args.device == "cpu":
        value_bytes = 4 if args.precision == "fp32" else 2
        require_memory(model, args.batch_size // world.size, max(sides), value_bytes)
    model = model.to(world.device, memory_format=torch.channels_last)
    network = world.parallel(world.synchronised(model))
    if args.compile:
        network = torch.compile(network)
    options = {k: v for k, v in vars(args).items() if k not in NOT_IN_CONFIG}
    run = Run(
        output=args.output,
        world=world,
        model=model,
        ema=averaged(model, args.ema_decay),
        optimizer=build_optimizer(model, args.optimizer, args.lr, args.weight_decay),
        scaler=torch.amp.GradScaler(enabled=args.precision == "fp16"),
        schedule=schedule,
        steps_per_epoch=per_epoch,
        batch_size=args.batch_size,
        about={
            "model": args.model,
            "settings": settings_of(model),
            "task": args.task,
            "classes": list(images.classes),
            "img_size": args.img_size,
        },
        config=options | {"world_size": world.size},
    )

    with files.locked(run.output) if world.rank == 0 else contextlib.nullcontext():
        if args.resume:
            run.resume()
        else:
            if world.rank == 0:
                require_no_run(run.output)  # now that no other process can begin one
                files.write_json(run.output / "config.json", run.config | machine.provenance())
            run.save()
        if args.tensorboard and world.rank == 0:
            run.tensorboard = tensorboard_writer(run.output / "tensorboard")
        how = StepOptions(args.precision, args.label_smoothing, args.clip_norm)
        val = images[val_indices]
        code = loop(run, network, batches, val, how, args.workers, args.max_minutes)
        if code == 0 and world.rank == 0:
            run.finish(args.data_dir)
    return code


def loop(
    run: Run,
    network: nn.Module,
    batches: TrainBatches,
    val: Images,
    options: StepOptions,
    workers: int,
    max_minutes: float | None,
) -> int:
    """Train from where `run` stands: 0 at its end, or the exit code of what stopped it before."""
    world, n_steps = run.world, len(run.schedule)
    loader = torch.utils.data.DataLoader(
        batches,
        batch_size=None,
        sampler=range(run.step, n_steps),
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=leave_process_group,
    )
    # Looking at the loss waits for the device, which costs nothing on a CPU.
    check_every = 1 if world.device.type == "cpu" else 20
    silent = True if world.rank else None  # None: where the output is no terminal
    bar = tqdm(total=n_steps, initial=run.step, unit="step", disable=silent)
    code = 0
    with cli.noted_signals() as signals:
        if run.epoch_due:  # it stopped before that
            run.end_epoch(val)
        network.train()
        saved = clock = time.monotonic()
        for images, labels in loader:
            step(run, network, images, labels, options)
            bar.update()
            epoch_ends = run.epoch_due
            if run.step % check_every and not epoch_ends:
                continue
            check_finite(run)
            now = time.monotonic()
            run.seconds += now - clock
            # Another round of the same length must still fit.
            late = max_minutes is not None and 2 * now - clock > BEGAN + 60 * max_minutes
            code = world.max(cli.exit_code(signals) or (cli.TIME_IS_UP if late else 0))
            save = world.any(now - saved > SAVE_EVERY_S)
            if epoch_ends and not code:  # validation takes its time, too
                run.end_epoch(val)
            elif code or save:
                run.save()
            if code:
                break
            if epoch_ends or save:
                saved = time.monotonic()
            clock = time.monotonic()
        code = code or world.max(cli.exit_code(signals))  # a signal during the last validation
    if code and world.rank == 0:
        print(f"stopped at step {run.step} of {n_steps}: --resume goes on")
    return code


def step(
    run: Run, network: nn.Module, images: Tensor, labels: Tensor, options: StepOptions
) -> None:
    """Train on a batch: images uint8 [b, 3, w, w], labels int64 [b] or probabilities [b, K].

    `network` is the run's model as it is called: compiled, or parallel over processes.
    """
    device = run.world.device
    x = to_input(images.to(device, non_blocking=True), run.schedule.stage(run.step).side)
    labels = labels.to(device, non_blocking=True)
    for group in run.optimizer.param_groups:
        group["lr"] = run.schedule.lr(run.step)

    with arithmetic(device.type, options.precision):
        logits = network(x)
    smoothing = options.label_smoothing
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    run.optimizer.zero_grad()
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), options.clip_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.ema:
        run.ema.update_parameters(run.model)

    if run.scaler.is_enabled():  # it skips steps whose gradients overflow: nothing to report
        norm = torch.zeros_like(norm)
    likeliest = labels if labels.dim() == 1 else labels.argmax(1)  # of mixed images
    correct = (logits.detach().argmax(1) == likeliest).sum()
    run.sums += torch.stack((loss.detach() * len(labels), correct, norm))
    run.step += 1


def check_finite(run: Run) -> None:
    """Raise BadInput, before anything is saved, if a loss or gradient of the epoch was not."""
    if not math.isfinite(run.world.sum(run.sums).sum().item()):
        raise BadInput(
            f"the loss or its gradient is not finite near step {run.step}: lower --lr or use "
            f"--precision fp32; {run.output / 'last.pth'} keeps the last good state"
        )


if __name__ == "__main__":
    main()
