"""Times of a row, and exported files that are compared with what was simulated."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import draw, small_network
from torch import nn

import ptq
import quantize
from lab import outputs
from lab.engines import Loaded, parity
from lab.engines.products import quantized_products
from lab.subject import load_subject
from mobilevit import AttentionCore
from ptq import RECIPES


def test_a_row_is_timed_beside_fp32_at_the_side_that_it_was_trained_at(checkpoint, monkeypatch):
    subject = load_subject(checkpoint, None, img_size=64, n_images=5)
    sides, called = [], []

    def run(x):
        sides.append(x.shape[-1])
        return torch.zeros(len(x), 10)

    def timed(runs, n):
        for name, act in runs.items():
            sides.clear()
            act()
            called.append((name, *sides))
        return {name: {"median": name} for name in runs}

    monkeypatch.setattr(quantize, "latency", timed)
    network = copy.deepcopy(subject.model)
    made = {"network": network, "batches": None, "calibration": {"n": 0}, "seconds": 0.0}
    watched = subject.model.register_forward_pre_hook(lambda _, x: sides.append(x[0].shape[-1]))
    engine = SimpleNamespace(NAME="stub", load=lambda *_: Loaded(run, 1), version=lambda: "1")
    found = quantize.measure(subject, RECIPES["fp32"], engine, made, 3)
    watched.remove()
    assert called == [("row", 64), ("fp32", 32)]
    assert (found["latency_ms"]["median"], found["fp32_latency_ms"]["median"]) == ("row", "fp32")


@pytest.mark.parametrize("same, agree", [(9, True), (8, False)])
def test_an_export_that_an_engine_computes_otherwise_is_told(
    same, agree, checkpoint, monkeypatch, tmp_path, capsys
):
    def write(network, sample, path, about):
        noted.update(about)
        Path(path).touch()

    subject, noted = load_subject(checkpoint, None), {}
    found = [parity.Parity("a", passes=1, images=10, same=n) for n in (10, same)]
    monkeypatch.setattr("ptq.export.to_onnx", write)
    monkeypatch.setattr(outputs, "PARITY_IMAGES", 2)
    monkeypatch.setattr(outputs.parity, "check", lambda *_: found)
    recipe = RECIPES["w4-nearest"]
    made = ptq.quantize(subject.network, recipe)
    assert outputs.export_files(subject, recipe, made, tmp_path / "a", 1) is agree
    assert ("does not predict what was simulated" in capsys.readouterr().err) is not agree
    assert json.loads(noted["classes"]) == subject.checkpoint["classes"]


def test_outputs_of_pixels_are_as_expected_if_they_have_little_noise():
    expected = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    computed = expected.clone()
    computed[1] += 0.5
    computed[2] = expected[3]
    computed[3, 0, 0, 0] = torch.nan
    assert parity.as_expected(computed, expected).tolist() == [True, True, False, False]


def test_of_several_passes_the_worst_counts(monkeypatch):
    signs = iter([1, -1, 1])

    def settings(path):
        def load():
            sign = next(signs)  # of a pass
            return lambda xs: [sign * x for x in xs]

        yield "2 streams", True, load

    monkeypatch.setattr(parity, "_onnx_runtime", settings)
    monkeypatch.setattr(parity, "_openvino", lambda path: iter(()))
    found = parity.check("a", [torch.eye(4)], torch.arange(4), batch=2, passes=3, few=4)
    assert [(r.batch, r.passes, r.images, r.same) for r in found] == [(1, 3, 4, 0), (2, 3, 4, 0)]


def test_products_of_two_quantized_factors_are_counted():
    network = small_network()
    cores = sum(isinstance(m, AttentionCore) for m in network.modules())
    linear = sum(isinstance(m, nn.Linear) for m in network.modules())
    convolutions = sum(isinstance(m, nn.Conv2d) for m in network.modules())
    images = [(draw(4, 3, 32, 32), None)]
    for name, wanted in {
        "w8a8": {"Conv": convolutions, "MatMul": linear + 2 * cores},
        "uniform8": {"Conv": convolutions, "MatMul": linear},
        "w4-nearest": {},
    }.items():
        made = ptq.quantize(network, ptq.recipe(name, network), images)
        assert quantized_products(made) == wanted
