"""The losses by which ranking-aware quantization searches an attention core, in numpy's numbers."""

import numpy as np
import pytest
import torch
from small import small_network
from test_ranking import BATCHES, PLACE, of_attention

import ptq
from ptq.graph import captured
from ptq.methods import ranking


def numpys_rest(x, y):
    """The mean over samples of 1 - correlation."""
    pairs = zip(x.flatten(1).double().numpy(), y.flatten(1).double().numpy())
    return np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in pairs])


def test_losses_of_a_core_are_correlation_and_a_tenth_of_ranking(monkeypatch):
    monkeypatch.setattr(ranking, "ROWS", 10**6)  # all of them
    network, losses = small_network(), []
    network.body[2].layers[0].attn.qkv.weight.data *= 20
    monkeypatch.setattr(ranking, "descend", lambda loss, n: losses.append(loss) or (1.0,) * n)
    made = ptq.quantize(network, of_attention(("ranking",)), BATCHES)
    *_, of_keys, of_values = losses
    rounded = made.get_submodule(PLACE).inputs
    core = network.get_submodule(PLACE)
    inputs = captured(network, core, BATCHES, "input")
    q, k, v = (torch.cat(parts).detach() for parts in zip(*inputs))

    def coded(name, x, factor=1.0):
        quantizer = rounded[name]
        return quantizer.format.nearest(x, factor * quantizer.scale, quantizer.zero_point)

    scores, made = q @ k.mT, coded("q", q) @ coded("k", k, 0.5).mT
    s, m = (x.flatten(0, -2).double().numpy() for x in (scores, made))
    i, j = np.triu_indices(s.shape[1], 1)
    hinge = np.maximum(0, 0.2 - (m[:, i] - m[:, j]) * np.sign(s[:, i] - s[:, j])).mean()
    assert of_keys((1.0, 0.5)) == pytest.approx(numpys_rest(scores, made) + 0.1 * hinge, rel=1e-3)
    softmax = (scores / 8**0.5).softmax(-1)
    made = coded("attention", softmax) @ coded("v", v, 0.5)
    assert of_values((1.0, 0.5)) == pytest.approx(numpys_rest(softmax @ v, made), rel=1e-3)
