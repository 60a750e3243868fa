"""Vision transformers, whole: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021
(arXiv:2010.11929), and Touvron et al., "Training data-efficient image transformers", ICML 2021
(arXiv:2012.12877), whose DeiT without distillation is the same network with other weights.

    >>> from lab.models.vit import ViT
    >>> ViT("deit_tiny_patch16_224", num_classes=10)(torch.rand(1, 3, 224, 224)).shape
    torch.Size([1, 10])

Every token has a learned position, so a variant takes images of one size.

Shapes in comments: B images, N patches, d transformer width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lab.models.rewrites import joined_attention
from mobilevit import Attention, renamed

MLP_RATIO = 4  # hidden / input channels of the feed-forward network, in all variants
EPS = 1e-6  # of the layer norms, as in the authors' code and timm; transformers has 1e-12


@dataclass(frozen=True)
class Variant:
    """One line of the papers' tables of models (ViT: table 1, DeiT: table 1)."""

    img_size: int  # side of the images, in pixels
    patch: int  # side of a patch, in pixels
    dim: int  # transformer width
    layers: int
    heads: int


VARIANTS = {
    "vit_base_patch16_224": Variant(img_size=224, patch=16, dim=768, layers=12, heads=12),
    "vit_large_patch16_224": Variant(img_size=224, patch=16, dim=1024, layers=24, heads=16),
    "deit_tiny_patch16_224": Variant(img_size=224, patch=16, dim=192, layers=12, heads=3),
    "deit_small_patch16_224": Variant(img_size=224, patch=16, dim=384, layers=12, heads=6),
    "deit_base_patch16_224": Variant(img_size=224, patch=16, dim=768, layers=12, heads=12),
    # Ours: DeiT-Tiny for CIFAR-10 at its own size. 9 layers where that has 12, because a step then
    # takes three quarters of the time and training time is what is short; not tuned.
    "vit_cifar": Variant(img_size=32, patch=4, dim=192, layers=9, heads=3),
}


@torch.fx.wrap  # it looks at sizes, which symbolic tracing does not know yet
def check_images(x: Tensor, img_size: int) -> Tensor:
    """Return `x` unchanged, or raise ValueError if it is not [B, 3, img_size, img_size]."""
    if torch.jit.is_tracing():  # sizes are traced tensors there, not numbers to decide on
        return x
    if x.dim() != 4 or x.shape[1:] != (3, img_size, img_size):
        raise ValueError(
            f"this network takes images as [B, 3, {img_size}, {img_size}], got {list(x.shape)}"
        )
    return x


class Block(nn.Module):
    """Pre-norm layer on tokens [B, N + 1, d]: attention, then a feed-forward network with GELU."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        hidden = MLP_RATIO * dim
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.ffn = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer of the given variant: images [B, 3, S, S] -> logits [B, num_classes].

    Raises ValueError for an unknown variant and for images of another size than S.
    """

    def __init__(self, variant: str, num_classes: int = 10):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}: choose from {', '.join(VARIANTS)}")
        v = VARIANTS[variant]
        self.settings = {"variant": variant, "num_classes": num_classes}
        self.img_size = v.img_size
        n_patches = (v.img_size // v.patch) ** 2
        self.patches = nn.Conv2d(3, v.dim, v.patch, v.patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, v.dim))
        self.positions = nn.Parameter(torch.empty(1, n_patches + 1, v.dim))
        self.blocks = nn.Sequential(*(Block(v.dim, v.heads) for _ in range(v.layers)))
        self.norm = nn.LayerNorm(v.dim, eps=EPS)
        self.classifier = nn.Linear(v.dim, num_classes)
        for tensor in (self.class_token, self.positions):
            nn.init.trunc_normal_(tensor, std=0.02)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(check_images(x, self.img_size)).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        tokens = self.blocks(tokens + self.positions)  # [B, N + 1, d]
        return self.classifier(self.norm(tokens[:, 0]))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# Other projects' parameter names -> ours, as rewrites applied in this order.
_FROM_TIMM = (
    (r"^patch_embed\.proj\.", "patches."),
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "positions"),
    (r"\.mlp\.fc1\.", ".ffn.0."),
    (r"\.mlp\.fc2\.", ".ffn.2."),
    (r"^head\.", "classifier."),
)
# Of ViTForImageClassification: those in its files, then those that version 5 has in memory.
_FROM_TRANSFORMERS = (
    (r"^vit\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patches."),
    (r"^embeddings\.cls_token$", "class_token"),
    (r"^embeddings\.position_embeddings$", "positions"),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".ffn.0."),
    (r"\.output\.dense\.", ".ffn.2."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.mlp\.fc1\.", ".ffn.0."),
    (r"\.mlp\.fc2\.", ".ffn.2."),
)


def from_timm(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a timm `vit_*` or `deit_*` for `ViT.load_state_dict`."""
    return renamed(state_dict, _FROM_TIMM)


def from_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a transformers ViTForImageClassification's state dict for `ViT.load_state_dict`."""
    return joined_attention(renamed(state_dict, _FROM_TRANSFORMERS))
