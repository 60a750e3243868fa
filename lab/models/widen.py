"""Start a wider variant from the weights of a narrower one, as the same function.

The idea is that of Net2Net (Chen, Goodfellow and Shlens, ICLR 2016, arXiv:1511.05641): what the
narrow network cost to train need not be paid again. All variants of MobileViT are equally deep, so
each layer of the narrow one has its place in the wide one. Where Net2Net copies channels, here a
new channel gets fresh weights and the old ones do not read it yet:

    convolutions  old outputs read old inputs as before and new ones with weights of zero
    tokens        layer norm sees all channels of a token, so the new ones start at zero; the old
                  ones are centred, which no layer norm after them notices, and it then suffices
                  to scale the gains of the norms by sqrt(d / d_wide)
    attention     queries take up the changed 1 / sqrt(d/h); a head that is split gives its values
                  in shares to heads that all attend as it did, by the closest product of queries
                  and keys of their rank where they are narrower than it
    a residual    where only the narrow block adds its input (the first of XXS), new hidden
                  channels carry it, since silu(x) - silu(-x) = x

Only that rank, the epsilon of the layer norms and a second SiLU on the way of that residual keep
the two from being equal.
"""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilevit import MV2, Attention, ConvNorm, MobileViT, MobileViTBlock, TransformerLayer

# A residual is carried at this scale: smaller is closer to equal, larger survives few bits.
CARRIED = 0.5


@torch.no_grad()
def widen(narrow: MobileViT, wide: MobileViT) -> None:
    """Write the weights of `narrow` into the freshly initialised `wide`.

    `wide` then gives almost the same logits: the module's docstring names what differs. ValueError
    if a layer of `wide` is narrower, its heads are no multiple, or the classes, the patches or the
    strides differ.
    """
    if narrow.num_classes != wide.num_classes:
        raise ValueError(f"{narrow.num_classes} classes, not {wide.num_classes}")
    for setting in ("patches", "output_stride"):
        given, asked = narrow.settings.get(setting), wide.settings.get(setting)
        if given != asked:
            raise ValueError(f"{setting} {given or 'as usual'}, not {asked or 'as usual'}")
    theirs, ours = narrow.state_dict(), wide.state_dict()
    if any(n > w for name in ours for n, w in zip(theirs[name].shape, ours[name].shape)):
        raise ValueError(f"{narrow.variant} is wider than {wide.variant}")
    if any(w % n for n, w in zip(narrow.heads, wide.heads)):
        raise ValueError(f"heads {list(narrow.heads)} do not divide {list(wide.heads)}")
    _conv_norm(wide.stem, narrow.stem)
    for name, module in wide.stages.named_modules():
        source = narrow.stages.get_submodule(name)
        if isinstance(module, MV2):
            _conv_norm(module.expand, source.expand)
            _conv_norm(module.depthwise, source.depthwise)
            _conv_norm(module.project, source.project)
        elif isinstance(module, MobileViTBlock):
            _block(module, source)
        elif isinstance(module, TransformerLayer):
            _layer(module, source)
    first, source = wide.stages[0][0], narrow.stages[0][0]
    if source.residual and not first.residual:
        _carry_input(first, source, _samples(narrow.stem.norm))
    _conv_norm(wide.head, narrow.head)
    _graft(wide.classifier, narrow.classifier)


def _first(wide: Tensor, narrow: Tensor) -> None:
    """Overwrite the first entries of the vector `wide` by `narrow`."""
    wide[: len(narrow)] = narrow


def _graft(wide: nn.Module, narrow: nn.Module, inputs: Tensor | None = None) -> None:
    """Give the first outputs of a convolution or linear layer the weights of the narrow one.

    The inputs of the narrow one are at `inputs` of the wide one, by default the first. The weights
    of these outputs for all other inputs become zero.
    """
    wide.weight[: len(narrow.weight)] = 0
    _graft_reader(wide, narrow, inputs)


def _graft_reader(wide: nn.Module, narrow: nn.Module, inputs: Tensor | None = None) -> None:
    """Graft a layer that reads tokens: its weights for new channels stay as they are.

    These channels are zero, and only if they are read can training change that.
    """
    n_out, n_in = narrow.weight.shape[:2]
    wide.weight[:n_out, torch.arange(n_in) if inputs is None else inputs] = narrow.weight
    if narrow.bias is not None:
        _first(wide.bias, narrow.bias)


def _graft_writer(wide: nn.Module, narrow: nn.Module, inputs: Tensor | None = None) -> None:
    """Graft a layer that writes tokens: centred over the old channels, zero in the new ones."""
    _graft(wide, narrow, inputs)
    n_out = narrow.weight.shape[0]
    for part in (wide.weight, wide.bias):
        if part is not None:
            part[:n_out] -= part[:n_out].mean(0)
            part[n_out:] = 0


def _conv_norm(wide: ConvNorm, narrow: ConvNorm, graft=_graft, *args) -> None:
    graft(wide.conv, narrow.conv, *args)
    for part in ("weight", "bias", "running_mean", "running_var"):
        _first(getattr(wide.norm, part), getattr(narrow.norm, part))


def _carry_input(wide: MV2, narrow: MV2, inputs: Tensor) -> None:
    """Add the first inputs of `wide` to its first outputs, as the residual of `narrow` does.

    Per channel x, two new hidden channels a = silu(c x) and b = silu(-c x) have a - b = c x. The
    depthwise convolution leaves them as they are, but its SiLU follows: for small c,
    silu(a) - silu(b) = (a - b) / 2. The relative error is about (c x)^2 / 4. `inputs` are samples
    of x, [n, channels].
    """
    channels, hidden = (conv.out_channels for conv in (narrow.project.conv, narrow.expand.conv))
    channel = torch.arange(channels)
    norm = wide.project.norm
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt())[:channels, None, None]
    for i, scale in enumerate((CARRIED, -CARRIED)):
        new = hidden + i * channels + channel
        wide.expand.conv.weight[new] = 0
        wide.expand.conv.weight[new, channel] = scale
        _make_identity(wide.expand.norm, new, scale * inputs)
        wide.depthwise.conv.weight[new] = 0
        wide.depthwise.conv.weight[new, 0, 1, 1] = 1
        _make_identity(wide.depthwise.norm, new, F.silu(scale * inputs))
        wide.project.conv.weight[channel, new] = 2 / scale / gain


def _samples(norm: nn.BatchNorm2d) -> Tensor:
    """Return quantiles [255, channels] of silu(norm(x)), as if normalised values were Gaussian."""
    quantiles = torch.special.ndtri(torch.arange(1, 256) / 256)[:, None]
    return F.silu(norm.bias + norm.weight.abs() * quantiles)


def _make_identity(norm: nn.BatchNorm2d, channels: Tensor, inputs: Tensor) -> None:
    """Let `norm` pass these channels on.

    With its running statistics it does so exactly; with those of a batch, as nearly as the batch is
    like `inputs`, [n, channels].
    """
    var, mean = torch.var_mean(inputs, 0)
    norm.running_var[channels], norm.running_mean[channels] = var, mean
    norm.weight[channels], norm.bias[channels] = (var + norm.eps).sqrt(), mean


def _graft_norm(wide: nn.LayerNorm, narrow: nn.LayerNorm) -> None:
    d = len(narrow.weight)
    _first(wide.weight, narrow.weight * sqrt(d / len(wide.weight)))
    _first(wide.bias, narrow.bias)


def _block(wide: MobileViTBlock, narrow: MobileViTBlock) -> None:
    _conv_norm(wide.local, narrow.local)
    _graft_writer(wide.to_tokens, narrow.to_tokens)
    _graft_norm(wide.norm, narrow.norm)
    _conv_norm(wide.project, narrow.project, _graft_reader)
    half, wide_half = (block.fuse.conv.in_channels // 2 for block in (narrow, wide))
    first = torch.arange(half)  # of each of the two maps that are concatenated
    _conv_norm(wide.fuse, narrow.fuse, _graft, torch.cat((first, wide_half + first)))


def _layer(wide: TransformerLayer, narrow: TransformerLayer) -> None:
    _graft_norm(wide.norm1, narrow.norm1)
    _attention(wide.attn, narrow.attn)
    _graft_norm(wide.norm2, narrow.norm2)
    _graft_reader(wide.ffn[0], narrow.ffn[0])
    _graft_writer(wide.ffn[2], narrow.ffn[2])


def _attention(wide: Attention, narrow: Attention) -> None:
    old, new = narrow.dim // narrow.heads, wide.dim // wide.heads  # channels a head
    parts = wide.heads // narrow.heads  # heads that one is split into
    packed = torch.cat((narrow.qkv.weight, narrow.qkv.bias[:, None]), 1)
    packed = packed.unflatten(0, (3, narrow.heads, old))  # [3, h, d/h, d + 1]
    weight = wide.qkv.weight.unflatten(0, (3, wide.heads, new))
    bias = wide.qkv.bias.unflatten(0, (3, wide.heads, new))
    inputs = []  # where the output projection finds the old values
    for head in range(wide.heads):
        q, k, v = packed[:, head // parts]
        if new < old:
            q, k = _of_rank(new, q, k)
        v = v.tensor_split(parts)[head % parts]
        weight[1, head] = 0  # so that new queries, which stay random, meet keys of zero
        for i, rows in enumerate((q * sqrt(new / old), k, v)):
            weight[i, head, : len(rows), : narrow.dim] = rows[:, :-1]
            bias[i, head, : len(rows)] = rows[:, -1]
        inputs.append(head * new + torch.arange(len(v)))
    _graft_writer(wide.proj, narrow.proj, torch.cat(inputs))


def _of_rank(rank: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return two [rank, d] whose q^T k is the closest, in Frobenius norm, to that of `q` and `k`.

    `q` and `k` are [more, d]. It is a truncated singular value decomposition (Eckart and Young).
    """
    u, s, vh = torch.linalg.svd(q.double().T @ k.double())
    root = s[:rank].sqrt()[:, None]
    return (root * u.T[:rank]).to(q.dtype), (root * vh[:rank]).to(k.dtype)
