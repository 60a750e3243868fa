"""What a quantized network takes on disk."""

import torch
from torch import Tensor, nn

from ptq.formats import Float16
from ptq.recipes import Recipe


def stored_state(model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """The state dict to save: tensors that the recipe writes as float16 are float16."""
    return {
        name: tensor.half() if isinstance(recipe.format_of(name, tensor), Float16) else tensor
        for name, tensor in model.state_dict().items()
    }


def save(model: nn.Module, recipe: Recipe, path) -> None:
    torch.save(stored_state(model, recipe), path)


def estimated_size_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Size of a packed file without its header: each tensor in its format, every other parameter
    and buffer with 32 bits an element."""
    bits = 0
    for name, tensor in model.state_dict().items():
        fmt = recipe.format_of(name, tensor)
        bits += fmt.size_bits(tensor) if fmt else 32 * tensor.numel()
    return -(-bits // 8)
