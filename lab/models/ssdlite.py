"""SSDLite on MobileViT, as MobileViT's paper detects objects (section 4.2.1).

    >>> from lab.models.ssdlite import SSDLite
    >>> SSDLite("xxs", num_classes=80)(torch.rand(1, 3, 320, 320)).shape
    torch.Size([1, 3232, 89])

SSD is that of Liu et al., ECCV 2016 (arXiv:1512.02325), its separable heads are those of Sandler et
al., MobileNetV2, CVPR 2018, section 6.2. All sizes are those of MobileViT's authors' code, as the
paper gives none. Anchors are (cx, cy, w, h), in fractions of the image's sides.

Shapes in comments: B images, A anchors over all maps, K classes with the background.
"""

from math import sqrt

import torch
from torch import Tensor, nn

from mobilevit import VARIANTS, ConvNorm, MobileViT

# Stride of the first map that is looked at -> scale of its anchors, as a fraction of the image. 16
# is the paper's; 8 finds what is smaller than a tenth of the image.
FIRST_SCALE = {16: 0.1, 8: 0.05}
LAST_SCALE = 1.05  # of the anchors after those of the last map
STAGES = {8: 2, 16: 3, 32: 4}  # stride -> the backbone's stage that ends with this map
EXTRA = (256, 128, 128, 64)  # channels of the maps after the backbone's; the last is one pixel
PROJECTED = {8: 256, 16: 512, 32: 256}  # channels of the backbone's maps before their heads
RATIOS = (2, 3)  # of the sides of anchors that are not square
LAST_RATIOS = (2,)


class SSDLite(nn.Module):
    """SSDLite on a MobileViT variant: images [B, 3, H, W] -> [B, A, 4 + K + 4].

    For each anchor there are the offsets of its box, the logits of the classes, background first,
    and the anchor itself, so that the outputs tell all that `lab.tasks.boxes` needs. K is
    `num_classes` + 1. `heads` are those of MobileViT. Maps of strides `first_stride` to 32 come
    from the backbone, those of 64, 128, 256 and of the whole image are made of its last. Raises
    ValueError for arguments that it does not take.
    """

    def __init__(self, variant: str, num_classes: int = 80, heads=None, first_stride: int = 16):
        super().__init__()
        if first_stride not in FIRST_SCALE:
            raise ValueError(f"first_stride must be 16 or 8, got {first_stride}")
        self.num_classes, self.first_stride = num_classes, first_stride
        self.backbone = MobileViT(variant, None, heads)
        own = {"num_classes": num_classes, "first_stride": first_stride}
        self.settings = self.backbone.settings | own
        strides = [stride for stride in STAGES if stride >= first_stride]
        self.stages = [STAGES[stride] for stride in strides]
        last = VARIANTS[variant].stages[-1]
        *halving, whole = EXTRA
        self.extra = nn.ModuleList(
            separable(c_in, ConvNorm(c_in, c_out, act=nn.ReLU), stride=2)
            for c_in, c_out in zip((last, *halving), halving)
        )
        self.whole = nn.Conv2d(halving[-1], whole, 1, bias=False)
        inputs = [VARIANTS[variant].stages[i] for i in self.stages]
        self.projections = nn.ModuleList(
            ConvNorm(c_in, PROJECTED[stride], act=nn.ReLU) for c_in, stride in zip(inputs, strides)
        )
        outputs = 4 + num_classes + 1
        channels = [*(PROJECTED[stride] for stride in strides), *halving]
        n = boxes_per_cell(RATIOS)
        self.heads = nn.ModuleList(separable(c, nn.Conv2d(c, n * outputs, 1)) for c in channels)
        self.heads.append(nn.Conv2d(whole, boxes_per_cell(LAST_RATIOS) * outputs, 1))
        for part in (self.extra, self.whole, self.projections, self.heads):
            part.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone.features(x)
        maps = [project(features[i]) for project, i in zip(self.projections, self.stages)]
        x = features[-1]
        maps += [x := halve(x) for halve in self.extra]
        maps.append(self.whole(x.mean((2, 3), keepdim=True)).relu())
        # [B, n * (4 + K), H, W] -> [B, H * W * n, 4 + K]
        found = [
            head(y).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 5 + self.num_classes))
            for head, y in zip(self.heads, maps)
        ]
        return with_anchors(torch.cat(found, dim=1), [y.shape[2:] for y in maps], self.first_stride)


def separable(channels: int, pointwise: nn.Module, stride: int = 1) -> nn.Sequential:
    """Return a depthwise 3x3 convolution with batch norm, and `pointwise` behind it."""
    depthwise = ConvNorm(channels, channels, 3, stride, groups=channels, act=nn.Identity)
    return nn.Sequential(depthwise, pointwise)


@torch.fx.wrap
def with_anchors(outputs: Tensor, sides: list[tuple[int, int]], first_stride: int) -> Tensor:
    """Return `outputs` [B, A, 4 + K] as [B, A, 4 + K + 4]: each row followed by its anchor.

    `sides` are the (height, width) of the maps, in their order.
    """
    sides = [(int(height), int(width)) for height, width in sides]
    boxes = anchors(sides, FIRST_SCALE[first_stride]).to(outputs.device)
    return torch.cat((outputs, boxes.expand(outputs.shape[0], -1, -1)), dim=2)


def boxes_per_cell(ratios: tuple[int, ...]) -> int:
    """Return how many boxes a cell has: two squares, and for each ratio a wide and a tall one."""
    return 2 + 2 * len(ratios)


def anchors(sides: list[tuple[int, int]], first_scale: float) -> Tensor:
    """Return the anchors [A, 4] of maps of `sides` (height, width): (cx, cy, w, h) within 0 and 1.

    They go map by map, row by row, cell by cell. Scales rise evenly from `first_scale` to
    LAST_SCALE. A cell has a square of its map's scale, and one of the geometric mean of that and
    the next map's. For each ratio it also has a wide and a tall box of the first square's area.
    """
    rise = (LAST_SCALE - first_scale) / len(sides)
    scales = [first_scale + i * rise for i in range(len(sides) + 1)]
    boxes = []
    for i, (height, width) in enumerate(sides):
        between = sqrt(scales[i] * scales[i + 1])
        shapes = [(scales[i], scales[i]), (between, between)]
        for ratio in LAST_RATIOS if i == len(sides) - 1 else RATIOS:
            long, short = scales[i] * sqrt(ratio), scales[i] / sqrt(ratio)
            shapes += [(long, short), (short, long)]
        y = (torch.arange(height) + 0.5) / height
        x = (torch.arange(width) + 0.5) / width
        centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)  # [height, width, 2]
        centres = centres[:, :, None].expand(-1, -1, len(shapes), -1)
        boxes.append(torch.cat((centres, torch.tensor(shapes).expand_as(centres)), 3).view(-1, 4))
    return torch.cat(boxes).clamp(0, 1)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
