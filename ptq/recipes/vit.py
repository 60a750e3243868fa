"""Recipes for vision transformers, by bits, the way ranges are chosen, parts and a share of them.

They find the layers of ours, timm's, torchvision's and transformers' ViT by their names.
"""

import re

import torch
from torch import nn

from ptq.formats import Uniform
from ptq.kinds import kinds_of
from ptq.pipeline import entry
from ptq.recipe import LayerSpec, Recipe, by_names
from ptq.recipes.generic import in_torch_attention
from ptq.recipes.mobilevit import CALIBRATED

# A part of a transformer -> names of its layers. The first that matches counts: in files of
# transformers, attention has an `output` of its own.
PARTS = {
    "attention": r".*\b(attn|attention|self_attention)\b.*",
    "mlp": r".*\b(mlp|ffn|intermediate|output)\b.*",
    "classifier": r"classifier|fc|head(s\.head|\.fc)?",
}
# A way to choose ranges -> granularity of weights, observer of weights and inputs.
METHODS = {
    "tensor": ("tensor", "minmax"),
    "channel": ("channel", "minmax"),
    "histogram": ("channel", "mse"),
}
PRODUCT_BITS = 8  # of q, k, v and the softmax, whatever the bits of layers


def vit_recipe(
    model: nn.Module,
    bits: int = 8,
    method: str = "channel",
    parts: tuple[str, ...] = tuple(PARTS),
    share: float = 1.0,
    seed: int = 0,
    input_bits: int | None = None,
) -> Recipe:
    """Return a recipe for the linear layers and attention products of a vision transformer.

    `bits`: of weights and, unless `input_bits` says otherwise, of the inputs of linear layers.
    `method`: of METHODS. "tensor" has one scale for a weight, from its smallest to its largest
    value, "channel" one for each output channel; "histogram" has one for each output channel, too,
    and all ranges are those of the least squared error, of inputs over a histogram of what was
    seen in calibration.
    `parts`: of PARTS. `share`: of their layers and products, drawn with `seed`; a larger share
    contains a smaller one of the same seed. The recipe names those that were drawn.

    ValueError for an unknown method or part, for none, a share that is not above 0 and at most 1,
    and a part that the network does not have.
    """
    granularity, observer = entry(METHODS, method, "method")
    if not 0 < share <= 1:
        raise ValueError(f"a share is above 0 and at most 1, not {share}")
    names = layers_of(model, parts)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    drawn = [names[i] for i in sorted(order[: max(1, round(share * len(names)))].tolist())]
    input = Uniform(input_bits or bits, symmetric=False)
    linear = LayerSpec("", Uniform(bits, granularity=granularity), input, observer, observer)
    product = LayerSpec("", None, Uniform(PRODUCT_BITS), observer, observer)
    specs = {n: linear if isinstance(model.get_submodule(n), nn.Linear) else product for n in drawn}
    title = f"{' and '.join(parts)}, share {share:g} by seed {seed}"
    return Recipe(f"vit-w{bits}a{input.bits}-{method}", title, by_names(specs), **CALIBRATED)


def layers_of(model: nn.Module, parts: tuple[str, ...]) -> list[str]:
    """Return the names of linear layers and products in these parts, as registered."""
    if not parts:
        raise ValueError(f"a recipe is for one part at least of {', '.join(PARTS)}")
    for part in parts:
        entry(PARTS, part, "part")
    part_of = {
        name: next((part for part, names in PARTS.items() if re.fullmatch(names, name)), None)
        for name, module in model.named_modules()
        if "product" in kinds_of(module) and not isinstance(module, nn.Conv2d)
        if not in_torch_attention(name, model)
    }
    for part in parts:
        if part not in part_of.values():
            hint = ": see ptq.open_attention" if part == "attention" else ""
            raise ValueError(f"no layer of the network is known as its {part}{hint}")
    return [name for name, part in part_of.items() if part in parts]
