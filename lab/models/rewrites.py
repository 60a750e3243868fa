"""Attention of other projects' state dicts in one layer, as ours is."""

import torch
from torch import Tensor


def joined_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the queries, keys and values of each attention as one `attn.qkv`.

    In transformers they are layers of their own, `attn.query`, `attn.key` and `attn.value`. Parts
    that do not fit each other stay, to be refused later by name.
    """
    state = dict(state)
    for name in [name for name in state if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        shapes = {state[part].shape if part in state else None for part in parts}
        if len(shapes) == 1 and shapes != {torch.Size()}:
            state[name.replace(".query.", ".qkv.")] = torch.cat([state.pop(p) for p in parts])
    return state
