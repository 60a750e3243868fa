"""Statistics of one tensor and its quantized copy, by running sums: memory does not grow."""

import math

import numpy as np
import torch
from torch import Tensor

from ptq.formats import Log2, PowerOfTwo, Uniform
from ptq.observers import BINS, Histogram

SHOWN_BINS = 64  # of a histogram in a report
SHOWN_CODES = 256  # those of wider formats are counted together
SIGMAS = 3  # from the mean: what lies further off is an outlier
ZERO_SIGNAL = 1e-30  # stands for the energy of a signal that is 0, so that its QSNR is a number
HALF_STEP = 0.501  # a step's half, and what floats lose


class Error:
    """Sums over tensors `x` and their quantized copies `y`.

    They are taken channel by channel along an axis or, where that is None, of all together.
    """

    def __init__(self):
        self.n, self.signal, self.copy, self.error = 0, 0.0, 0.0, 0.0

    def add(self, x: Tensor, y: Tensor, axis: int | None) -> None:
        """Take in a tensor and its copy; ValueError where one of them is not finite."""
        x, y = (t[None] if axis is None else t.movedim(axis, 0) for t in (x, y))
        x, y = x.flatten(1), y.flatten(1)  # [C, n]
        # In 64 bits: a variance is a small difference of sums where the mean is far from 0.
        signal, copy, error = (t.double().square().sum(1) for t in (x, y, y - x))
        if not error.isfinite().all():
            raise ValueError("values are not finite")
        self.n += x.numel()
        self.signal, self.copy = self.signal + signal, self.copy + copy
        self.error = self.error + error

    def as_dict(self) -> dict:
        """Return QSNR of all and of the worst channel in dB, MSE and cosine.

        QSNR is None where nothing errs, and the cosine where all is 0.
        """
        signal, copy, error = (float(t.sum()) for t in (self.signal, self.copy, self.error))
        channels = zip(self.signal.tolist(), self.error.tolist())
        lengths = math.sqrt(signal * copy)
        return {
            "qsnr_db": qsnr_db(signal, error),
            "worst_channel_db": min((qsnr_db(s, e) for s, e in channels if s and e), default=None),
            "mse": error / self.n,
            "cosine": (signal + copy - error) / (2 * lengths) if lengths else None,
        }


def qsnr_db(signal: float, error: float) -> float | None:
    """Return 10 log10 of a signal's energy over its error's; None where there is no error."""
    return 10 * math.log10(max(signal, ZERO_SIGNAL) / error) if error else None


class TensorStats:
    """How one tensor is quantized, and sums over what was seen of it.

    `grid`: what `format.encode` and `decode` take besides the tensor: scales, zero-points, shifts.
    `axis`: of its channels, if it has any.
    """

    def __init__(self, format: Uniform | PowerOfTwo | Log2, grid: tuple, axis: int | None):
        self.format, self.grid, self.axis = format, grid, axis
        self.n_codes = format.zero + 1 if isinstance(format, Log2) else 2**format.bits
        self.first_code = format.qmin if isinstance(format, Uniform) else 0
        self.counts = torch.zeros(self.n_codes, dtype=torch.int64)
        self.local, self.cumulative = Error(), Error()
        self.float_values, self.quantized_values = Histogram(Uniform(8)), Histogram(Uniform(8))
        self.shape, self.total, self.clipped = None, 0.0, [0, 0]
        self.low, self.high = math.inf, -math.inf
        self.row_sums = None

    def add(self, x: Tensor, codes: Tensor | None = None) -> Tensor:
        """Take in float values and give their quantized copy, by `codes` if they are known."""
        if codes is None:
            codes = self.format.encode(x, *self.grid)
        y = self.format.decode(codes, *self.grid)
        self.local.add(x, y, self.axis)
        self.float_values.update(x)
        self.quantized_values.update(y)
        index = (codes - self.first_code).flatten()
        self.counts += torch.bincount(index, minlength=self.n_codes).cpu()
        self.shape, self.total = list(x.shape), self.total + float(x.double().sum())
        low, high = x.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        if not isinstance(self.format, Log2):
            off = (x - y) / self.steps(x)
            last_code = self.first_code + self.n_codes - 1
            self.clipped[0] += int(((codes == self.first_code) & (off < -HALF_STEP)).sum())
            self.clipped[1] += int(((codes == last_code) & (off > HALF_STEP)).sum())
        return y

    def add_quantized(self, x: Tensor, y: Tensor, is_softmax: bool = False) -> None:
        """Take in float values and what stands for them in the quantized network."""
        self.cumulative.add(x, y, self.axis)
        if is_softmax:
            sums = y.sum(-1).double()
            n, total, low, high = self.row_sums or (0, 0.0, math.inf, -math.inf)
            self.row_sums = (
                *(n + sums.numel(), total + float(sums.sum())),
                *(min(low, float(sums.min())), max(high, float(sums.max()))),
            )

    def scales(self) -> Tensor:
        """Return all distances of two levels, [G] or [C]."""
        scale = self.grid[0]
        return scale * 2 ** self.grid[2] if isinstance(self.format, PowerOfTwo) else scale

    def steps(self, like: Tensor) -> Tensor:
        """Return the distance of two levels for every element of `like`, to broadcast with it."""
        if isinstance(self.format, PowerOfTwo):
            return self.scales()
        return self.format.spread(self.grid[0], like)

    def as_dict(self) -> dict:
        """Return plain values; None where there is no such number."""
        n = self.local.n
        mean = self.total / n
        variance = max(float(self.local.signal.sum()) / n - mean**2, 0)
        sigma = math.sqrt(variance) if self.low < self.high else 0.0
        codes = self.counts
        if self.n_codes > SHOWN_CODES + 1:  # that of a 0 beyond the bits of a logarithmic format
            codes = codes.view(SHOWN_CODES, -1).sum(1)
        shown = displayed_range(self.low, self.high)
        return {
            "format": in_words(self.format),
            "bits": self.format.bits,
            "shape": self.shape,
            "n_values": n,
            **self._written(),
            "min": self.low,
            "max": self.high,
            "mean": mean,
            "sigma": sigma,
            "kurtosis": kurtosis(self.float_values, mean, sigma) if sigma else None,
            "codes_used": int((self.counts > 0).sum()),
            "n_codes": self.n_codes,
            "clipped_low": self.clipped[0] / n,
            "clipped_high": self.clipped[1] / n,
            "local": self.local.as_dict(),
            "cumulative": self.cumulative.as_dict() if self.cumulative.n else None,
            "mse_over_rounding": self._mse_over_rounding(),
            "outliers": outliers(self.float_values, mean, sigma),
            "outliers_quantized": outliers(self.quantized_values, mean, sigma),
            "distance_sigmas": earth_movers(self.float_values, self.quantized_values) / sigma
            if sigma
            else None,
            "row_sums": self._rows(),
            "histogram": {
                "low": shown[0],
                "high": shown[1],
                "float": displayed(self.float_values, *shown),
                "quantized": displayed(self.quantized_values, *shown),
            },
            "first_code": self.first_code,
            "codes": codes.tolist(),
        }

    def _written(self) -> dict:
        """Return the range that the format covers, and its extreme scales and zero-points."""
        if isinstance(self.format, Log2):
            return {"range": [0.0, 1.0], "scale": None, "zero_point": None, "n_scales": 0}
        scales, zero_points = self.scales(), self.grid[1]
        last_code = self.first_code + self.n_codes - 1
        low, high = ((code - zero_points) * scales for code in (self.first_code, last_code))
        return {
            "range": [float(low.min()), float(high.max())],
            "scale": [float(scales.min()), float(scales.max())],
            "zero_point": [int(zero_points.min()), int(zero_points.max())],
            "n_scales": len(scales),
        }

    def _mse_over_rounding(self) -> float | None:
        """Return the local MSE over scale**2 / 12, that of values anywhere between two levels."""
        if isinstance(self.format, Log2):
            return None
        rounding = float(self.scales().double().square().mean()) / 12
        return float(self.local.error.sum()) / self.local.n / rounding

    def _rows(self) -> dict | None:
        if self.row_sums is None:
            return None
        n, total, low, high = self.row_sums
        return {"mean": total / n, "min": low, "max": high}


def in_words(format: Uniform | PowerOfTwo | Log2) -> str:
    if isinstance(format, Log2):
        return f"log2, {format.bits} bits"
    if isinstance(format, PowerOfTwo):
        return f"uint{format.bits}, a power-of-two factor a channel"
    shared = format.granularity if format.group_size == 0 else f"{format.group_size} weights"
    return f"{'int' if format.symmetric else 'uint'}{format.bits}, a scale a {shared}"


# Of a histogram with one row of counts.


def edges(histogram: Histogram) -> np.ndarray:
    """Return the edges of its bins, [BINS + 1]."""
    limit = float(histogram.limit[0]) or 1.0  # all is 0
    return np.linspace(-limit, limit, BINS + 1)


def cumulated(histogram: Histogram) -> np.ndarray:
    """Return how many values lie below each edge, [BINS + 1]."""
    return np.concatenate([[0], histogram.counts[0].cumsum(0).cpu().numpy()])


def outliers(histogram: Histogram, mean: float, sigma: float) -> float:
    """Return the share of values further than SIGMAS sigma from the mean, within a bin."""
    far = (histogram.centres()[0] - mean).abs() > SIGMAS * sigma
    counts = histogram.counts[0]
    return float(counts[far].sum() / counts.sum()) if sigma else 0.0


def kurtosis(histogram: Histogram, mean: float, sigma: float) -> float:
    """Return the fourth moment over the squared variance, 3 for normal values; within a bin."""
    counts = histogram.counts[0].double()
    fourth = ((histogram.centres()[0].double() - mean) / sigma) ** 4
    return float((counts * fourth).sum() / counts.sum())


def earth_movers(a: Histogram, b: Histogram) -> float:
    """Return the mean distance by which values move from one distribution to the other."""
    places = np.union1d(edges(a), edges(b))
    shares = (np.interp(places, edges(h), cumulated(h)) / int(h.counts.sum()) for h in (a, b))
    first, second = shares
    return float(np.trapezoid(np.abs(first - second), places))


def displayed_range(low: float, high: float) -> tuple[float, float]:
    """Return the range that a picture of values from `low` to `high` covers, never empty."""
    return (low, high) if low < high else (low - (abs(low) or 1.0), high + (abs(high) or 1.0))


def displayed(histogram: Histogram, low: float, high: float) -> list[int]:
    """Return counts in SHOWN_BINS even bins from `low` to `high`."""
    places = np.linspace(low, high, SHOWN_BINS + 1)
    below = np.interp(places, edges(histogram), cumulated(histogram))
    below[0], below[-1] = 0, int(histogram.counts.sum())  # what rounding moved beyond the ends
    return np.diff(below.round()).astype(int).tolist()
