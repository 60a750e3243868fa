"""From a float network and a recipe to the network with quantized values."""

import copy

from torch import nn

from ptq.recipes import Recipe


def quantize(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy of `model` whose tensors hold the values that the recipe's formats can write.

    Raises ValueError if the recipe has rules and none of them applies to any tensor.
    """
    model = copy.deepcopy(model)
    state = model.state_dict()
    formats = {name: recipe.format_of(name, tensor) for name, tensor in state.items()}
    if recipe.rules and not any(formats.values()):
        raise ValueError(f"no rule of recipe {recipe.name} applies to any tensor of the network")
    for name, fmt in formats.items():
        if fmt is not None:
            state[name].copy_(fmt.decode(*fmt.encode(state[name])))
    return model
