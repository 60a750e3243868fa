"""Attention of other libraries, taken apart into layers that recipes can name.

torch's multi-head attention reads the weights of its layers and never calls them, and timm and
transformers multiply by a function: neither leaves a quantizer a place.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mobilevit import AttentionCore
from ptq.layers import copied

# Layers of torch that do more with their attention than call it with tokens.
OWN_WAYS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class OpenAttention(nn.Module):
    """Multi-head self-attention whose layers and products are modules: [B, N, d] -> [B, N, d].

    `projections`: {name: layer} that give q, k and v, one after the other or all in one. They, and
    `out`, the name and layer behind the products, keep their names. `pair`: whether callers expect
    attention weights as well, which are None.
    """

    def __init__(
        self,
        heads: int,
        projections: dict[str, nn.Linear],
        out: tuple[str, nn.Linear],
        pair: bool = True,
    ):
        super().__init__()
        self.heads, self.pair = heads, pair
        self.inward, self.outward = tuple(projections), out[0]
        for name, layer in (*projections.items(), out):
            self.add_module(name, layer)
        self.core = AttentionCore()

    def forward(self, x: Tensor | None = None, *others, **options):
        """Attend to the tokens `x` [B, N, d]; ValueError for those of other tensors, and for masks.

        `x` may have the name that torch or transformers give it: `query`, `hidden_states`.
        """
        if x is None:
            x = next(options[name] for name in ("query", "hidden_states") if name in options)
        tensors = [v for v in (*others, *options.values()) if isinstance(v, Tensor)]
        asked = any(tensor is not x for tensor in tensors) or options.get("is_causal")
        # When it exports, transformers passes a mask that hides nothing.
        if x.dim() != 3 or (asked and not torch.compiler.is_exporting()):
            raise ValueError(
                "attention was taken apart: it knows no masks and no other tokens, and takes "
                "tokens [B, N, d] alone"
            )
        joined = torch.cat([getattr(self, name)(x) for name in self.inward], -1)  # [B, N, 3d]
        q, k, v = joined.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = getattr(self, self.outward)(self.core(q, k, v).transpose(1, 2).flatten(2))
        return (y, None) if self.pair else y


def open_attention(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with every attention of OPENERS taken apart, and torch's GELU.

    It computes the same, in evaluation mode. An attention that does more than
    softmax(q k^T / sqrt(d)) v stays as it is. So does that of torch's encoder layer, which has a
    way around it, and of its decoder layer, which attends to other tokens as well. Only calls show
    whether a network's own code does so: then the copy raises ValueError.
    """
    model = copied(model).eval()
    opened = {}  # by the module that each takes the place of
    for name, module in list(model.named_modules(remove_duplicate=False)):
        opener = OPENERS.get(f"{type(module).__module__}.{type(module).__name__}")
        parent = model.get_submodule(name.rpartition(".")[0])
        if opener and not isinstance(parent, OWN_WAYS):
            if module not in opened:
                opened[module] = opener(module)
            if opened[module] is not None:
                model.set_submodule(name, opened[module].eval())
    return model


def _of_torch(module: nn.MultiheadAttention) -> OpenAttention | None:
    plain = module.in_proj_weight is not None and module.bias_k is None
    if not plain or not module.batch_first or module.add_zero_attn:
        return None
    qkv = nn.Linear(module.embed_dim, 3 * module.embed_dim, module.in_proj_bias is not None)
    qkv.weight = module.in_proj_weight
    if qkv.bias is not None:
        qkv.bias = module.in_proj_bias
    return OpenAttention(module.num_heads, {"qkv": qkv}, ("out_proj", module.out_proj))


def _of_timm(module: nn.Module) -> OpenAttention | None:
    extras = [getattr(module, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
    if not all(isinstance(extra, nn.Identity | None) for extra in extras):
        return None
    projections, out = {"qkv": module.qkv}, ("proj", module.proj)
    return OpenAttention(module.num_heads, projections, out, pair=False)


def _gelu(module: nn.Module) -> nn.GELU:
    return nn.GELU()


def _of_transformers(module: nn.Module) -> OpenAttention:
    projections = {name: getattr(module, name) for name in ("q_proj", "k_proj", "v_proj")}
    return OpenAttention(module.num_attention_heads, projections, ("o_proj", module.o_proj))


# {full name of a class: function that takes one apart, or gives None if it does more}. The names of
# timm 1.0.31 and transformers 5.24.
OPENERS: dict[str, Callable[[nn.Module], nn.Module | None]] = {
    "torch.nn.modules.activation.MultiheadAttention": _of_torch,
    "timm.layers.attention.Attention": _of_timm,
    "transformers.models.vit.modeling_vit.ViTAttention": _of_transformers,
    "transformers.models.deit.modeling_deit.DeiTAttention": _of_transformers,
    "transformers.activations.GELUActivation": _gelu,  # recipes know torch's alone
}
