"""MobileViT with a part of it exchanged or left out, to see what that part is worth.

    >>> MV2Only("xxs", side=128)(torch.rand(1, 3, 128, 128)).shape
    torch.Size([1, 10])

Without fusion it is also in MobileViT's paper (figure 12, ImageNet); the other two are ours.
"""

from math import ceil

import torch
from torch import Tensor, nn

from mobilevit import (
    MIN_IMG_SIZE,
    MV2,
    VARIANTS,
    ConvNorm,
    MobileViT,
    MobileViTBlock,
    check_images,
    init_weights,
)

STRIDES = (8, 16, 32)  # of the maps in stages 3, 4 and 5, in pixels of the image
MAX_SIDE = 4096  # pixels

torch.fx.wrap("check_images")  # imported here, it would be traced into otherwise


class MV2Only(MobileViT):
    """MobileViT with MV2 blocks in place of its MobileViT blocks.

    Each of the latter becomes an MV2 block for each of its transformer layers and two more, for its
    3x3 convolutions. They are as wide as makes their MACs equal on images of `side` pixels.
    """

    def __init__(self, variant: str, num_classes: int = 10, side: int = 256):
        super().__init__(variant, num_classes)
        if not MIN_IMG_SIZE <= side <= MAX_SIDE:
            raise ValueError(f"side must be {MIN_IMG_SIZE} to {MAX_SIDE} pixels, got {side}")
        self.settings = {"variant": variant, "num_classes": num_classes, "side": side}
        for stage, stride in zip(self.stages[2:], STRIDES):
            block = stage[1]
            n, c = len(block.layers) + 2, block.fuse.conv.out_channels
            macs = macs_per_pixel(block, ceil(side / stride / block.patch) ** 2)
            expansion = macs / (n * c * (c + 3 * 3 + c))
            stage[1] = nn.Sequential(*(MV2(c, c, 1, expansion) for _ in range(n)))
        self.apply(init_weights)


def macs_per_pixel(block: MobileViTBlock, n_patches: int) -> int:
    """Return the multiply-accumulates of a block for each pixel of its map of `n_patches` patches.

    Every weight of a convolution or linear layer takes part in one; attention multiplies every
    token with the keys and the values of all patches.
    """
    weights = sum(p.numel() for p in block.parameters() if p.dim() > 1)
    return weights + sum(2 * n_patches * layer.attn.dim for layer in block.layers)


class TransformerOnly(nn.Module):
    """MobileViT's transformers without its convolutions: images [B, 3, H, W] -> [B, num_classes].

    Patches of 8x8 pixels of the image are embedded as in ViT. Where MobileViT halves a map, 2x2
    pixels of it are. The blocks keep their 1x1 convolutions, and fuse by another one. As in
    MobileViT there is no positional embedding: what lies where is only told within the patches.
    """

    def __init__(self, variant: str, num_classes: int = 10):
        super().__init__()
        whole = MobileViT(variant, num_classes)
        self.settings = {"variant": variant, "num_classes": num_classes}
        stages, c_in = [], 3
        for stage, c, patch in zip(whole.stages[2:], VARIANTS[variant].stages[2:], (8, 2, 2)):
            block = stage[1]
            block.local, block.fuse = nn.Identity(), ConvNorm(2 * c, c)
            embed = nn.Conv2d(c_in, c, patch, stride=patch, bias=False)
            stages.append(nn.Sequential(embed, nn.BatchNorm2d(c), block))
            c_in = c
        self.stages = nn.Sequential(*stages)
        self.head, self.classifier = whole.head, whole.classifier
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.stages(check_images(x)))
        return self.classifier(x.mean((2, 3)))


class Unfused(MobileViT):
    """MobileViT whose blocks give what they made of their input, without fusing that with it.

    The 3x3 convolution that fuses the two goes as well. Takes the arguments of MobileViT.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for stage in self.stages[2:]:
            stage[1].fuse = LastHalf()


class LastHalf(nn.Module):
    """[B, 2C, H, W] -> its last C channels: in place of a fusion, all but the block's input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(2, dim=1)[1]


ABLATED = {"mv2": MV2Only, "transformer": TransformerOnly, "unfused": Unfused}
