"""Networks small enough for every engine and method to be tried on."""

import torch
from torch import nn

from mobilevit import MV2, ConvNorm, MobileViTBlock


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Small(nn.Module):
    """Every kind of layer of MobileViT, few of each."""

    def __init__(self):
        super().__init__()
        self.stem = ConvNorm(3, 8, kernel=3, stride=2)
        self.body = nn.Sequential(
            MV2(8, 8, 1, 2), MV2(8, 12, 2, 2), MobileViTBlock(12, 16, layers=1, heads=2)
        )
        self.classifier = nn.Linear(12, 10)

    def forward(self, x):
        return self.classifier(self.body(self.stem(x)).mean((2, 3)))


def small_network() -> Small:
    """With batch norms as after training: statistics, factors of either sign, a dead channel."""
    torch.manual_seed(0)
    model = Small()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data, module.weight.data):
                tensor.normal_(0, 0.5, generator=generator)
            module.weight.data += 1
            module.running_var.uniform_(0.5, 2, generator=generator)
    model.stem.norm.weight.data[3] = 0
    return model.eval()


class Idle(nn.Module):
    """With a layer that never runs."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def require_traced_and_exported(model, example, x, expected):
    """Require that torch.fx's and torch.export's forms of a model, the latter made with `example`
    and for any batch, give `expected` for `x`."""
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x), expected)
