"""Training runs as users start, kill and resume them."""

import contextlib
import csv
import math
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import SYNTHETIC, fails_with_one_line, run, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import train
from lab import files
from lab.cli import BadInput
from lab.models.checkpoint import load_checkpoint, load_weights, read_tensors
from lab.models.foreign import load_timm
from lab.training.distributed import World
from lab.training.optimizer import arithmetic, build_optimizer, weight_groups
from lab.training.run import tensorboard_writer
from lab.training.schedule import Schedule, parse_resolutions
from lab.training.start import require_memory, values_kept
from mobilevit import MobileViT


@pytest.mark.parametrize("min_lr", [0.0, 0.02])
def test_one_resolution_gives_torchs_warm_up_and_cosine(min_lr):
    ours = Schedule(parse_resolutions("64:10"), 5, 0.1, 2, min_lr)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=min_lr)
    assert [ours.lr(step) for step in range(10)] == pytest.approx([0.01 * n for n in range(1, 11)])
    for step in range(10, 50):
        assert ours.lr(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()


def test_several_resolutions_share_the_cosine_by_pixels():
    schedule = Schedule(parse_resolutions("32:2,32/128:2,64:1"), 10, 1.0, 0)
    stages = [schedule.stage(step) for step in range(len(schedule))]
    assert [s.side for s in stages] == [32] * 40 + [64] * 10
    assert [s.img_size for s in stages] == [32] * 20 + [128] * 20 + [64] * 10
    assert schedule.lr(40) == pytest.approx(0.5)  # 4 epochs at 32 are as many pixels as 1 at 64


def test_the_last_stage_may_end_within_an_epoch():
    schedule = Schedule(parse_resolutions("32:2,64:0.25"), 8, 1.0, 0)
    assert [schedule.stage(step).side for step in range(len(schedule))] == [32] * 16 + [64] * 2


def test_a_window_is_as_large_in_the_image_as_in_the_input():
    whole, half = parse_resolutions("64:1,96/192:1")
    assert whole.window == 32 and half.window == 16


@pytest.mark.parametrize(
    "text",
    ["64", "64:0", "16:2", "64:1,", "64:1:1", "a:b", "64/32:1", "64/100:1", "64/:1"]
    + ["64:0.5,128:1", "64:inf", "64:nan", "64:1e30", "64:600000,64:600000", "1000000:1"],
)
def test_nonsense_resolutions_are_refused(text):
    with pytest.raises(BadInput, match="WINDOW/SIDE:EPOCHS"):
        parse_resolutions(text)


def test_norms_and_biases_do_not_decay():
    model = MobileViT("xxs")
    decayed, rest = weight_groups(model, 0.1)
    matrices = {m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(decayed["params"]) == matrices
    assert set(rest["params"]) == set(model.parameters()) - matrices
    assert rest["weight_decay"] == 0


MUON = {"name": "muon", "weight_decay": 0.0, "lr": 10.0}


def test_muon_turns_all_directions_of_a_matrix_alike_and_leaves_depthwise_filters_to_nadamw():
    torch.manual_seed(0)
    layers = {"linear": nn.Linear(8, 12), "dense": nn.Conv2d(4, 6, 3)}
    model = nn.ModuleDict(layers | {"depthwise": nn.Conv2d(6, 6, 3, groups=6)})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = build_optimizer(model, **MUON)
    for group in optimizer.param_groups:
        group["lr"] = 0.1  # as the schedule does
    optimizer.step()
    for name, p in model.named_parameters():
        step = (before[name] - p.detach()).flatten(1) if p.ndim > 1 else before[name] - p.detach()
        if name in ("linear.weight", "dense.weight"):
            u, _, vh = torch.linalg.svd(p.grad.flatten(1), full_matrices=False)
            assert torch.cosine_similarity(step.flatten(), (u @ vh).flatten(), dim=0) > 0.97
            assert step.square().mean().sqrt() == pytest.approx(0.2 * 0.1, rel=0.2)  # as AdamW's
        else:  # the first step of Adam and its like: one size for every element, and its sign
            assert step.sign().equal(p.grad.view_as(step).sign())
            assert step.abs().std() < 0.01 * step.abs().mean() and step.abs().max() < 0.2


def test_muon_without_timm_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(BadInput, match="pip install 'timm"):
        build_optimizer(nn.Linear(4, 4), **MUON)


def test_attention_to_train_on_has_the_gradients_of_the_fused_one():
    torch.manual_seed(0)
    model, x = MobileViT("xxs").double(), torch.randn(2, 3, 64, 64).double()
    gradients = []
    for fused, context in ((True, contextlib.nullcontext()), (False, arithmetic("cpu", "bf16"))):
        with context:  # autocast leaves float64 alone
            assert torch.backends.cuda.flash_sdp_enabled() is fused  # a flag for CPUs, too
            loss = model(x).square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for fused, ours in zip(*gradients, strict=True):
        assert torch.allclose(fused, ours, rtol=1e-6, atol=1e-9)


def final_state(folder):
    """Step, weights, averaged weights and AdamW's moments, flat."""
    state = read_tensors(folder / "last.pth")
    moments, ema = state["optimizer"]["state"], state.get("ema", {})
    flat = {f"{i}.{k}": v for i, moment in moments.items() for k, v in moment.items()}
    return state["step"], flat | state["model"] | {f"ema.{k}": v for k, v in ema.items()}


def log_without_times(folder):
    with open(folder / "log.csv") as file:
        return [
            {k: row[k] for k in ("epoch", "lr", "train_loss", "val_loss", "val_accuracy_pct")}
            for row in csv.DictReader(file)
        ]


def wait_for(path):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def test_killed_and_stopped_runs_resume_to_the_same_bits(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("train.py", *SYNTHETIC, "--ema-decay", "0.9", "--output", whole)

    command = ("train.py", *SYNTHETIC, "--ema-decay", "0.9", "--output", broken)
    process = start(*command)
    wait_for(broken / "last.pth")
    os.kill(process.pid, signal.SIGKILL)  # before the first step is saved
    process.communicate()
    # Stops within the first epoch.
    out, _ = run(*command, "--resume", "--max-minutes", "0.02", code=3)
    assert "--resume goes on" in out and 0 < final_state(broken)[0] < 72
    process = start(*command, "--resume")
    wait_for(broken / "log.csv")
    os.kill(process.pid, signal.SIGKILL)  # within the second epoch
    process.communicate()
    assert final_state(broken)[0] < 72
    (broken / "log.csv").unlink()  # as if killed between that and last.pth
    out, _ = run(*command, "--resume", "--workers", "1")
    assert "epoch" in out and "of 500" in out

    (step, ours), (broken_step, theirs) = final_state(whole), final_state(broken)
    assert step == broken_step == 72
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert log_without_times(whole) == log_without_times(broken)
    best, broken_best = (load_checkpoint(folder / "best.pth") for folder in (whole, broken))
    assert best["test_accuracy_pct"] == broken_best["test_accuracy_pct"] is not None
    for name, tensor in best["state_dict"].items():
        assert torch.equal(tensor, broken_best["state_dict"][name])
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_signal_to_all_its_processes_stops_a_run_cleanly(tmp_path):
    process = start("train.py", *SYNTHETIC, "--workers", "1", "--output", tmp_path, group=True)
    wait_for(tmp_path / "log.csv")
    os.killpg(process.pid, signal.SIGTERM)  # within the second epoch, and to the loader, too
    out, err = process.communicate()
    assert process.returncode == 143 and not err
    step, _ = final_state(tmp_path)
    assert out.endswith(f"stopped at step {step} of 72: --resume goes on\n") and step > 36


def test_ctrl_c_while_a_run_starts_is_one_line(tmp_path):
    process = start("train.py", *SYNTHETIC, "--output", tmp_path / "run")
    time.sleep(0.4)  # imports take seconds
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and err == "train.py: stopped by SIGINT\n"
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused(tmp_path):
    process = start("train.py", *SYNTHETIC, "--epochs", "50", "--output", tmp_path)
    wait_for(tmp_path / "last.pth")
    says = "another process is at work"
    fails_with_one_line("train.py", *SYNTHETIC, "--output", tmp_path, "--resume", says=says)
    process.kill()
    process.communicate()
    with files.locked(tmp_path):  # a lock dies with its process
        pass


def test_a_full_disk_is_one_line_and_resuming_works(tmp_path):
    run("train.py", *SYNTHETIC, "--output", tmp_path, "--max-minutes", "0.0001", code=3)
    before = (tmp_path / "last.pth").read_bytes()
    # No file may grow beyond a megabyte: writing ends as on a full disk.
    limited = ("-c", "import resource, runpy, sys; sys.argv = sys.argv[1:]; "
               "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); "
               "runpy.run_path('train.py', run_name='__main__')")  # fmt: skip
    command = ("train.py", *SYNTHETIC, "--output", tmp_path, "--resume", "--max-minutes", "0.0001")
    fails_with_one_line(*command, module=limited, says="cannot write")
    assert (tmp_path / "last.pth").read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))
    run(*command, code=3)
    assert read_tensors(tmp_path / "last.pth")["step"] == 2


def test_loader_processes_may_be_spawned(tmp_path):
    """As on Windows and macOS: everything that goes to them is pickled."""
    spawned = ("-c", "import multiprocessing, runpy, sys; sys.argv = sys.argv[1:]; "
               "multiprocessing.set_start_method('spawn'); "
               "runpy.run_path('train.py', run_name='__main__')")  # fmt: skip
    flags = ("--workers", "1", "--max-minutes", "0.0001", "--output", tmp_path)
    out, _ = run("train.py", *SYNTHETIC, *flags, module=spawned, code=3)
    assert out == "stopped at step 1 of 72: --resume goes on\n"


def test_two_processes_train_as_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run("train.py", *SYNTHETIC, "--output", one)
    module = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    run("train.py", *SYNTHETIC, "--output", two, module=module)
    for ours, theirs in zip(log_without_times(one), log_without_times(two), strict=True):
        assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), abs=5e-3)
        assert float(ours["val_loss"]) == pytest.approx(float(theirs["val_loss"]), abs=5e-2)


def test_eval_prints_what_training_found(checkpoint):
    out, _ = run("train.py", "--eval", "--checkpoint", checkpoint)
    accuracy = load_checkpoint(checkpoint)["test_accuracy_pct"]
    assert f"test {accuracy:.2f} %" in out


def test_the_last_good_checkpoint_survives_a_loss_that_is_not_finite(tmp_path):
    out = tmp_path / "out"
    run("train.py", *SYNTHETIC, "--output", out, "--max-minutes", "0.001", code=3)
    state = read_tensors(out / "last.pth")
    state["model"]["stem.conv.weight"].fill_(1e38)
    torch.save(state, out / "last.pth")
    before = (out / "last.pth").read_bytes()
    fails_with_one_line("train.py", *SYNTHETIC, "--output", out, "--resume", says="not finite")
    assert (out / "last.pth").read_bytes() == before


def test_a_run_may_end_within_an_epoch_and_resume_there(tmp_path):
    flags = [flag for flag in SYNTHETIC if flag not in ("--img-size", "--epochs")]
    flags = [flag for flag in flags if flag not in ("32", "2")] + ["--resolutions", "32:1,64:0.5"]
    out, _ = run("train.py", *flags, "--output", tmp_path)
    steps = read_tensors(tmp_path / "last.pth")["step"]
    log = list(csv.DictReader((tmp_path / "log.csv").open()))
    per_epoch = steps / 1.5
    assert [row["img_size"] for row in log] == ["32", "64"] and per_epoch % 1 == 0
    assert float(log[1]["images_per_s"]) * float(log[1]["seconds"]) == pytest.approx(
        50 * per_epoch / 2, rel=0.1
    )
    assert run("train.py", *flags, "--output", tmp_path, "--resume")[0] == out.splitlines(True)[-1]


def test_a_run_may_stop_before_its_epochs_are_validated(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # One step an epoch.
    command = ("train.py", *SYNTHETIC, "--batch-size", "1800", "--optimizer", "muon", "--output")
    run(*command, whole)
    late = ("--max-minutes", "0.0001")  # after a single step
    outs = [
        run(*command, broken, *late, *flags, code=code)[0]
        for flags, code in (((), 3), (("--resume",), 3), (("--resume",), 0))
    ]
    assert outs[0] == "stopped at step 1 of 2: --resume goes on\n"
    assert outs[1].startswith("epoch 1") and outs[1].endswith("step 2 of 2: --resume goes on\n")
    assert outs[2].startswith("epoch 2") and "of 500" in outs[2]
    ours, theirs = (load_checkpoint(folder / "best.pth") for folder in (whole, broken))
    assert log_without_times(whole) == log_without_times(broken)
    for name, tensor in ours["state_dict"].items():
        assert torch.equal(tensor, theirs["state_dict"][name])


def test_every_ingredient_of_the_full_recipe_runs(tmp_path):
    flags = ("--mixup", "0.2", "--cutmix", "1", "--erase", "0.25", "--ema-decay", "0.9")
    flags += ("--precision", "bf16", "--wd", "0.1", "--label-smooth", "0.2", "--min-lr", "0.0001")
    flags += ("--warmup", "0.1", "--augment", "autoaugment", "--tensorboard")
    flags += ("--val-size", "1800")  # bf16 is slow where a CPU has none: a few steps of it
    out, _ = run("train.py", *SYNTHETIC, *flags, "--epochs", "1", "--output", tmp_path)
    assert "epoch 1" in out and "of 500" in out
    config = files.read_json(tmp_path / "config.json")
    assert (config["weight_decay"], config["label_smoothing"]) == (0.1, 0.2)
    assert (config["warmup_epochs"], config["min_lr"]) == (0.1, 0.0001)
    (line,) = csv.DictReader((tmp_path / "log.csv").open())
    assert float(line["lr"]) >= 0.0001
    best, last = (read_tensors(tmp_path / f"{n}.pth") for n in ("best", "last"))
    for name, tensor in best["state_dict"].items():
        assert torch.equal(tensor, last["ema"][f"module.{name}"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (accuracy,) = events.Scalars("val_accuracy_pct")
    assert (accuracy.step, accuracy.value) == (1, pytest.approx(best["val_accuracy_pct"], abs=0.01))


def test_a_missing_tensorboard_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BadInput, match="pip install tensorboard"):
        tensorboard_writer(tmp_path)


@pytest.mark.parametrize("at", [0, 2])
def test_a_loss_or_gradient_norm_that_is_not_finite_is_noticed(at, tmp_path):
    state = SimpleNamespace(world=World("cpu"), sums=torch.ones(3), step=5, output=tmp_path)
    train.check_finite(state)
    state.sums[at] = math.inf
    with pytest.raises(BadInput, match="near step 5"):
        train.check_finite(state)


def test_a_run_is_neither_overwritten_nor_resumed_with_other_options(checkpoint):
    folder = checkpoint.parent
    before = checkpoint.read_bytes()
    fails_with_one_line("train.py", *SYNTHETIC, "--output", folder, says="already holds a run")
    fails_with_one_line(
        "train.py",
        *SYNTHETIC,
        "--lr",
        "0.1",
        "--output",
        folder,
        "--resume",
        says="--lr 0.002 (now 0.1)",
    )
    assert checkpoint.read_bytes() == before


def test_resuming_a_finished_run_repeats_its_result(checkpoint):
    out, _ = run("train.py", *SYNTHETIC, "--output", checkpoint.parent, "--resume")
    assert out.startswith("mobilevit_xxs-synthetic: epoch")


class Payload:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def test_bad_checkpoints_are_one_line(checkpoint, tmp_path):
    truncated, pickled, other = (tmp_path / f"{n}.pth" for n in ("truncated", "pickled", "other"))
    truncated.write_bytes(checkpoint.read_bytes()[:1000])
    torch.save({"state_dict": Payload()}, pickled)
    torch.save({"weights": torch.zeros(3)}, other)
    for path, says in (
        (truncated, "not a readable checkpoint"),
        (pickled, "not a readable"),
        (other, "not a checkpoint of this project"),
        (tmp_path / "absent.pth", "no checkpoint at"),
    ):
        fails_with_one_line("train.py", "--eval", "--checkpoint", path, says=says)


def test_a_checkpoint_of_another_network_names_both_sides(checkpoint):
    with pytest.raises(BadInput, match=r"holds mobilevit_xxs with .* asked for is mobilevit_xs"):
        load_weights(MobileViT("xs"), "mobilevit_xs", load_checkpoint(checkpoint), checkpoint)


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--heads", "3"), "do not divide"),
        (("--batch-size", "5000"), "batch size 5000"),
        (("--val-size", "2000"), "--val-size 2000 leaves none of 2000 to train on"),
    ],
)
def test_options_that_do_not_fit_the_data_or_the_network_leave_nothing(flags, says, tmp_path):
    out = tmp_path / "out"
    fails_with_one_line("train.py", "--task", "synthetic", *flags, "--output", out, says=says)
    assert not out.exists()


def parsed(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    return train.parse_args()


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--lr", "-1"), "--lr: -1 is not a number above 0 and at most 10"),
        (("--lr", "nan"), "--lr: nan is not"),
        (("--min-lr", "0.1"), "--min-lr must not be above --lr"),
        (("--max-minutes", "inf"), "--max-minutes: inf is not"),
        (("--seed", "-1"), "--seed: -1 is not a whole number from 0"),
        (("--seed", str(2**64)), "--seed: 18446744073709551616 is not a whole number"),
        (("--epochs", str(10**30)), "is not a whole number from 1 to 1000000"),
        (("--epochs", "9" * 5000), "--epochs: 9999"),
        (("--img-size", "1000000"), "--img-size: 1000000 is not a whole number from 32 to 4096"),
        (("--workers", "1000000"), "--workers: 1000000 is not a whole number from 0 to 128"),
        (("--val-size", "0"), "--val-size: 0 is not"),
        (("--batch-size", "1", "--img-size", "32"), "--batch-size 1 needs more than 32 pixels"),
        (("--epochs", "5"), "--warmup-epochs"),
        (("--model", "xl"), "no network is called xl"),
        (("--task", "imagefolder"), "invalid choice: 'imagefolder'"),
        (("--resolutions", "64:20", "--epochs", "3"), "replaces"),
        (("--eval",), "go together"),
        (("--eval", "--checkpoint", "x.pth", "--model", "s"), "--model excluded"),
        (("--amp", "--precision", "bf16"), "not allowed with"),
        (("--patience", "10"), "--patience is not known: the best epoch is kept anyway"),
        (("--nonsense",), "unrecognized"),
    ],
)
def test_nonsense_flags_are_one_line(flags, says, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(monkeypatch, *flags)
    err = capsys.readouterr().err
    assert end.value.code == 2 and says in err and err.count("\n") == 1 and len(err) < 400


def test_the_published_command_is_understood(monkeypatch):
    published = (
        "--model xxs --epochs 100 --amp --wd 0.05 --warmup 5 --label-smooth 0.2 --min-lr 1e-5"
    )
    args = parsed(monkeypatch, *published.split(), "--output", "out", "--device", "cpu")
    assert args.model == "mobilevit_xxs" and args.resolutions == "256:100"
    assert (args.weight_decay, args.warmup_epochs, args.label_smoothing) == (0.05, 5, 0.2)
    assert args.min_lr == 1e-5 and args.output.name == "out"


@pytest.mark.parametrize(
    "instructions, precision", [("avx2 avx512_bf16", "bf16"), ("avx2", "fp32")]
)
def test_amp_is_what_the_cpu_has(instructions, precision, monkeypatch):
    monkeypatch.setattr("lab.machine._cpuinfo", lambda: f"flags : fpu {instructions} sse\n")
    assert parsed(monkeypatch, "--amp", "--device", "cpu").precision == precision
    assert parsed(monkeypatch, "--device", "cpu").precision == "fp32"


def test_a_step_that_cannot_fit_in_memory_is_one_line(monkeypatch):
    model = MobileViT("xxs")
    # By hand: the stem alone keeps its input and twice what its convolution gives.
    stem = 3 * 64**2 + 2 * 16 * 32**2
    assert stem < values_kept(model, 1, 64) == values_kept(model, 2, 64) / 2
    kept = 4 * values_kept(model, 8, 1024)
    monkeypatch.setattr("lab.machine.memory_bytes", lambda: kept)
    require_memory(model, 8, 1024, value_bytes=4)
    with pytest.raises(BadInput, match="a step on 9 images of 1024x1024 takes"):
        require_memory(model, 9, 1024, value_bytes=4)


def test_an_unwritable_output_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    fails_with_one_line(
        "train.py", *SYNTHETIC, "--output", tmp_path / "file" / "run", says="cannot write"
    )


def test_timm_weights_are_loaded_up_to_the_classifier(monkeypatch):
    import timm

    source = timm.create_model("mobilevit_xxs", num_classes=1000)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: source)
    model = MobileViT("xxs", 10, heads=4)
    classifier = model.classifier.weight.clone()
    load_timm(model, "mobilevit_xxs")
    assert torch.equal(model.stem.conv.weight, source.stem.conv.weight)
    assert torch.equal(
        model.stages[4][1].layers[2].ffn[2].bias, source.stages[4][1].transformer[2].mlp.fc2.bias
    )
    assert torch.equal(model.classifier.weight, classifier)
