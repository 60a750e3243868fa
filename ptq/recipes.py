"""Recipes: which tensors of a network get which format, as data.

A recipe can be printed, compared and saved beside its result (`asdict`).
"""

import re
from dataclasses import asdict, dataclass

from torch import Tensor

from ptq.formats import Float16, Format, PercentileUniform


@dataclass(frozen=True)
class Rule:
    """`format` for the floating tensors of a state dict whose name matches `pattern` in full and
    that have at least `min_ndim` dimensions."""

    pattern: str
    format: Format
    min_ndim: int = 0

    def applies(self, name: str, tensor: Tensor) -> bool:
        return (
            tensor.is_floating_point()
            and tensor.dim() >= self.min_ndim
            and re.fullmatch(self.pattern, name) is not None
        )


@dataclass(frozen=True)
class Recipe:
    """A named way to quantize. The first rule that applies to a tensor decides.

    `qconfig`: quantized by torch's FX graph mode with the default settings of this name instead.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    qconfig: str | None = None
    calibration_images: int = 0
    calibration_batch: int = 128

    def format_of(self, name: str, tensor: Tensor) -> Format | None:
        """The format of one tensor of a state dict, None if it stays as it is."""
        return next((rule.format for rule in self.rules if rule.applies(name, tensor)), None)

    @property
    def simulated(self) -> bool:
        """Whether floats stand in for the recipe's low-bit numbers when it runs."""
        return bool(self.rules)

    @property
    def storable(self) -> bool:
        """Whether a file with every tensor in its format can be written yet."""
        return all(isinstance(rule.format, Float16) for rule in self.rules)

    def asdict(self) -> dict:
        """Plain values only; formats with their class name."""
        recipe = asdict(self)
        for rule, plain in zip(self.rules, recipe["rules"]):
            plain["format"] = {"type": type(rule.format).__name__, **plain["format"]}
        return recipe | {"rules": list(recipe["rules"])}


# The four rows of the CIFAR-10 re-implementation, by its own protocol.
_PUBLISHED = (
    Recipe("fp32"),
    Recipe("fp16", rules=(Rule(".*", Float16()),)),
    Recipe("int8-fx", qconfig="x86", calibration_images=32 * 128),
    Recipe("int4-percentile", rules=(Rule(".*", PercentileUniform(), min_ndim=2),)),
)

RECIPES = {recipe.name: recipe for recipe in _PUBLISHED}
