"""Train MobileViT on CIFAR-10, resume, evaluate.

    python train.py --model xxs --epochs 100 --amp                  # the full recipe, one GPU
    python train.py --model xxs --minutes 9 ...                     # what fits into this time
    python train.py --model xxs --resolutions 64:8,128:3,256:1 ...  # a short run on a CPU
    python train.py --model xxs --resume                            # go on where it stopped
    python train.py --finish --output runs/mobilevit_xxs            # end it where it stopped
    python train.py --eval --checkpoint checkpoints/mobilevit_xxs/best.pth
    python train.py --eval --weights mobilevit_s.pt --model s --task imagefolder \\
        --data-dir imagenet/val                         # others' weights beside the paper's numbers
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
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lab import cli, files, machine
from lab.cli import BadInput
from lab.models import settings_of
from lab.schema import mapping, record, text
from lab.tasks import TASKS
from lab.tasks.augment import Augmentation
from lab.tasks.batches import TrainBatches
from lab.training.budget import chosen_before, stages_that_fit, written
from lab.training.distributed import World
from lab.training.evaluation import score_on_test_set, weights_score
from lab.training.finish import finish
from lab.training.loader import loader
from lab.training.optimizer import arithmetic, averaged, build_optimizer
from lab.training.options import NOT_IN_CONFIG, WARM_UP, parse_args
from lab.training.run import Run, hardware, tensorboard_writer
from lab.training.schedule import Schedule, Stage, parse_resolutions
from lab.training.start import (
    fresh_model,
    heads_to_build,
    load_start,
    network_settings,
    require_compiler,
    require_memory,
    require_no_run,
    training_data,
)
from lab.training.teacher import Teacher

SAVE_EVERY_S = 120  # seconds between saves within an epoch


class StepOptions(NamedTuple):
    precision: str
    label_smoothing: float
    clip_norm: float
    teacher: Teacher | None


@cli.command
def main() -> int:
    args = parse_args(__doc__)
    machine.keep_freed_memory()
    if args.weights:
        print(weights_score(args.weights, args.model, args.heads, args.data_dir, args.device))
        return 0
    if args.eval:
        _, in_words = score_on_test_set(args.checkpoint, args.data_dir, args.device)
        print(f"{args.checkpoint}: test {in_words}")
        return 0
    if args.finish:
        with files.locked(args.output):
            finish(args.output, args.data_dir, args.device)
        return 0
    with World(args.device).join() as world:
        return train(args, world)


def train(args, world: World) -> int:
    """Train as the options say, read the test set at the end, and return the exit code."""
    heads = heads_to_build(args.model, args.heads, args.widen, args.pretrained)
    if not args.resume:
        require_no_run(args.output)
    writer = tensorboard_writer() if args.tensorboard else None
    if args.amp and args.precision == "fp32" and world.rank == 0:
        print("--amp: this CPU has no instructions for BF16, so this run computes in FP32")

    with world.first_then_others():  # one of them may have to download it
        data, val, test = training_data(TASKS[args.task], args.data_dir, args.val_size, world.size)
    stages = parse_resolutions(args.resolutions, shares=bool(args.minutes))
    batches_of = partial(train_batches, args, data, world)
    sampler = batches_of(stages).sampler
    sides = [stage.scaled(scale).side for stage in stages for scale in sampler.scales]
    model = starting_network(args, len(data.classes), heads, sides)
    if args.device == "cpu":
        value_bytes = 4 if args.precision == "fp32" else 2
        sizes = [size // world.size for _ in stages for size in sampler.sizes]
        for size, side in set(zip(sizes, sides)):  # larger images come in smaller batches
            require_memory(model, size, side, value_bytes)
    teacher = teacher_of(args, data.classes, stages, world) if args.teacher else None
    options = StepOptions(args.precision, args.label_smoothing, args.clip_norm, teacher)
    model = model.to(world.device, memory_format=torch.channels_last)
    network = world.parallel(world.synchronised(model))
    if args.compile:
        require_compiler(world.device)
        # Once a side, and faster than for any. Beyond its limit torch would not compile any more.
        torch._dynamo.config.recompile_limit = max(8, len(set(sides)))
        network = torch.compile(network, dynamic=False)
    run_of = partial(new_run, args, data, sampler, model, world)

    with files.locked(args.output) if world.rank == 0 else contextlib.nullcontext():
        if args.minutes:
            args.shares = args.resolutions
            if args.resume:
                stages = chosen_before(args.output)
            else:
                take_step = partial(step, options=options)
                made = (run_of, batches_of, args.workers, val, len(test))
                stages = stages_that_fit(args.minutes, stages, network, take_step, *made)
            args.resolutions = written(stages)
            args.epochs = sum(stage.epochs for stage in stages)
            if args.warmup_epochs is None:
                args.warmup_epochs = min(WARM_UP, round(args.epochs / 10, 3))
        run = run_of(stages)
        if args.resume:
            require_same_teacher(args)
            run.resume()
        else:
            begin(run, {k: getattr(args, k) for k in ("init", "widen", "teacher")})
        if writer and world.rank == 0:
            files.require_writable(run.output / "tensorboard")
            run.tensorboard = writer(run.output / "tensorboard")
        code = loop(run, network, batches_of(stages), val, options, args.workers, args.max_minutes)
        if code == 0 and world.rank == 0:
            finish(run.output, args.data_dir, world.device)
    return code


def train_batches(args, data, world: World, stages: list[Stage]) -> TrainBatches:
    """Return the batches of a run through `stages` that this process takes, step by step."""
    augment = Augmentation(args.augment, args.erase, args.mixup, args.cutmix, args.jpeg)
    by_epoch = [stage for stage in stages for _ in range(math.ceil(stage.epochs))]
    how = (args.batch_size, args.seed, augment, world.rank, world.size, by_epoch)
    return TrainBatches(TASKS[args.task].objective.batch, data, *how, args.multi_scale)


def starting_network(args, n_classes: int, heads: int | None, sides: list[int]) -> nn.Module:
    """Return the network with the weights that a run begins with, or one for it to resume."""
    settings = network_settings(args.settings)
    model = fresh_model(args.model, n_classes, heads, args.seed, sides, settings)
    if not args.resume:
        source = {"init": args.init, "widened": args.widen, "pretrained": args.pretrained}
        load_start(model, args.model, **source, task=args.task, val_size=args.val_size)
    return model


def teacher_of(args, classes: tuple[str, ...], stages: list[Stage], world: World) -> Teacher:
    """Return the teacher that the options name, once it is known to take the run's images."""
    taught = (args.task, classes, args.val_size)
    how = (args.teacher_weight, args.temperature, world.device, args.precision)
    teacher = Teacher(args.teacher, *taught, *how)
    teacher.require_sides(stages)
    return teacher


def require_same_teacher(args) -> None:
    """Raise BadInput if the file of a resumed run's teacher is not the one that it began with."""
    about = args.output / "config.json"
    if args.teacher and about.exists():  # runs of before it was recorded do not say
        config = files.read_json(about)
        record({}, optional={"sha256": mapping(text)})(config, str(about))
        began = config.get("sha256", {}).get("teacher")
        if began and began != files.sha256(args.teacher):
            raise BadInput(f"{args.teacher} is another file than {args.output} began with")


def new_run(args, data, sampler, model: nn.Module, world: World, stages: list[Stage]) -> Run:
    """Return a run of `model` through `stages`, before its first step."""
    warmup = args.warmup_epochs or 0  # of a trial, none is chosen yet
    config = {k: v for k, v in vars(args).items() if k not in NOT_IN_CONFIG}
    of_run = {"train_images": len(data), "classes": list(data.classes), "world_size": world.size}
    return Run(
        output=args.output,
        world=world,
        model=model,
        ema=averaged(model, args.ema_decay),
        optimizer=build_optimizer(model, args.optimizer, args.lr, args.weight_decay),
        scaler=torch.amp.GradScaler(enabled=args.precision == "fp16"),
        schedule=Schedule(stages, sampler.steps_per_epoch, args.lr, warmup, args.min_lr),
        sampler=sampler,
        validate_every=args.validate_every,
        about={
            "model": args.model,
            "settings": settings_of(model),
            "task": args.task,
            "classes": list(data.classes),
            "img_size": args.img_size,
        },
        config=config | of_run,
    )


def begin(run: Run, used: dict[str, str | None]) -> None:
    """Write config.json and the first last.pth of a run that `used` files, by their options."""
    if run.world.rank == 0:
        require_no_run(run.output)  # now that no other process can begin one
        # What a path says may be replaced later.
        sha256 = {option: files.sha256(path) for option, path in used.items() if path}
        about = machine.provenance() | {"hardware": hardware(run.world), "sha256": sha256}
        files.write_json(run.output / "config.json", run.config | about)
    run.save()


def loop(
    run: Run,
    network: nn.Module,
    batches: TrainBatches,
    val,
    options: StepOptions,
    workers: int,
    max_minutes: float | None,
) -> int:
    """Train from where `run` stands; return 0 at its end or the exit code of what stopped it."""
    world, n_steps = run.world, len(run.schedule)
    # Looking at the loss waits for the device, which costs nothing on a CPU.
    check_every = 1 if world.device.type == "cpu" else 20
    silent = True if world.rank else None  # None: where the output is no terminal
    bar = tqdm(total=n_steps, initial=run.step, unit="step", disable=silent)
    code = 0
    with cli.noted_signals() as signals:
        if run.validation_due:  # it stopped before that
            run.validate(val)
        network.train()
        saved = clock = time.monotonic()
        for images, targets in loader(batches, range(run.step, n_steps), workers, world):
            step(run, network, images, targets, options)
            bar.update()
            due = run.validation_due
            if run.step % check_every and not due:
                continue
            check_finite(run)
            now = time.monotonic()
            run.seconds += now - clock
            # Another round of the same length must still fit.
            late = max_minutes is not None and 2 * now - clock > cli.BEGAN + 60 * max_minutes
            code = world.max(cli.exit_code(signals) or (cli.TIME_IS_UP if late else 0))
            save = world.any(now - saved > SAVE_EVERY_S)
            if due and not code:  # validation takes its time, too
                run.validate(val)
            elif code or save:
                run.save()
            if code:
                break
            if due or save:
                saved = time.monotonic()
            clock = time.monotonic()
        code = code or world.max(cli.exit_code(signals))  # a signal during the last validation
    if code and world.rank == 0:
        print(f"stopped at step {run.step} of {n_steps}: --resume goes on")
    return code


def step(
    run: Run, network: nn.Module, images: Tensor, targets: Tensor, options: StepOptions
) -> None:
    """Train on a batch: images uint8 [b, 3, w, w] and the targets that the task's loss takes.

    `network` is the run's model as it is called: compiled, or parallel over processes.
    """
    task, device, stage = run.task, run.world.device, run.stage()
    torch.manual_seed(run.seed())  # dropout draws from torch's own generators
    images = images.to(device, non_blocking=True)
    x = task.to_input(images, stage.side)
    targets = targets.to(device, non_blocking=True)
    for group in run.optimizer.param_groups:
        group["lr"] = run.schedule.lr(run.step)

    with arithmetic(device.type, options.precision):
        outputs = network(x)
    outputs = outputs.float()
    loss, right = task.objective.loss(outputs, targets, options.label_smoothing)
    if options.teacher:
        loss = options.teacher.loss(outputs, options.teacher.logits(images, stage), loss)
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
    run.sums += torch.stack((loss.detach() * len(images), right, norm))
    run.step += 1


def check_finite(run: Run) -> None:
    """Raise BadInput if a loss or gradient since the last validation was not finite.

    It is asked before anything is saved. Where a scaler skips steps that overflow, gradients do not
    count.
    """
    if not math.isfinite(run.world.sum(run.sums).sum().item()):
        raise BadInput(
            f"the loss or its gradient is not finite near step {run.step}: lower --lr or use "
            f"--precision fp32; {run.output / 'last.pth'} keeps the last good state"
        )


if __name__ == "__main__":
    main()
