"""A recipe with exceptions: some tensors in 16 bits or in float, all others as they were."""

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from mobilevit import AttentionCore
from ptq.kinds import kinds_of
from ptq.pipeline import layer_specs
from ptq.recipe import LayerSpec, Recipe, by_names

WIDE = 16  # bits


def with_exceptions(
    model: nn.Module,
    recipe: Recipe,
    tensors: Iterable[tuple[str, str]],
    name: str,
    bits: int | None = WIDE,
) -> Recipe:
    """Return the recipe, called `name`, with `bits` bits for the `tensors`; None makes them floats.

    A tensor is the name of a layer and its role, as in ptq.analysis.profile. An attention core has
    one format for all of its tensors, so it is an exception as a whole. A layer that computes in
    integers becomes one in float. ValueError where `can_except` says no.
    """
    specs, roles = layer_specs(model, recipe), {}
    for layer, role in tensors:
        roles.setdefault(layer, set()).add(role)
    exceptions = by_names(
        {
            layer: excepted(model.get_submodule(layer), specs[layer], of_layer, bits)
            for layer, of_layer in roles.items()
        }
    )
    title = f"{recipe.title}, but for {len(roles)} layers"
    changed = replace(recipe, name=name, title=title, layers=(*exceptions, *recipe.layers))
    used = {changed.layer_spec(n, kinds_of(module)) for n, module in model.named_modules()}
    return replace(changed, layers=tuple(spec for spec in changed.layers if spec in used))


def can_except(module: nn.Module, spec: LayerSpec) -> bool:
    """Say whether a recipe can leave a layer in float; GELU that computes in integers can't."""
    return spec.kind in FLOAT_KINDS or bool(kinds_of(module) & FLOAT_KINDS)


FLOAT_KINDS = {"product", "pointwise"}


def excepted(module: nn.Module, spec: LayerSpec, roles: set[str], bits: int | None) -> LayerSpec:
    """Return the spec of a layer whose tensors of these roles are exceptions."""
    if not can_except(module, spec):
        raise ValueError(f"a {type(module).__name__} of kind {spec.kind} can be no exception")
    if spec.kind not in FLOAT_KINDS:
        kind = "product" if isinstance(module, AttentionCore) else "pointwise"
        return LayerSpec(spec.pattern, kind=kind)
    wider = {
        name: None if bits is None else replace(getattr(spec, name), bits=bits)
        for name in ("weight", "input", "attention")
        if getattr(spec, name) is not None and (name in roles or isinstance(module, AttentionCore))
    }
    return replace(spec, **wider)
