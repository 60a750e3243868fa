"""Schedules, optimizers and the options of train.py, without a run."""

import contextlib
import sys

import pytest
import torch
from conftest import SYNTHETIC
from torch import nn

import train
from lab import machine
from lab.cli import BadInput
from lab.models.foreign import load_timm
from lab.training.distributed import World
from lab.training.optimizer import Muon, arithmetic, build_optimizer, weight_groups
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


def test_a_part_of_an_epoch_is_rounded_to_steps():
    (stage,) = parse_resolutions("64:0.29")  # times 100 it is 28.999... in floats
    assert (stage.steps(100), stage.steps(10), stage.steps(1)) == (29, 3, 1)


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


def test_muon_turns_all_directions_of_a_matrix_alike_and_leaves_depthwise_filters_to_adamw():
    torch.manual_seed(0)
    layers = {"linear": nn.Linear(8, 12), "dense": nn.Conv2d(4, 6, 3)}
    model = nn.ModuleDict(layers | {"depthwise": nn.Conv2d(6, 6, 3, groups=6)})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = gradients[name].clone()
    optimizer = build_optimizer(model, **MUON)
    for group in optimizer.param_groups:
        group["lr"] = 0.1  # as the schedule does
    optimizer.step()
    for name, p in model.named_parameters():
        step = before[name] - p.detach()
        if name in ("linear.weight", "dense.weight"):
            u, _, vh = torch.linalg.svd(gradients[name].flatten(1), full_matrices=False)
            assert torch.cosine_similarity(step.flatten(), (u @ vh).flatten(), dim=0) > 0.97
            assert step.square().mean().sqrt() == pytest.approx(0.2 * 0.1, rel=0.2)  # as AdamW's
        else:  # the first step of Adam: one size for every element, and its sign
            torch.testing.assert_close(step, 0.1 * gradients[name].sign(), rtol=1e-4, atol=1e-4)


def test_muon_moves_matrices_as_timms_does():
    timm_optim = pytest.importorskip("timm.optim")
    torch.manual_seed(0)
    sizes = ((8, 12), (12, 8), (8, 12), (6, 6), (20, 4))
    ours, theirs = (nn.ParameterList(nn.Parameter(torch.ones(s)) for s in sizes) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.3}
    optimizers = (
        Muon([{"params": list(ours)}], 0.1),
        timm_optim.Muon(theirs.parameters(), nesterov=True, **settings),
    )
    optimizers[0].param_groups[0]["weight_decay"] = 0.3
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        moved = (a.detach() - 0.97**3, b.detach() - 0.97**3)
        assert torch.cosine_similarity(*(m.flatten() for m in moved), dim=0) > 0.999
        assert moved[0].norm() == pytest.approx(moved[1].norm().item(), rel=0.02)


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


def test_a_missing_tensorboard_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out = tmp_path / "run"
    args = parsed(monkeypatch, *SYNTHETIC, "--tensorboard", "--output", str(out))
    with pytest.raises(BadInput, match="pip install tensorboard"):
        train.train(args, World("cpu"))
    assert not out.exists()


def parsed(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    return train.parse_args(train.__doc__)


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
        (("--task", "imagefolder"), "photos are not trained on"),
        (("--resolutions", "64:20", "--epochs", "3"), "replaces"),
        (("--eval",), "go together"),
        (("--teacher-weight", "1"), "--teacher-weight goes with --teacher"),
        (("--temperature", "4"), "--temperature goes with --teacher"),
        (
            ("--eval", "--weights", "w.pth", "--task", "segmentation"),
            "judges classifiers: quantize.py --weights takes",
        ),
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
    assert end.value.code == 2 and says in err and err.count("\n") == 1 and len(err) < 500


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


def test_muon_leaves_tables_that_are_no_weights_of_layers_to_adamw():
    model = nn.Module()
    model.positions = nn.Parameter(torch.zeros(4, 6))
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    model.positions.grad = gradient.clone()
    build_optimizer(model, "muon", lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(
        -model.positions.detach(), 0.1 * gradient.sign(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "script, says",
    [
        (machine.__file__.replace("machine.py", "bench/__main__.py"), "python -m lab.bench loader"),
        ("/elsewhere/quantize.py", "python quantize.py loader"),
    ],
)
def test_a_result_names_the_command_that_gives_it(script, says, monkeypatch):
    monkeypatch.setattr("sys.argv", [script, "loader"])
    assert machine.provenance()["command"] == says
