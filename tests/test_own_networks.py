"""Networks that the project never saw: their own layers, arguments, buffers and outputs."""

import pytest
import torch
from small import draw
from torch import nn

import ptq
from ptq.analysis.compare import noise
from ptq.graph import consumers
from ptq.recipe import LayerSpec, Recipe

FINE = ptq.Uniform(16, granularity="channel")  # all but lossless
W16 = Recipe("w16", layers=(LayerSpec(".*", FINE),))
X = draw(8, 3, 8, 8)
BATCHES = [(X, None)]


class Conditional(nn.Module):
    """Multiplies by a condition, if it is given one."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.norm.weight.data[::2] = -1
        self.norm.running_var.fill_(4)

    def forward(self, x, cond=None, *more, scale: float = 1.0, **rest):
        x = self.conv(x)
        if cond is None:
            x = self.norm(x)
        return self.head((x * scale).mean((2, 3)))


def test_an_argument_with_a_default_keeps_it_where_a_network_is_traced():
    assert consumers(Conditional())["conv"] == ["norm"]
