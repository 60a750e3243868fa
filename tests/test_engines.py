"""Engines of torch, and how every engine is judged and timed."""

import json
import sys

import pytest
import torch
from conftest import ROOT

from lab.bench import __main__ as bench
from lab.bench import quantization
from lab.bench.forked import forked
from lab.bench.quantization import engines
from lab.cli import BadInput
from lab.engines import EngineMissing, torch_eager, torch_fx
from lab.engines.measure import latency, predict
from lab.tasks.classification import confusion, score
from mobilevit import MobileViT
from ptq import RECIPES
from ptq.methods.norms import replace_norms


def test_fx_computes_in_int8():
    torch.manual_seed(0)
    model = MobileViT("xxs").eval()
    batches = [(torch.randn(2, 3, 64, 64), torch.zeros(2))]
    loaded = torch_fx.load(model, RECIPES["int8-fx"], batches, batches[0][0][:1])
    x = batches[0][0]
    assert not torch.equal(loaded.run(x), model(x))
    kinds = {type(module).__module__ for module in loaded.run.modules()}
    assert any("quantized" in kind for kind in kinds)
    stem = loaded.run.get_submodule("stem.conv").weight()
    assert stem.dtype == torch.qint8


def test_fx_feels_as_a_whole_what_its_int8_network_does():
    torch.manual_seed(0)
    model = MobileViT("xxs").eval()
    batches = [(torch.randn(16, 3, 64, 64), None)]
    replace_norms(model, None, batches, None)
    found = torch_fx.sensitivities(
        model, RECIPES["int8-fx"], batches, lambda network: network(batches[0][0])
    )
    loaded = torch_fx.load(model, RECIPES["int8-fx"], batches, batches[0][0][:1])
    with torch.inference_mode():
        expected, logits = model(batches[0][0]), loaded.run(batches[0][0])
    noise = (logits - expected).double().square().mean() / expected.double().var()
    assert found["noise_of_all"] == pytest.approx(noise.item(), rel=0.2)
    assert len(found["noise"]["weights"]) == 35 + 1 + 4 * 9
    activations = found["noise"]["activations"]
    assert {"check_images", "stem.conv", "stem.act", "classifier"} <= set(activations)
    assert 0 < activations["check_images"] < found["noise_of_all"]
    assert 0 < found["noise_of_rest"] < found["noise_of_all"]


@pytest.mark.parametrize("shape", [(2, 40, 64, 64), (1000,)])  # more and less than one chunk
def test_fast_histograms_are_torchs(shape):
    x = torch.nn.functional.silu(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    edges = ((x.min(), x.max()), (-1.0, 7.5), (-0.1, 0.2), (0, 0))  # exact, wide, too narrow, none
    for layout in (x, x.to(memory_format=torch.channels_last) if x.dim() == 4 else x):
        with torch_fx.FastHistograms():
            assert torch.aminmax(layout) == torch.aminmax(x)
        for low, high in edges:
            low, high = float(low), float(high)
            expected = torch.histc(layout, 2048, min=low, max=high)
            with torch_fx.FastHistograms():
                assert torch.equal(torch.histc(layout, 2048, min=low, max=high), expected)


def test_without_torch_ao_the_engine_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.ao.quantization", None)
    with pytest.raises(EngineMissing, match="no torch.ao.quantization"):
        torch_fx.load(MobileViT("xxs"), RECIPES["int8-fx"], [], None)


def test_predictions_keep_their_order_with_any_number_of_workers():
    model = MobileViT("xxs").eval()
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([2 * i, 2 * i + 1])) for i in range(5)]
    loaded = torch_eager.load(model, RECIPES["fp32"], None, None)
    alone, labels = predict(loaded.run, batches)
    shared, shared_labels = predict(loaded.run, batches, workers=2)
    assert torch.equal(labels, torch.arange(10)) and torch.equal(shared_labels, labels)
    torch.testing.assert_close(alone, shared)
    torch.testing.assert_close(alone[4:6], model(batches[2][0]).detach())


def test_of_many_classes_the_five_likeliest_count_too():
    labels = torch.tensor([0, 1, 2, 3])
    ranks = torch.tensor([0, 4, 5, 200])  # of the true class among the others
    logits = torch.zeros(4, 300)
    for line, label, rank in zip(logits, labels, ranks):
        others = torch.arange(300)[torch.arange(300) != label]
        line[torch.cat((others[:rank], label[None], others[rank:]))] = -torch.arange(300.0)
    found = score(logits, labels, range(300))
    assert (found["accuracy_pct"], found["top5_pct"], found["n_correct"]) == (25.0, 50.0, 1)
    assert "top5_pct" not in score(logits[:, :10], labels, range(10))
    assert confusion(labels, labels, 300) is None and confusion(labels, labels, 4)[1] == [
        0,
        1,
        0,
        0,
    ]


def test_latency_is_single_threaded_and_restores_the_threads():
    torch.set_num_threads(2)
    try:
        seen = []
        stats = latency({"a": lambda: seen.append(torch.get_num_threads())}, 5, 1)
        assert seen == [1] * 6 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert stats["a"]["p10"] <= stats["a"]["median"] <= stats["a"]["p90"]


def test_a_benchmark_of_nothing_that_runs_is_one_line():
    with pytest.raises(BadInput, match="nothing can be timed here"):
        engines(ROOT / "checkpoints" / "mobilevit_xxs" / "best.pth", ["fp16"], 1)  # simulated


def test_an_engine_that_fails_is_told_and_the_others_are_timed(checkpoint, monkeypatch, tmp_path):
    def load(*_):
        raise RuntimeError("no compiler\nand more")

    here = lambda recipe: [torch_fx if recipe.peer else torch_eager]  # noqa: E731
    monkeypatch.setattr(torch_fx, "load", load)
    monkeypatch.setattr(quantization, "engines_for", here)
    flags = ["--recipes", "int8-fx", "fp32", "--checkpoint", checkpoint, "--output", tmp_path]
    words = ["lab.bench", "engines", *flags, "--latency-runs", 2]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    outcome = forked(bench.main, tmp_path)
    says = "int8-fx@torch-fx: failed, RuntimeError: no compiler"
    assert outcome.code == 1 and outcome.err.endswith(says + "\n")
    assert "Traceback" in outcome.err  # nobody foresaw it, so somebody has to find it
    (path,) = tmp_path.glob("engines-*.json")
    found = json.loads(path.read_text())
    assert found["faults"] == [says] and list(found["latency_ms"]) == ["fp32@torch-eager"]


def test_latency_is_of_counted_calls_that_take_turns(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def call(name, ms):
        def act():
            clock[0] += 9.0 if order.count(name) < 2 else ms / 1000
            order.append(name)

        return act

    stats = latency({"a": call("a", 4), "b": call("b", 2)}, n=5, warmup=2)
    assert order == ["a", "b"] * 7
    assert [stats[name]["median"] for name in "ab"] == pytest.approx([4, 2])
    assert stats["a"]["p90"] == pytest.approx(4) and stats["a"]["runs"] == 5
