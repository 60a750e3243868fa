"""What feeds what in a network, and what goes into and comes out of its modules."""

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ptq.layers import (
    IntegerLayer,
    QuantizedAttentionCore,
    QuantizedLayer,
    Quantizer,
    computes_as,
    owns_weight,
)

PRODUCERS = (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.BatchNorm2d, QuantizedLayer)


def norms_after(model: nn.Module, batches=None) -> dict[str, str]:
    """Return {name of a batch norm: name of the convolution that feeds it and nothing else}.

    `batches` are needed for networks that torch.fx can't trace; without them, such a network has
    no pairs. A batch norm that does more, such as one with an activation in it, is in no pair, nor
    is a convolution with a forward of its own or whose weight is computed at each call.
    """
    modules = dict(model.named_modules())
    norms = {n for n, m in modules.items() if type(m) is nn.BatchNorm2d and has_statistics(m)}
    fed = consumers(model, batches) if norms else {}
    pairs = {}
    for producer, (consumer, *others) in fed.items():
        layer = modules[producer]
        layer = layer.layer if isinstance(layer, QuantizedLayer) else layer
        convolution = computes_as(layer, nn.Conv2d) and owns_weight(layer)
        if consumer in norms and not others and convolution:
            pairs[consumer] = producer
    return pairs


def has_statistics(norm: nn.BatchNorm2d) -> bool:
    """Say whether a batch norm keeps statistics and factors, as those of torch do by default."""
    return norm.affine and norm.track_running_stats


def linears_after_norms(model: nn.Module, batches=None) -> dict[str, list[str]]:
    """Return {name of a layer norm: names of the linear layers that take in its output}.

    Norms whose output anything else takes in are left out, and so are weights that are computed at
    each call. `batches` as for `norms_after`.
    """
    modules = dict(model.named_modules())
    return {
        producer: fed
        for producer, fed in consumers(model, batches).items()
        if computes_as(modules[producer], nn.LayerNorm)
        and all(computes_as(modules.get(name), nn.Linear) for name in fed)
        and all(owns_weight(modules[name]) for name in (producer, *fed))
    }


def consumers(model: nn.Module, batches=None) -> dict[str, list[str | None]]:
    """Return {name of a layer: names of the layers that take in its output}.

    Anything else that takes it in is None, such as the network's caller, and so is a layer that
    runs more than once; such layers have no entry of their own. torch.fx traces the network or,
    where it can't, one call on the first of `batches` is watched.
    """
    try:
        graph = Tracer().trace(model)
    except Exception:  # control flow that looks at values; torch.fx has no common base for it
        return watched(model, batches) if batches is not None else {}
    calls = [node for node in graph.nodes if node.op == "call_module"]
    runs = Counter(node.target for node in calls)
    read = {n.target.rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}  # weights
    once = [node for node in calls if runs[node.target] == 1 and node.target not in read]
    return {
        node.target: [user.target if user in once else None for user in node.users]
        for node in once
        if node.users
    }


class Tracer(torch.fx.Tracer):
    """Traces a network and keeps each of our layers as one node, and what may become one."""

    def is_leaf_module(self, module, name):
        kinds = QuantizedLayer | QuantizedAttentionCore | Quantizer | IntegerLayer
        ours = isinstance(module, kinds) or any(computes_as(module, kind) for kind in PRODUCERS)
        return ours or super().is_leaf_module(module, name)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """Take a call as a caller with images makes it: what has a default keeps it.

        torch.fx alone would give such an argument a value that is never None.
        """
        _, first, *others = inspect.signature(root_fn).parameters.values()
        named = (p for p in others if p.kind is p.POSITIONAL_OR_KEYWORD)
        given = [first, *(p for p in named if p.default is p.empty)]
        proxies = [self.create_proxy("placeholder", p.name, (), {}) for p in given]
        return root_fn, [self.root, *proxies]


@torch.no_grad()
def watched(model: nn.Module, batches) -> dict[str, list[str | None]]:
    """Return `consumers` as one call of `model` shows them.

    Every operator on a layer's output counts as the layer that it runs in. Layers whose weights
    anything else reads have no entry.
    """
    users: dict[str, list[str | None]] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in users)
        if isinstance(module, PRODUCERS) and not inside:
            users[name] = []
    outputs: dict[int, tuple[str, Tensor]] = {}  # by id; kept alive, so that no id comes twice
    owners = {id(p): n for n in users for p in model.get_submodule(n).parameters()}
    runs, read = Counter(), set()

    def keep(name, args, kwargs, output):
        runs[name] += 1
        outputs[id(output)] = name, output

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            user = names[-1] if names else None
            for value in tree_leaves((args, kwargs)):
                if id(value) in outputs:
                    name = outputs[id(value)][0]
                    if user not in users[name]:
                        users[name].append(user)
                if owners.get(id(value), user) != user:
                    read.add(owners[id(value)])
            return func(*args, **(kwargs or {}))

    with running(model, users) as names, hooked(model, {n: n for n in users}, keep), Watch():
        result = model(next(iter(batches))[0])
    for value in tree_leaves(result):
        if id(value) in outputs:  # it leaves the network
            users[outputs[id(value)][0]].append(None)
    once = {name for name in users if runs[name] == 1} - read
    return {
        name: [user if user in once else None for user in fed]
        for name, fed in users.items()
        if fed and name in once
    }


@contextlib.contextmanager
def running(model: nn.Module, followed: Iterable[str] | None = None):
    """Yield a list of the modules that run, the innermost last: of `followed`, or of all."""
    names = []

    def enter(name, *_):
        names.append(name)

    def leave(*_):
        names.pop()

    with contextlib.ExitStack() as stack:
        for name in dict(model.named_modules()) if followed is None else followed:
            module = model.get_submodule(name)
            stack.enter_context(module.register_forward_pre_hook(partial(enter, name)))
            stack.enter_context(module.register_forward_hook(leave))
        yield names


@contextlib.contextmanager
def hooked(model: nn.Module, paths: dict, hook):
    """Within this context, call `hook(key, args, kwargs, output)` after the module `paths[key]`.

    What it returns, if anything, takes the place of the output.
    """

    def call(key, module, args, kwargs, output):
        return hook(key, args, kwargs, output)

    with contextlib.ExitStack() as stack:
        for key, path in paths.items():
            register = model.get_submodule(path).register_forward_hook
            stack.enter_context(register(partial(call, key), with_kwargs=True))
        yield


class Reached(Exception):
    """Ends a call of a network where no more of it is needed."""


def never_ran(name: str) -> ValueError:
    """Return the error that a layer never ran during calibration."""
    advice = "take it out of the network, or out of the recipe's layers"
    return ValueError(f"{name} never ran during calibration: {advice}")


def captured(model: nn.Module, layer: nn.Module, batches, what: str):
    """Yield what goes into `layer` or comes out of it at each of its calls, batch by batch.

    `what`: "input", a tuple of all that it is given beside its defaults, by position or by name, or
    "output". The first batch shows how often the layer runs in a call of `model`. After that, no
    more of `model` runs than it takes. ValueError if it never runs.
    """
    seen, runs = [], None
    parameters = inspect.signature(layer.forward).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}

    def keep(_, args, kwargs, output=None):
        named = (value for name, value in kwargs.items() if value is not defaults.get(name))
        value = (*args, *named) if what == "input" else output
        seen.append(tree_map_only(Tensor, Tensor.clone, value))  # what follows may write on it
        if len(seen) == runs:
            raise Reached

    register = layer.register_forward_pre_hook if what == "input" else layer.register_forward_hook
    with register(keep, with_kwargs=True):
        for x, *_ in batches:
            with contextlib.suppress(Reached):
                model(x)
            if not seen:
                raise never_ran(next(n for n, m in model.named_modules() if m is layer))
            runs = runs or len(seen)
            yield from seen
            seen = []
