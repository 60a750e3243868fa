"""DeepLabv3 on MobileViT, as MobileViT's paper segments images (section 4.2.2).

    >>> from lab.models.deeplab import DeepLab
    >>> DeepLab("xxs", num_classes=21)(torch.rand(2, 3, 512, 512)).shape
    torch.Size([2, 21, 512, 512])

The head is that of Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation",
2017 (arXiv:1706.05587), section 3.3, in the sizes of MobileViT's authors. The paper gives none of
them: they are those of its authors' code.

Shapes in comments: B images, C channels, H x W the last feature map.
"""

import torch
from torch import Tensor, nn

from mobilevit import VARIANTS, ConvNorm, MobileViT, resize_like

CHANNELS = 256  # of every branch of the pyramid, and of what they become
DROPOUT = 0.1
MAX_RATE = 64  # pixels of the feature map from one of a kernel's nine values to the next

torch.fx.wrap("resize_like")  # imported here, it would be traced into otherwise


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: the map [B, C, H, W] seen at several scales and as a whole.

    It is seen by a 1x1 convolution, by three 3x3 ones with dilations `rates`, and as its mean. Each
    gives CHANNELS channels, and a 1x1 convolution makes CHANNELS of them all.
    """

    def __init__(self, c_in: int, rates: tuple[int, int, int]):
        super().__init__()
        kernels = ((1, 1), *((3, rate) for rate in rates))  # and dilations
        self.branches = nn.ModuleList(
            ConvNorm(c_in, CHANNELS, kernel, dilation=rate, act=nn.ReLU) for kernel, rate in kernels
        )
        self.pool = ConvNorm(c_in, CHANNELS, act=nn.ReLU)
        self.project = ConvNorm(5 * CHANNELS, CHANNELS, act=nn.ReLU)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        maps = [branch(x) for branch in self.branches]
        maps.append(self.pool(x.mean((2, 3), keepdim=True)).expand_as(maps[0]))
        return self.dropout(self.project(torch.cat(maps, dim=1)))


class DeepLab(nn.Module):
    """DeepLabv3 on a MobileViT variant: images [B, 3, H, W] -> logits [B, num_classes, H, W].

    `heads` and `output_stride` are those of MobileViT. `rates` are the pyramid's dilations, in
    pixels of the last map: those of the paper suit its 32 x 32 map, of images of 512 pixels, and
    mostly see padding on one of half the side. Raises ValueError for arguments that it does not
    take.
    """

    def __init__(
        self, variant: str, num_classes: int = 21, heads=None, output_stride=16, rates=(6, 12, 18)
    ):
        super().__init__()
        if len(rates) != 3 or not all(1 <= rate <= MAX_RATE for rate in rates):
            raise ValueError(f"rates must be three from 1 to {MAX_RATE}, got {list(rates)}")
        self.backbone = MobileViT(variant, None, heads, output_stride=output_stride)
        own = {"num_classes": num_classes, "output_stride": output_stride, "rates": list(rates)}
        self.settings = self.backbone.settings | own
        self.pyramid = Pyramid(VARIANTS[variant].stages[-1], rates)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(CHANNELS, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pyramid(self.backbone.features(x)[-1])
        return resize_like(self.classifier(self.dropout(y)), x)
