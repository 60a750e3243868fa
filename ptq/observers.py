"""Observers: from the tensors seen during calibration to the range that a format should cover.

An observer sees any number of tensors with `update(x)` and keeps at most one of them and a
histogram; `range()` gives the low and high end, each [G] with one element per scale of its format.
Every range contains 0.

    >>> observer = OBSERVERS["mse"](Uniform(8, symmetric=False))
    >>> for x in batches: observer.update(x)
    >>> scale, zero_point = observer.format.grid(*observer.range())
"""

from dataclasses import replace

import torch
from torch import Tensor

from ptq.formats import Uniform

BINS = 4096  # of a histogram over [-limit, limit]: 16 and more a level at 8 bits
AT_ONCE = 2**18  # values that candidates are tried on together; they fit a core's cache
SHRINKS = 80  # candidates for each end of a range, down to a fifth of it


class MinMax:
    """The range from the smallest to the largest element."""

    def __init__(self, format: Uniform):
        self.format = format
        self.low = self.high = None

    def update(self, x: Tensor) -> None:
        """Take in one tensor; ValueError if it is empty or holds a NaN or an infinity."""
        if not x.numel():
            raise ValueError("an observer was given an empty tensor")
        rows = self.format.rows(x.detach().float())  # [G, n]
        low, high = rows.aminmax(dim=1)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise ValueError("the calibration data or what a layer makes of it is not finite")
        self.widen(low.clamp(max=0), high.clamp(min=0))
        self.accumulate(rows)

    def widen(self, low: Tensor, high: Tensor) -> None:
        """Take the ends [G] of one tensor into `low` and `high`."""
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def accumulate(self, rows: Tensor) -> None:
        """Take in the values [G, n] of one tensor, after `widen`."""

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the low and high end, each [G]; ValueError if nothing was seen."""
        if self.low is None:
            raise ValueError(
                "nothing was seen during calibration: take the layer out of the network, or out "
                "of the recipe's layers"
            )
        return self.low, self.high


class AbsMax(MinMax):
    """The range from -m to m, where m is the largest magnitude.

    The scale of a symmetric format is then m / qmax, and no value in the range takes its lowest
    code. With MinMax one may.
    """

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = super().range()
        largest = torch.maximum(-low, high)
        return -largest, largest


class EMA(MinMax):
    """The range of the first tensor, its ends moved by 1 % of the way to those of each later one.

    A baseline, from the code of Lin et al., "FQ-ViT", IJCAI 2022. Of the ten batches that it
    calibrates on, the first weighs 91 %.
    """

    sigma = 0.01

    def widen(self, low: Tensor, high: Tensor) -> None:
        self.low = low if self.low is None else self.low + self.sigma * (low - self.low)
        self.high = high if self.high is None else self.high + self.sigma * (high - self.high)


class Histogram(MinMax):
    """Counts of values in BINS even bins over [-limit, limit] for each scale, besides the ends.

    The first tensor that is not all 0 sets the limit; until then it is 0, and all values lie in
    the middle bin. When a value lies beyond the limit, it doubles and neighbouring bins merge, so
    counts of earlier tensors stay exact.
    """

    def __init__(self, format: Uniform):
        super().__init__(format)
        self.limit = self.counts = None

    def accumulate(self, rows: Tensor) -> None:
        largest = torch.maximum(-self.low, self.high)  # [G]
        if self.counts is None:
            self.limit = torch.zeros_like(largest)
            self.counts = torch.zeros(len(rows), BINS, dtype=torch.int64, device=rows.device)
        # Below the smallest normal number, quotients would lose their digits.
        first = (self.limit == 0) & (largest > torch.finfo(largest.dtype).tiny)
        self.limit = torch.where(first, largest, self.limit)
        for g in ((largest > self.limit) & (self.limit > 0)).nonzero().flatten().tolist():
            doublings = int((largest[g].log2() - self.limit[g].log2()).ceil())
            for _ in range(doublings):
                inner = self.counts[g].view(-1, 2).sum(1)
                self.counts[g] = 0
                self.counts[g, BINS // 4 : -BINS // 4] = inner
                self.limit[g] *= 2
        units = torch.where(self.limit > 0, self.limit, 1.0)
        for g, row in enumerate(rows):
            index = ((row / units[g] + 1) * (BINS / 2)).int().clamp_(0, BINS - 1)
            self.counts[g] += torch.bincount(index, minlength=BINS)

    def centres(self) -> Tensor:
        """Return the values [G, BINS] in the middle of the bins."""
        edges = torch.arange(BINS, device=self.limit.device) + 0.5
        return (edges / (BINS / 2) - 1) * self.limit[:, None]


class Percentile(Histogram):
    """The range from the (100 - `pct`)th to the `pct`th percentile, within a bin."""

    pct = 99.99

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = super().range()
        share = self.counts.cumsum(1) / self.counts.sum(1, keepdim=True)
        width = 2 * self.limit / BINS
        # The outer edge of the bin in which the percentile falls.
        first = (share <= 1 - self.pct / 100).sum(1)
        last = (share < self.pct / 100).sum(1)
        clipped_low = first * width - self.limit
        clipped_high = (last + 1) * width - self.limit
        low = torch.maximum(low, clipped_low).clamp(max=0)
        high = torch.minimum(high, clipped_high).clamp(min=0)
        return low, high


class MSE(Histogram):
    """The range with the least squared error of its levels, over a grid of shrunken ranges.

    Candidates are min-max with the ends multiplied by 1, 0.99, ... 0.2. A symmetric format has one
    end to search and, when it sees a single tensor, as with weights, is searched exactly. An affine
    one is searched through its histogram, with the lower end, which rarely matters beside a long
    upper tail, on a grid of 1, 0.84, ... 0.2.
    """

    def __init__(self, format: Uniform):
        super().__init__(format)
        self.only = None  # the rows, while there has been one tensor

    def accumulate(self, rows: Tensor) -> None:
        if self.format.symmetric and self.counts is None and self.only is None:
            self.only = rows.clone()  # what is observed may be written over
            return
        if self.only is not None:
            super().accumulate(self.only)
            self.only = None
        super().accumulate(rows)

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = super().range()
        values, weights = self.only, None
        if values is None:
            filled = self.counts.any(0)
            values, weights = self.centres()[:, filled], self.counts[:, filled]
        shrinks = torch.linspace(1, 0.2, SHRINKS + 1, device=low.device)
        if self.format.symmetric:
            pairs = shrinks[:, None].expand(-1, 2)
        else:
            pairs = torch.cartesian_prod(shrinks[::16], shrinks)
        lows, highs = (ends[:, None] * end for ends, end in zip(pairs.T, (low, high)))  # [P, G]
        at_once = max(1, AT_ONCE // values.numel())
        parts = zip(lows.split(at_once), highs.split(at_once))
        best = torch.cat([self._errors(values, *ends, weights) for ends in parts]).argmin(0)
        return lows.gather(0, best[None])[0], highs.gather(0, best[None])[0]

    def _errors(self, values, lows, highs, weights) -> Tensor:
        """Return the squared distances of values [G, n] to the nearest levels of ranges [P, G].

        Summed over a row of values, as often as `weights` say; [P, G].
        """
        grid = self.format.grid(lows.flatten(), highs.flatten())
        rows = values.repeat(len(lows), 1)
        levels = of_rows(self.format).nearest(rows, *grid)
        errors = (rows - levels).square_().view(len(lows), *values.shape)
        return (errors if weights is None else errors * weights).sum(2)


def range_of(observer: MinMax) -> tuple[Tensor, Tensor]:
    """Return an observer's range, two tensors [G]; ValueError for what is none."""
    low, high = ends = observer.range()
    if not all(isinstance(end, Tensor) and end.dim() == 1 for end in ends):
        raise ValueError(f"{type(observer).__name__} gives no two tensors [G], low and high")
    if not ((low <= high) & low.isfinite() & high.isfinite()).all():
        raise ValueError(f"{type(observer).__name__} gives ranges that do not run from low to high")
    return low, high


def of_rows(format: Uniform) -> Uniform:
    """Return the format for what `format.rows` gives, [G, n]."""
    return replace(format, granularity="channel", axis=0)


class KL(Histogram):
    """The range whose levels keep the distribution best, by Kullback-Leibler divergence.

    Szymon Migacz, "8-bit inference with TensorRT", GTC 2017. P is the distribution with what lies
    beyond the range counted in its end bins. Q is what is left of it when each level spreads its
    count evenly over its filled bins. Candidates shrink both ends of min-max alike.
    """

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = super().range()
        ends = [self._row(g, low[g], high[g]) for g in range(len(low))]
        return tuple(torch.stack(end) for end in zip(*ends))

    def _row(self, g: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        centres, counts = self.centres()[g], self.counts[g].double()
        best, chosen = torch.inf, (low, high)
        for s in torch.linspace(1, 0.2, SHRINKS + 1):
            grid = self.format.grid((low * s)[None], (high * s)[None])
            start, end = low * s, high * s
            if self.format.symmetric:  # its levels reach beyond the nearer end
                start, end = self.format.qmin * grid[0], self.format.qmax * grid[0]
            inside = ((centres >= start) & (centres <= end)).nonzero().flatten()
            if not len(inside):
                continue
            first, last = inside[0], inside[-1]
            kept = counts[first : last + 1]
            p = kept.clone()
            p[0] += counts[:first].sum()
            p[-1] += counts[last + 1 :].sum()
            codes = of_rows(self.format).encode(centres[None, first : last + 1], *grid)[0]
            levels = (codes - codes.min()).long()
            n = int(levels.max()) + 1
            mass = p.new_zeros(n).index_add_(0, levels, kept)
            filled = p.new_zeros(n).index_add_(0, levels, (kept > 0).double())
            q = torch.where(kept > 0, (mass / filled.clamp(min=1))[levels], 0.0)
            divergence = kl_divergence(p, q)
            if divergence < best:
                best, chosen = divergence, (low * s, high * s)
        return chosen


def kl_divergence(p: Tensor, q: Tensor) -> float:
    """Return sum p log(p / q) of two histograms, each scaled to 1; infinite where q is empty.

    The edge bins of p may be filled by what was clipped alone. There q counts as one value.
    """
    if q.sum() == 0:
        return torch.inf
    q = q.clone()
    for edge in (0, -1):
        if p[edge] > 0 and q[edge] == 0:
            q[edge] = 1
    p, q = p / p.sum(), q / q.sum()
    filled = p > 0
    return (p[filled] * (p[filled] / q[filled]).log()).sum().item()


OBSERVERS = {
    "minmax": MinMax,
    "absmax": AbsMax,
    "ema": EMA,
    "percentile": Percentile,
    "mse": MSE,
    "kl": KL,
}
