"""Training runs as users start, kill and resume them."""

import csv
import math
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import SYNTHETIC, fails_with_one_line, run, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from lab import files
from lab.cli import BadInput
from lab.models.checkpoint import load_checkpoint, load_weights, read_tensors
from lab.training.distributed import World
from mobilevit import MobileViT


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
    few = ("--val-size", "1600", "--epochs", "1", "--output")  # four steps
    run("train.py", *SYNTHETIC, *few, one)
    module = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    run("train.py", *SYNTHETIC, *few, two, module=module)
    (alone,), (together,) = log_without_times(one), log_without_times(two)
    for name, most in (("train_loss", 1e-3), ("val_loss", 1e-3), ("val_accuracy_pct", 0.1)):
        assert float(alone[name]) == pytest.approx(float(together[name]), abs=most)


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
    # One step an epoch, of all images that are not held out.
    few = ("--val-size", "1800", "--batch-size", "200")
    command = ("train.py", *SYNTHETIC, *few, "--optimizer", "muon", "--output")
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


def test_a_compiled_run_learns_the_same(tmp_path):
    """By dynamo's graph, that is, which runs as it stands: no compiler is needed."""
    few = ("--val-size", "1800", "--epochs", "1", "--output")  # four steps
    run("train.py", *SYNTHETIC, *few, tmp_path / "eager")
    eager = ("-c", "import runpy, sys, torch; sys.argv = sys.argv[1:]; real = torch.compile; "
             "torch.compile = lambda *a, **k: print('compiled') or real(*a, **k, backend='eager'); "
             "runpy.run_path('train.py', run_name='__main__')")  # fmt: skip
    command = ("train.py", *SYNTHETIC, *few, tmp_path / "compiled", "--compile")
    assert run(*command, module=eager)[0].startswith("compiled\n")
    (ours,), (compiled,) = map(log_without_times, (tmp_path / "eager", tmp_path / "compiled"))
    assert ours == compiled


def test_a_run_chooses_the_epochs_that_fit_its_minutes(tmp_path):
    shares = "--minutes 1 --resolutions 32/64:0.5,64:0.5 --validate-every 3"
    data = "--task synthetic --batch-size 50 --augment crop-flip --jpeg 0.5 --erase 0.5"
    command = ("train.py", *shares.split(), *data.split(), "--output", tmp_path)
    out, _ = run(*command, "--max-minutes", "0.001", code=3)
    assert out.startswith("--minutes 1: ") and " images/s at 64, so --resolutions 32/64:" in out
    config = files.read_json(tmp_path / "config.json")
    assert (config["minutes"], config["shares"]) == (1, "32/64:0.5,64:0.5")
    assert config["warmup_epochs"] == min(10, round(config["epochs"] / 10, 3))
    assert f"so --resolutions {config['resolutions']}\n" in out
    # Resumed, it goes on with these epochs, whatever the time.
    out, _ = run(*command, "--resume", "--max-minutes", "0.001", code=3)
    assert "--minutes" not in out and "--resume goes on" in out
    fails_with_one_line(*command, "--resume", "--minutes", "9", says="--minutes 1.0 (now 9.0)")
    both = ("--minutes", "1", "--epochs", "2")
    fails_with_one_line("train.py", *both, says="--minutes replaces --epochs")


def test_a_run_cut_short_is_finished_with_the_weights_it_has(tmp_path):
    command = ("train.py", *SYNTHETIC, "--epochs", "4", "--validate-every", "2")
    process = start(*command, "--output", tmp_path)
    wait_for(tmp_path / "log.csv")
    process.kill()
    process.communicate()
    with files.locked(tmp_path):
        fails_with_one_line("train.py", "--finish", "--output", tmp_path, says="another process is")
    out, _ = run("train.py", "--finish", "--output", tmp_path)
    assert out.startswith("mobilevit_xxs-synthetic: epoch 2 chosen") and "of 500" in out
    metrics = files.read_json(tmp_path / "metrics.json")
    assert (metrics["epoch"], metrics["epochs_trained"]) == (2, 2) and metrics["hardware"]
    assert metrics["command"].startswith("python train.py --task synthetic")  # not --finish
    assert load_checkpoint(tmp_path / "best.pth")["test_accuracy_pct"] is not None
    assert run("train.py", "--finish", "--output", tmp_path)[0] == out
    fails_with_one_line("train.py", "--finish", "--lr", "1", says="--finish takes all else from")


def test_a_judged_run_may_train_on_without_a_better_epoch(tmp_path):
    command = ("train.py", *SYNTHETIC, "--val-size", "1800", "--batch-size", "200")
    late, finish = ("--max-minutes", "0.0001"), ("train.py", "--finish", "--output", tmp_path)
    run(*command, "--output", tmp_path, *late, code=3)
    fails_with_one_line(*finish, says="has no weights chosen yet: --resume the run")
    run(*command, "--output", tmp_path, *late, "--resume", code=3)  # validates the first epoch
    out, _ = run(*finish)
    before, state = files.read_json(tmp_path / "metrics.json"), read_tensors(tmp_path / "last.pth")
    torch.save(state | {"best_accuracy": 100.0}, tmp_path / "last.pth")
    assert run(*command, "--output", tmp_path, "--resume")[0].endswith(out)
    after = files.read_json(tmp_path / "metrics.json")
    assert (before["epochs_trained"], after["epochs_trained"], after["epoch"]) == (1, 2, 1)
    assert after["train_s"] > before["train_s"]


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
    other = ("train.py", *SYNTHETIC, "--lr", "0.1", "--output", folder, "--resume")
    fails_with_one_line(*other, says="--lr 0.002 (now 0.1)")
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
        (other, "it lacks state_dict; mere weights go to --weights"),
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
        (("--val-size", "2000"), "--val-size 2000 leaves nothing to some"),
    ],
)
def test_options_that_do_not_fit_the_data_or_the_network_leave_nothing(flags, says, tmp_path):
    out = tmp_path / "out"
    fails_with_one_line("train.py", "--task", "synthetic", *flags, "--output", out, says=says)
    assert not out.exists()


def test_an_unwritable_output_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    fails_with_one_line(
        "train.py", *SYNTHETIC, "--output", tmp_path / "file" / "run", says="cannot write"
    )
