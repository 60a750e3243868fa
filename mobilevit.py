"""MobileViT, whole: Mehta and Rastegari, "MobileViT: Light-weight, General-purpose, and
Mobile-friendly Vision Transformer", ICLR 2022 (arXiv:2110.02178).

    >>> from mobilevit import MobileViT
    >>> MobileViT("xxs", num_classes=10)(torch.rand(1, 3, 256, 256)).shape
    torch.Size([1, 10])

The network has no positional embedding and global pooling at its end, so one set of weights takes
any image of at least 32 x 32 pixels.

Shapes in comments: B images, C channels, H x W feature map, P = p*p pixels in a patch (4 unless
asked otherwise), N patches, d transformer width, h attention heads.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_IMG_SIZE = 32  # the network halves the side five times
MAX_PATCH = 32  # side of a patch in pixels of a feature map


@dataclass(frozen=True)
class Variant:
    """One column of the paper's table 4 (appendix A). Lists run from shallow to deep."""

    stem: int  # output channels of the 3x3 stride-2 convolution
    stages: tuple[int, int, int, int, int]  # output channels of stages 1 to 5
    head: int  # output channels of the last 1x1 convolution
    dims: tuple[int, int, int]  # transformer width in stages 3, 4, 5
    layers: tuple[int, int, int]  # transformer layers in stages 3, 4, 5
    heads: tuple[int, int, int]  # attention heads in stages 3, 4, 5
    expansion: int  # hidden / input channels of an MV2 block


# The paper's table gives no head counts and its authors' code uses four heads in every block.
# Ours are those of the CIFAR-10 result that this project re-implements; parameters are the same.
VARIANTS = {
    "xxs": Variant(
        stem=16, stages=(16, 24, 48, 64, 80), head=320,
        dims=(64, 80, 96), layers=(2, 4, 3), heads=(1, 1, 1), expansion=2,
    ),
    "xs": Variant(
        stem=16, stages=(32, 48, 64, 80, 96), head=384,
        dims=(96, 120, 144), layers=(2, 4, 3), heads=(1, 2, 3), expansion=4,
    ),
    "s": Variant(
        stem=16, stages=(32, 64, 96, 128, 160), head=640,
        dims=(144, 192, 240), layers=(2, 4, 3), heads=(1, 2, 3), expansion=4,
    ),
}  # fmt: skip


# Output stride (pixels of the image to one of the last map) -> stride and dilation of the MV2
# blocks that begin stages 3, 4 and 5. A stride given up dilates the depthwise convolutions after
# it, not its own, and never those of a MobileViT block: so the authors' code has it, and the paper
# leaves it open.
STRIDES = {
    32: ((2, 1), (2, 1), (2, 1)),
    16: ((2, 1), (2, 1), (1, 1)),
    8: ((2, 1), (1, 1), (1, 2)),
}


# The functions below look at sizes, which symbolic tracing does not know yet; torch.fx keeps
# each as one node.


@torch.fx.wrap
def check_images(x: Tensor) -> Tensor:
    """Return `x` unchanged, or raise ValueError if it is not [B, 3, H >= 32, W >= 32]."""
    if torch.jit.is_tracing():  # sizes are traced tensors there, not numbers to decide on
        return x
    if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[2:]) < MIN_IMG_SIZE:
        raise ValueError(
            f"MobileViT takes images as [B, 3, H, W] with H and W of at least {MIN_IMG_SIZE}, "
            f"got {list(x.shape)}"
        )
    return x


@torch.fx.wrap
def fit_patches(x: Tensor, p: int) -> Tensor:
    """Stretch a feature map [B, C, H, W] so that H and W are multiples of the patch side p."""
    H, W = int(x.shape[-2]), int(x.shape[-1])
    fitted = (H + -H % p, W + -W % p)
    return x if fitted == (H, W) else F.interpolate(x, fitted, mode="bilinear")


@torch.fx.wrap
def unfold(x: Tensor, p: int) -> Tensor:
    """Return [B, d, H, W] as [B*P, N, d]: one sequence per pixel position within a patch.

    Attention then mixes the pixels that share a position, across all patches (paper, eq. 1).
    """
    d, H, W = x.shape[1:]
    x = x.permute(0, 2, 3, 1).reshape(-1, H // p, p, W // p, p, d)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, H * W // p**2, d)


@torch.fx.wrap
def fold(tokens: Tensor, like: Tensor, p: int) -> Tensor:
    """Return [B*P, N, d] as [B, d, H, W]: the inverse of `unfold` for a map of `like`'s H and W."""
    d, (H, W) = tokens.shape[-1], like.shape[-2:]
    x = tokens.reshape(-1, p, p, H // p, W // p, d)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, H, W, d).permute(0, 3, 1, 2)


@torch.fx.wrap
def resize_like(x: Tensor, like: Tensor) -> Tensor:
    """Undo `fit_patches`: resize `x` to the H and W of `like` where they differ."""
    size = (int(like.shape[-2]), int(like.shape[-1]))
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size, mode="bilinear")


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm and an activation."""

    def __init__(self, c_in, c_out, kernel=1, stride=1, dilation=1, groups=1, act=nn.SiLU):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, groups, bias=False)
        self.norm = nn.BatchNorm2d(c_out)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class MV2(nn.Module):
    """Inverted residual block (Sandler et al., MobileNetV2, CVPR 2018, section 3.4).

    1x1 expansion, 3x3 depthwise, linear 1x1 projection; a residual where the shapes allow it.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: float, dilation: int = 1):
        super().__init__()
        hidden = round(c_in * expansion)
        self.expand = ConvNorm(c_in, hidden)
        self.depthwise = ConvNorm(hidden, hidden, 3, stride, dilation, groups=hidden)
        self.project = ConvNorm(hidden, c_out, act=nn.Identity)
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class AttentionCore(nn.Module):
    """softmax(q k^T / sqrt(d/h)) v over [B*P, h, N, d/h]: fused in float, a module of its own so
    that quantizers can replace it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention, [B*P, N, d] -> [B*P, N, d]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.dim, self.heads = dim, heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.core = AttentionCore()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # [B*P, N, 3*d] -> three of [B*P, h, N, d/h]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.proj(self.core(q, k, v).transpose(1, 2).flatten(2))


class TransformerLayer(nn.Module):
    """Pre-norm layer on [B*P, N, d] with a feed-forward network of width 2d and SiLU."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class MobileViTBlock(nn.Module):
    """Local features by convolution, global ones by attention across patches (section 3.1)."""

    def __init__(self, channels: int, dim: int, layers: int, heads: int, patch: int = 2):
        super().__init__()
        self.patch = patch
        self.local = ConvNorm(channels, channels, kernel=3)
        self.to_tokens = nn.Conv2d(channels, dim, 1, bias=False)
        self.layers = nn.Sequential(*(TransformerLayer(dim, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.project = ConvNorm(dim, channels)
        self.fuse = ConvNorm(2 * channels, channels, kernel=3)

    def forward(self, x: Tensor) -> Tensor:
        y = fit_patches(self.to_tokens(self.local(x)), self.patch)  # [B, d, H, W]
        tokens = self.norm(self.layers(unfold(y, self.patch)))  # [B*P, N, d]
        y = self.project(resize_like(fold(tokens, y, self.patch), x))  # [B, C, H, W]
        return self.fuse(torch.cat((x, y), dim=1))


class MobileViT(nn.Module):
    """MobileViT of the given variant: images [B, 3, H, W] -> logits [B, num_classes].

    `heads` overrides the variant's attention heads in stages 3, 4 and 5, `patches` is the side of
    a patch there, in pixels of the feature map: one number for all three or three numbers.
    `output_stride` is 32, or 16 or 8 for larger maps at the end. With `num_classes` None there are
    only `features`, for networks that build on them. Raises ValueError for any other arguments, and
    for heads that do not divide the transformer width.
    """

    def __init__(
        self, variant: str, num_classes: int | None = 10, heads=None, patches=2, output_stride=32
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}: choose from {', '.join(VARIANTS)}")
        if num_classes is not None and not (isinstance(num_classes, int) and num_classes >= 1):
            raise ValueError(f"num_classes must be at least 1 and whole, got {num_classes!r}")
        if output_stride not in STRIDES:
            raise ValueError(f"output_stride must be 32, 16 or 8, got {output_stride}")
        v = VARIANTS[variant]
        self.variant, self.num_classes = variant, num_classes
        self.heads = _three("heads", v.heads if heads is None else heads)
        self.patches = _three("patches", patches)
        if not all(1 <= p <= MAX_PATCH for p in self.patches):
            raise ValueError(f"patches must be 1 to {MAX_PATCH}, got {list(self.patches)}")
        for dim, h in zip(v.dims, self.heads):
            if h < 1 or dim % h:
                raise ValueError(f"{h} heads do not divide the transformer width {dim}")
        # The arguments that build the same network, the last two only where they are not the usual.
        self.settings = {"variant": variant, "num_classes": num_classes, "heads": list(self.heads)}
        if self.patches != (2, 2, 2):
            self.settings["patches"] = list(self.patches)
        if output_stride != 32:
            self.settings["output_stride"] = output_stride

        c1, c2, *_ = v.stages
        self.stem = ConvNorm(3, v.stem, kernel=3, stride=2)
        stages = [
            nn.Sequential(MV2(v.stem, c1, 1, v.expansion)),
            nn.Sequential(
                MV2(c1, c2, 2, v.expansion),
                MV2(c2, c2, 1, v.expansion),
                MV2(c2, c2, 1, v.expansion),
            ),
        ]
        for i, (stride, dilation) in enumerate(STRIDES[output_stride]):
            c_in, c_out = v.stages[i + 1 : i + 3]
            mv2 = MV2(c_in, c_out, stride, v.expansion, dilation)
            block = MobileViTBlock(c_out, v.dims[i], v.layers[i], self.heads[i], self.patches[i])
            stages.append(nn.Sequential(mv2, block))
        self.stages = nn.Sequential(*stages)
        if num_classes is not None:
            self.head = ConvNorm(v.stages[-1], v.head)
            self.classifier = nn.Linear(v.head, num_classes)
        self.apply(init_weights)

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the maps [B, C, H / s, W / s] at the ends of stages 1 to 5.

        Their strides s are 2, 4, 8, 16 and 32, but none is above `output_stride`.
        """
        x = self.stem(check_images(x))
        return [x := stage(x) for stage in self.stages]

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.stages(self.stem(check_images(x))))
        return self.classifier(x.mean((2, 3)))


def _three(name: str, value) -> tuple[int, int, int]:
    """Return one number for each of the stages 3, 4 and 5."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    if len(values) != 3 or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{name} must be one whole number or three, got {value!r}")
    return values


def init_weights(module: nn.Module) -> None:
    """Give a convolution or linear layer fresh weights; for `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# timm's parameter names (mobilevit_xxs, _xs, _s) -> ours, as rewrites applied in this order.
_FROM_TIMM = (
    (r"\.bn\.", ".norm."),
    (r"\.conv1_1x1\.", ".expand."),
    (r"\.conv2_kxk\.", ".depthwise."),
    (r"\.conv3_1x1\.", ".project."),
    (r"\.conv_kxk\.", ".local."),
    (r"\.conv_1x1\.", ".to_tokens."),
    (r"\.conv_proj\.", ".project."),
    (r"\.conv_fusion\.", ".fuse."),
    (r"\.transformer\.", ".layers."),
    (r"\.mlp\.fc1\.", ".ffn.0."),
    (r"\.mlp\.fc2\.", ".ffn.2."),
    (r"^head\.fc\.", "classifier."),
    (r"^final_conv\.", "head."),
)


def from_timm(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a timm `mobilevit_{xxs,xs,s}` for `MobileViT.load_state_dict`.

    timm's models have four heads in every block: build ours with `heads=4` for equal outputs.
    """
    return renamed(state_dict, _FROM_TIMM)


def renamed(state_dict: dict[str, Tensor], rewrites) -> dict[str, Tensor]:
    """Return `state_dict` with `rewrites` applied to its names.

    Each is a pair (pattern, replacement) as re.sub takes it. They are applied in turn.
    """
    new = {}
    for name, tensor in state_dict.items():
        for pattern, ours in rewrites:
            name = re.sub(pattern, ours, name)
        new[name] = tensor
    return new
