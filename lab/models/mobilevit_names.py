"""MobileViT's tensors as transformers and ml-cvnets name them, alone and under other heads.

Each function takes a state dict of that project and returns one with our names.
"""

from torch import Tensor

from lab.models.rewrites import joined_attention
from mobilevit import renamed

# Their parameter names -> ours, as rewrites applied in this order.
_FROM_TRANSFORMERS = (
    (r"^encoder\.layer\.(\d)\.layer\.", r"stages.\1."),
    (r"^encoder\.layer\.(\d)\.downsampling_layer\.", r"stages.\1.0."),
    (r"^encoder\.layer\.(\d)\.", r"stages.\1.1."),
    (r"^conv_stem\.", "stem."),
    (r"^conv_1x1_exp\.", "head."),
    (r"\.expand_1x1\.", ".expand."),
    (r"\.conv_3x3\.", ".depthwise."),
    (r"\.reduce_1x1\.", ".project."),
    (r"\.conv_kxk\.", ".local."),
    (r"\.conv_1x1\.convolution\.", ".to_tokens."),
    (r"\.conv_projection\.", ".project."),
    (r"\.fusion\.", ".fuse."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".norm."),
    (r"\.transformer\.layer\.", ".layers."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layernorm\.", ".norm."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".ffn.0."),
    (r"\.output\.dense\.", ".ffn.2."),
)
_FROM_CVNETS = (
    (r"^conv_1\.block\.", "stem."),
    *((rf"^layer_{stage}\.", f"stages.{stage - 1}.") for stage in range(1, 6)),
    (r"^conv_1x1_exp\.block\.", "head."),
    (r"^classifier\.fc\.", "classifier."),
    (r"\.block\.exp_1x1\.block\.", ".expand."),
    (r"\.block\.conv_3x3\.block\.", ".depthwise."),
    (r"\.block\.red_1x1\.block\.", ".project."),
    (r"\.local_rep\.conv_3x3\.block\.", ".local."),
    (r"\.local_rep\.conv_1x1\.block\.conv\.", ".to_tokens."),
    (r"\.global_rep\.(\d)\.pre_norm_mha\.0\.", r".layers.\1.norm1."),
    (r"\.global_rep\.(\d)\.pre_norm_mha\.1\.qkv_proj\.", r".layers.\1.attn.qkv."),
    (r"\.global_rep\.(\d)\.pre_norm_mha\.1\.out_proj\.", r".layers.\1.attn.proj."),
    (r"\.global_rep\.(\d)\.pre_norm_ffn\.0\.", r".layers.\1.norm2."),
    (r"\.global_rep\.(\d)\.pre_norm_ffn\.1\.", r".layers.\1.ffn.0."),
    (r"\.global_rep\.(\d)\.pre_norm_ffn\.4\.", r".layers.\1.ffn.2."),
    (r"\.global_rep\.\d\.", ".norm."),
    (r"\.conv_proj\.block\.", ".project."),
    (r"\.fusion\.block\.", ".fuse."),
)
_DEEPLAB_FROM_TRANSFORMERS = (
    (r"^segmentation_head\.aspp\.convs\.4\.conv_1x1\.", "pyramid.pool."),
    (r"^segmentation_head\.aspp\.convs\.", "pyramid.branches."),
    (r"^segmentation_head\.aspp\.project\.", "pyramid.project."),
    (r"^segmentation_head\.classifier\.convolution\.", "classifier."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".norm."),
)
_DEEPLAB_FROM_CVNETS = (
    (r"^seg_head\.aspp\.aspp_layer\.convs\.4\.aspp_pool\.conv_1x1\.", "pyramid.pool."),
    (r"^seg_head\.aspp\.aspp_layer\.convs\.", "pyramid.branches."),
    (r"^seg_head\.aspp\.aspp_layer\.project\.", "pyramid.project."),
    (r"^seg_head\.(classifier\.)?classifier\.block\.conv\.", "classifier."),  # v0.1 has it twice
    (r"\.block\.", "."),
)
_SSD_FROM_CVNETS = (
    (r"^extra_layers\.os_-1\.1\.block\.conv\.", "whole."),
    *((rf"^extra_layers\.os_{stride}\.", f"extra.{i}.") for i, stride in enumerate((64, 128, 256))),
    (r"^ssd_heads\.(\d)\.proj_layer\.block\.", r"projections.\1."),
    (r"^ssd_heads\.5\.loc_cls_layer\.block\.conv\.", "heads.5."),
    (r"^ssd_heads\.(\d)\.loc_cls_layer\.pw_conv\.block\.conv\.", r"heads.\1.1."),
    (r"^ssd_heads\.(\d)\.loc_cls_layer\.", r"heads.\1."),
    (r"\.dw_conv\.block\.", ".0."),
    (r"\.pw_conv\.block\.", ".1."),
)


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a classifier, without those of a segmentation head beside it."""
    body, rest = _parted(state, "mobilevit.")
    rest = {n: t for n, t in rest.items() if not n.startswith("segmentation_head.")}
    return joined_attention(renamed(body | rest, _FROM_TRANSFORMERS))


def from_cvnets(state: dict[str, Tensor]) -> dict[str, Tensor]:
    body, rest = _parted(state, "encoder.")
    return renamed(body | rest, _FROM_CVNETS)


def deeplab_from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    body, head = _parted(state, "mobilevit.")
    return _on_backbone(from_transformers(body), renamed(head, _DEEPLAB_FROM_TRANSFORMERS))


def deeplab_from_cvnets(state: dict[str, Tensor]) -> dict[str, Tensor]:
    body, head = _parted(state, "encoder.")
    return _on_backbone(from_cvnets(body), renamed(head, _DEEPLAB_FROM_CVNETS))


def ssd_from_cvnets(state: dict[str, Tensor]) -> dict[str, Tensor]:
    body, head = _parted(state, "encoder.")
    return _on_backbone(from_cvnets(body), renamed(head, _SSD_FROM_CVNETS))


def _parted(state: dict, prefix: str) -> tuple[dict, dict]:
    """Return the tensors whose names begin with `prefix`, by the rest of these, and all others."""
    inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    return inside, {n: t for n, t in state.items() if not n.startswith(prefix)}


def _on_backbone(body: dict, head: dict) -> dict:
    return {f"backbone.{name}": tensor for name, tensor in body.items()} | head
