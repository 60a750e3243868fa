"""A training step and what a run keeps of its steps, against loops by hand."""

import copy
import time

import pytest
import torch
from torch import nn

import train
from lab import cli
from lab.models.checkpoint import load_checkpoint
from lab.tasks import synthetic
from lab.tasks.cifar10 import to_input
from lab.tasks.sampler import Sampler
from lab.training.distributed import World
from lab.training.optimizer import averaged, build_optimizer
from lab.training.run import Run
from lab.training.schedule import Schedule, parse_resolutions
from lab.training.start import fresh_model, load_start

PEAK, DECAY, SMOOTHING, CLIP, KEPT = 0.1, 0.5, 0.2, 0.05, 0.9


def run_of(folder, resolutions="32:2", kept=KEPT, optimizer="adamw"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 4, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 8 * 8, 10)
    )
    stages = parse_resolutions(resolutions)
    return Run(
        output=folder,
        world=World("cpu"),
        model=model,
        ema=averaged(model, kept),
        optimizer=build_optimizer(model, optimizer, PEAK, DECAY),
        scaler=torch.amp.GradScaler(enabled=False),
        schedule=Schedule(stages, 2, PEAK, 1),
        sampler=Sampler(40, 20, seed=0),
        validate_every=1,
        about={"task": "synthetic", "img_size": stages[-1].img_size},
        config={"train_images": 40, "classes": []},
    )


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_are_those_of_a_loop_by_hand(name, tmp_path):
    """They have warm-up, cosine, smoothed labels, clipped gradients, decay and averaged weights."""
    run, data = run_of(tmp_path, optimizer=name), synthetic.load(None, True)
    network = copy.deepcopy(run.model)
    decaying = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() == 1]
    groups = [{"params": decaying, "weight_decay": DECAY}, {"params": others, "weight_decay": 0}]
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=1.0),
        "sgd": lambda: torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True),
    }[name]()
    options = train.StepOptions("fp32", SMOOTHING, CLIP, None)
    mean, sums = {}, torch.zeros(3)
    for i, lr in enumerate((0.05, 0.1, 0.1, 0.05)):
        images, labels = data.images[20 * i :][:20], data.labels[20 * i :][:20]
        train.step(run, run.model.train(), images, labels, options)

        logits = network(to_input(images, 32))
        wanted = (1 - SMOOTHING) * nn.functional.one_hot(labels, 10) + SMOOTHING / 10
        loss = -(wanted * logits.log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
        assert norm > CLIP
        for p in network.parameters():
            p.grad *= CLIP / norm
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        right = (logits.argmax(1) == labels).sum()
        sums += torch.stack((20 * loss.detach(), right, norm))
        for n, value in network.state_dict().items():
            mean[n] = KEPT * mean.get(n, value.clone()) + (1 - KEPT) * value

    state, averages = run.model.state_dict(), run.ema.module.state_dict()
    for n, value in network.state_dict().items():
        close(state[n], value)
        if value.is_floating_point():
            close(averages[n], mean[n])
    close(run.sums, sums, 1e-3)
    assert run.step == 4


def test_the_best_epoch_at_the_last_size_is_kept_the_first_of_equals(tmp_path, monkeypatch):
    run = run_of(tmp_path, "32:1,64:4")
    scores = iter((90.0, 10.0, 30.0, 30.0, 20.0))
    monkeypatch.setattr(Run, "evaluate", lambda *_: {"loss": 1.0, "accuracy_pct": next(scores)})
    saved = []
    monkeypatch.setattr(
        "lab.training.run.save_checkpoint", lambda path, content: saved.append((path.name, content))
    )
    for epoch in range(1, 6):
        run.step = 2 * epoch
        run.validate(None)
    best = [content for name, content in saved if name == "best.pth"]
    assert [(b["epoch"], b["val_accuracy_pct"]) for b in best] == [(2, 10.0), (3, 30.0)]


def test_a_resumed_run_has_all_that_the_saved_one_had(tmp_path):
    run = run_of(tmp_path, kept=0)
    run.seconds, run.best_accuracy = 12.5, 34.0
    run.sums += torch.tensor([1.0, 2.0, 3.0])
    run.save()
    again = run_of(tmp_path, kept=0)
    again.resume()
    assert (again.seconds, again.best_accuracy) == (12.5, 34.0)
    assert again.sums.tolist() == [1, 2, 3]


def started(monkeypatch, folder, *flags):
    """What train.py does with a few steps of a small network, in this process."""
    few = ("--val-size", "1800", "--output", str(folder))
    monkeypatch.setattr("sys.argv", ["train.py", "--task", "synthetic", *flags, *few])
    return train.train(train.parse_args(train.__doc__), World("cpu"))


def test_a_run_is_saved_within_an_epoch_when_its_time_has_come(tmp_path, monkeypatch):
    steps, real = [], Run.save
    monkeypatch.setattr(Run, "save", lambda run: steps.append(run.step) or real(run))
    monkeypatch.setattr(Run, "evaluate", lambda *_: {"loss": 1.0, "accuracy_pct": 50.0})
    monkeypatch.setattr(train, "finish", lambda *_: None)
    flags = "--img-size 32 --batch-size 50 --epochs 1 --warmup-epochs 0.5 --augment none".split()
    for every, expected in ((-1, [0, 1, 2, 3, 4]), (1e9, [0, 4])):
        steps.clear()
        monkeypatch.setattr(train, "SAVE_EVERY_S", every)
        assert started(monkeypatch, tmp_path / str(every), *flags) == 0
        assert steps == expected


def test_trials_of_a_schedule_leave_no_weights(tmp_path, monkeypatch):
    left = {}
    monkeypatch.setattr(cli, "BEGAN", time.monotonic())
    monkeypatch.setattr("lab.training.budget.seconds_each", lambda act, **_: (act(), 1.0)[1])
    monkeypatch.setattr(train, "loop", lambda run, *_: left.update(run.model.state_dict()) or 3)
    started(monkeypatch, tmp_path, *"--minutes 9 --resolutions 32:1 --batch-size 50".split())
    fresh = fresh_model("mobilevit_xxs", 10, None, 0, []).state_dict()
    assert all(torch.equal(value, left[name]) for name, value in fresh.items())


def test_a_seed_draws_the_weights():
    one, same, other = (fresh_model("mobilevit_xxs", 10, None, s, []) for s in (1, 1, 2))
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


@pytest.mark.parametrize("name", ["mobilevit_xxs", "ssdlite_mobilevit_xxs"])
def test_init_gives_the_weights_of_a_checkpoint_to_a_network_or_its_backbone(name, checkpoint):
    state, model = load_checkpoint(checkpoint)["state_dict"], fresh_model(name, 10, None, 1, [])
    load_start(model, name, init=checkpoint, task="synthetic", val_size=200)
    part = getattr(model, "backbone", model)
    assert all(torch.equal(value, state[n]) for n, value in part.state_dict().items())
