"""Running a network for real, judging it and timing it.

An engine is a module with `NAME`, `version()` and `load(model, recipe, calibration, example) ->
Loaded`, where `model` comes from `ptq.quantize`, `calibration` is a sequence of (input, labels) or
None, and `example` is an input [1, 3, S, S]. EngineMissing says why one can't run here. `predict`
and `latency` of lab.engines.measure treat all of them alike.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ptq.recipe import Recipe


class EngineMissing(Exception):
    """An engine can't run here; the message says why, or what to install."""


def require(*packages: str) -> list:
    """Import packages, the engine's own first, and return them in this order.

    EngineMissing if one is not installed or can't be imported.
    """
    try:
        return [importlib.import_module(name) for name in packages]
    except ModuleNotFoundError as error:
        raise EngineMissing(f"{error.name} is missing: pip install {' '.join(packages)}") from error
    except ImportError as error:
        raise EngineMissing(f"{packages[0]} can't be imported: {error}") from error


def require_formats(recipe: Recipe) -> None:
    """Raise EngineMissing unless ONNX can hold what a recipe gives."""
    if not recipe.exportable:
        raise EngineMissing("ONNX has no such formats")


@dataclass(frozen=True)
class Loaded:
    """A network that an engine is ready to run.

    `run`: images [b, 3, S, S] -> logits [b, K] or what else the network puts out, [b, ...].
    `size_bytes`: the file that holds its weights; `size_is_estimate`: by a formula, as no such file
    is written. `products`: how many convolutions and matrix products it computes in integers and
    how many in float, where the engine tells.
    """

    run: Callable[[Tensor], Tensor]
    size_bytes: int
    size_is_estimate: bool = False
    products: dict | None = None
