"""Ranking-aware quantization: ranges that keep outputs alike and attention scores in their order.

Liu et al., "Post-Training Quantization for Vision Transformer", NeurIPS 2021 (arXiv:2106.14156).
What follows the paper and what does not is said in docs/methods.md.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from ptq.graph import Reached, captured, hooked, running
from ptq.layers import QuantizedAttentionCore, QuantizedLayer, Quantizer
from ptq.methods.calibrate import calibrate
from ptq.methods.nearest import nearest
from ptq.recipe import Recipe

FACTORS = tuple(k / 20 for k in range(10, 25))  # of a scale: 0.5, 0.55, ... 1, ... 1.2
ROUNDS = 20  # over all scales of a layer, at most
THETA = 0.2  # how far apart two scores are to stay, in units of q k^T
GAMMA = 0.1  # weight of the ranking loss beside the correlation
ROWS = 128  # of attention scores that the ranking loss looks at, for each attention
CHUNK = 2**21  # pairs at a time, so that they stay in the CPU's caches


@torch.no_grad()
def search(model, reference, batches, recipe: Recipe, correlate: bool, reduction=None) -> None:
    """Give each quantized layer the codes and scales of least loss.

    The loss is mean(1 - correlation of outputs), if `correlate`, plus GAMMA * the ranking loss with
    this `reduction` over pairs, if it is not None. Scales start as their observers give them, and
    each that the loss depends on is multiplied by one of FACTORS. Layers are searched one by one,
    on what they take in in float. ValueError for a network without attention where a ranking loss
    is asked for.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    attentions = Attention.all_in(reference, layers, batches) if reduction and layers else []
    if reduction and not attentions:
        raise ValueError(
            f"recipe {recipe.name} ranks attention scores, and the network has no "
            "scaled_dot_product_attention behind a layer that is quantized"
        )
    nearest(model, reference, batches, recipe)
    calibrate(model, reference, batches, recipe)
    rank = partial(mean_ranking_loss, reduction=reduction)
    for name, layer in layers.items():
        attention = next((a for a in attentions if name in a.feeders), None)
        if correlate or attention:
            search_layer(layer, name, reference, batches, correlate, attention, rank)
    for name, core in model.named_modules():
        if isinstance(core, QuantizedAttentionCore):
            search_core(core, name, reference, batches, correlate, rank if reduction else None)


# Steps of recipes: equations 10 and 11; with ranking, 12, as a mean over pairs or, as published, as
# a sum (13); ranking alone, which leaves all scales that attention scores do not depend on.
similarity = partial(search, correlate=True)
ranking = partial(search, correlate=True, reduction="mean")
ranking_sum = partial(search, correlate=True, reduction="sum")
ranking_alone = partial(search, correlate=False, reduction="mean")


# The loss.


def dissimilarity(x: Tensor, y: Tensor) -> Tensor:
    """Return 1 - Pearson's correlation of each sample of `x` with that of `y`, [B, ...] -> [B].

    A sample without variance correlates with nothing: there it is 1.
    """
    x, y = x.flatten(1), y.flatten(1)
    x, y = (F.normalize(t - t.mean(1, keepdim=True), dim=1) for t in (x, y))
    # 1 - r as half a squared distance keeps the digits that r, close to 1, would lose. It holds for
    # vectors of length 1, and a constant has length 0.
    constants = sum((t == 0).all(1).float() for t in (x, y))
    return 0.5 * ((x - y).square().sum(1) + constants)


def ranking_loss(scores: Tensor, quantized: Tensor, theta=THETA, reduction="mean") -> Tensor:
    """Return the hinge loss of each row of scores on the order of its elements, [R, N] -> [R].

    Sum or mean over pairs i < j of max(0, theta - (q_i - q_j) sign(s_i - s_j)), eq. 13 there. It
    is not 0 for `quantized` that equals `scores`, if those are closer than theta.
    """
    n, sums = scores.shape[-1], []
    for order, apart in _pairs(scores, quantized):
        hinge = apart.mul_(order).neg_().add_(theta).clamp_(min=0)
        # Both halves of the square are alike, and its diagonal holds theta.
        sums.append((hinge.sum((1, 2)) - n * theta) / 2)
    total = torch.cat(sums)
    return total if reduction == "sum" else total / max(1, n * (n - 1) // 2)


def mean_ranking_loss(scores: Tensor, quantized: Tensor, reduction: str) -> float:
    """Estimate the ranking loss of one head's attention map from some rows [R, N] of maps."""
    n_rows = scores.shape[-1] if reduction == "sum" else 1
    return n_rows * ranking_loss(scores, quantized, reduction=reduction).mean().item()


def inverted_share(scores: Tensor, quantized: Tensor) -> float:
    """Return the share of the pairs in a row of scores [R, N] whose order `quantized` turns."""
    n = scores.shape[-1]
    inverted = sum(int((order * apart < 0).sum()) for order, apart in _pairs(scores, quantized))
    return inverted / max(1, len(scores) * n * (n - 1))


def _pairs(scores: Tensor, quantized: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield sign(s_i - s_j) and q_i - q_j for all i and j, [r, N, N], of some rows at a time."""
    rows = max(1, CHUNK // scores.shape[-1] ** 2)
    for s, q in zip(scores.split(rows), quantized.split(rows)):
        yield (s[:, :, None] - s[:, None]).sign_(), q[:, :, None] - q[:, None]


# The search.


def descend(loss: Callable[[tuple], float], n: int) -> tuple[float, ...]:
    """Find the `n` factors of least loss by changing one at a time, from 1.

    Never worse than all factors 1. `loss` is called once for each tuple of factors.
    """
    loss = cache(loss)
    best = (1.0,) * n
    for _ in range(ROUNDS):
        before = best
        for i, factor in itertools.product(range(n), FACTORS):
            trial = (*best[:i], factor, *best[i + 1 :])
            if loss(trial) < loss(best):
                best = trial
        if best == before:
            break
    return best


def search_layer(layer, name, reference, batches, correlate, attention, rank) -> None:
    """Search the scales of a layer's weight and input, those that are quantized."""
    original = reference.get_submodule(name)
    inputs = [x for (x,) in captured(reference, original, batches, "input")]
    wanted = [original(x) for x in inputs]
    if attention and len(inputs) != len(attention.inputs):
        raise ValueError(f"{name} runs more than once in an attention, which has one place for it")
    scores = attention.scores() if attention else None
    fmt, quantizer = layer.format, layer.input if isinstance(layer.input, Quantizer) else None
    n = (fmt is not None) + (quantizer is not None)

    def coded(factor: float):
        scale = layer.scale * factor
        return fmt.encode(original.weight, scale), scale

    def outputs(factors):
        weight = original.weight if fmt is None else fmt.decode(*coded(factors[0]))
        for x in inputs:
            x = x if quantizer is None else _rounded(quantizer, x, factors[-1])
            yield functional_call(original, {"weight": weight}, (x,))

    def loss(factors) -> float:
        made = list(outputs(factors))
        total = _mean(map(dissimilarity, wanted, made)) if correlate else 0.0
        if attention:
            total += GAMMA * rank(scores, attention.scores(name, made))
        return total

    factors = descend(loss, n)
    if fmt is not None:
        layer.set_weight(*coded(factors[0]))
    if quantizer is not None:
        quantizer.scale = quantizer.scale * factors[-1]


def search_core(core, name, reference, batches, correlate, rank) -> None:
    """Search the scales of q and k by the scores, then those of the softmax and v by the output."""
    inputs = list(captured(reference, reference.get_submodule(name), batches, "input"))
    drawn = [_drawn(q, ROWS // len(inputs)) for q, _, _ in inputs]
    quantizers = core.inputs

    def keys_loss(factors) -> float:
        pairs = [
            tuple(_rounded(quantizers[n], x, f) for n, x, f in zip("qk", batch, factors))
            for batch in inputs
        ]
        total = 0.0
        if correlate:
            distances = (
                dissimilarity(q @ k.mT, a @ b.mT) for (q, k, _), (a, b) in zip(inputs, pairs)
            )
            total = _mean(distances)
        if rank:
            exact, rounded = (
                torch.cat([_rows(q, k, rows) for (q, k, *_), rows in zip(all_, drawn)])
                for all_ in (inputs, pairs)
            )
            total += GAMMA * rank(exact, rounded)
        return total

    def values_loss(factors) -> float:
        def distance(q, k, v):
            attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            rounded = _rounded(quantizers["attention"], attention, factors[0])
            return dissimilarity(attention @ v, rounded @ _rounded(quantizers["v"], v, factors[1]))

        return _mean(distance(*batch) for batch in inputs)

    searched = [(("q", "k"), keys_loss)] if correlate or rank else []
    searched += [(("attention", "v"), values_loss)] if correlate else []
    for names, loss in searched:
        for quantizer, factor in zip(names, descend(loss, 2)):
            quantizers[quantizer].scale = quantizers[quantizer].scale * factor


def _rounded(quantizer: Quantizer, x: Tensor, factor: float) -> Tensor:
    return quantizer.format.nearest(x, quantizer.scale * factor, quantizer.zero_point)


def _mean(losses) -> float:
    return torch.cat(list(losses)).mean().item()


# What attention scores depend on.


class _AtAttention(TorchFunctionMode):
    """Calls `found(q, k)` wherever attention is computed."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key"), args)) | kwargs
            q, k = given["query"], given["key"]
            if q.shape[:-2] != k.shape[:-2]:
                raise ValueError("scores are ranked where each head of q has one of k")
            self.found(q, k)
        return func(*args, **kwargs)


class Attention:
    """One attention of a float network, inside `unit`, and the layers that its scores depend on.

    `feeders`: their names. `unit` is the innermost module around the attention that holds
    quantized layers: query, key and value come from its layers and from nowhere else.
    """

    def __init__(self, reference: nn.Module, unit: str, layers, batches):
        self.reference, self.unit = reference, reference.get_submodule(unit)
        self.inputs = list(captured(reference, self.unit, batches, "input"))
        self.drawn = [_drawn(self._reach(x)[0], ROWS // len(self.inputs)) for x in self.inputs]
        inside = [name for name in layers if _inside(name, unit)]
        self.feeders = [name for name in inside if self._depends_on(name)]

    @staticmethod
    def all_in(reference: nn.Module, layers, batches) -> list["Attention"]:
        """Return every attention whose scores depend on a layer that `layers` names."""
        places = []
        with running(reference) as names, _AtAttention(lambda *_: places.append(names[-1])):
            reference(next(iter(batches))[0][:1])
        units = dict.fromkeys(_unit(place, layers) for place in places)
        found = [Attention(reference, unit, layers, batches) for unit in units]
        return [attention for attention in found if attention.feeders]

    def scores(self, name: str | None = None, outputs=None) -> Tensor:
        """Return some rows [R, N] of q k^T, before it is scaled.

        With `outputs`, one a batch, in the place of what the layer of this name puts out.
        """
        calls = zip(self.inputs, outputs or itertools.repeat(None))
        pairs = (self._reach(x, name, lambda _, y=y: y) for x, y in calls)
        return torch.cat([_rows(*pair, rows) for pair, rows in zip(pairs, self.drawn)])

    def _reach(self, inputs, name=None, change=None) -> tuple[Tensor, Tensor]:
        """Return q and k of one batch, with what layer `name`, if any, puts out `change`d."""
        reached = []

        def found(q, k):
            reached.append((q, k))
            raise Reached

        paths = {name: name} if name else {}
        changed = hooked(self.reference, paths, lambda *call: change(call[-1]))
        with contextlib.suppress(Reached), changed, _AtAttention(found):
            self.unit(*inputs)
        return reached[0]

    def _depends_on(self, name: str) -> bool:
        """Say whether q or k change when the layer of this name puts out zeros."""
        zeros = self._reach(self.inputs[0], name, torch.zeros_like)
        exact = self._reach(self.inputs[0])
        return not all(map(torch.equal, zeros, exact))


def _inside(name: str, unit: str) -> bool:
    return not unit or name.startswith(f"{unit}.")


def _unit(place: str, layers) -> str:
    """Return the innermost module around `place` that holds one of `layers`."""
    while not any(_inside(name, place) for name in layers):
        place = place.rpartition(".")[0]
    return place


def _drawn(q: Tensor, n: int) -> Tensor:
    """Draw up to `n` rows, at least one, of the score matrices of q [..., N, d]: their numbers."""
    total = q[..., 0].numel()
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(total, generator=generator)[: max(1, n)].to(q.device)


def _rows(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Compute these rows [R, M] of q k^T, for q [..., N, d] and k [..., M, d]."""
    of_rows = q.flatten(0, -2)[rows]  # [R, d]
    keys = k.flatten(0, -3)[rows // q.shape[-2]]  # [R, M, d]
    return (keys @ of_rows[:, :, None])[:, :, 0]
