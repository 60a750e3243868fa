"""What a quantized network takes on disk."""

from torch import nn

from ptq.formats import Float16
from ptq.recipes import Recipe


def packed(state: dict, recipe: Recipe) -> dict:
    """The state dict to write: tensors that the recipe writes as float16 are float16."""
    return {
        name: value.half() if isinstance(recipe.format_of(name, value), Float16) else value
        for name, value in state.items()
    }


def estimated_size_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Size of a packed file without its header: each tensor in its format, every other parameter
    and buffer with 32 bits an element."""
    bits = 0
    for name, tensor in model.state_dict().items():
        fmt = recipe.format_of(name, tensor)
        bits += fmt.size_bits(tensor) if fmt else 32 * tensor.numel()
    return -(-bits // 8)
