"""Uniform formats and observers against torch's own fake-quantize and brute force in float64."""

import math

import numpy as np
import pytest
import torch
from small import draw

from ptq.formats import Uniform
from ptq.observers import KL, MSE, OBSERVERS, Histogram, MinMax, Percentile

FORMATS = (
    Uniform(8),
    Uniform(4, symmetric=False),
    Uniform(3, granularity="channel"),
    Uniform(8, symmetric=False, granularity="channel", axis=1),
    Uniform(4, granularity=6),
)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_values_are_the_nearest_levels(fmt):
    x = draw(6, 4, 3, 3)
    observer = MinMax(fmt)
    observer.update(x)
    scale, zero_point = fmt.grid(*observer.range())
    values = fmt.decode(fmt.encode(x, scale, zero_point), scale, zero_point)
    rows, quantized = fmt.rows(x).double().numpy(), fmt.rows(values).double().numpy()
    codes = np.arange(fmt.qmin, fmt.qmax + 1)
    assert len(codes) == 2**fmt.bits
    for g in range(len(rows)):
        levels = (codes - int(zero_point[g])) * float(scale[g])
        assert 0 in levels
        nearest = np.abs(rows[g][:, None] - levels).min(1)
        np.testing.assert_allclose(np.abs(rows[g] - quantized[g]), nearest, atol=1e-6)


def test_tensor_and_channel_formats_agree_with_torch():
    x = draw(6, 4, 5)
    scale, zero_point = torch.tensor([0.013]), torch.tensor([131], dtype=torch.int32)
    fmt = Uniform(8, symmetric=False)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)
    torch.testing.assert_close(
        fmt.decode(fmt.encode(x, scale, zero_point), scale, zero_point), expected
    )
    fmt = Uniform(4, granularity="channel", axis=1)
    scale, zero_point = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.zeros(4, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 1, -8, 7)
    torch.testing.assert_close(
        fmt.decode(fmt.encode(x, scale, zero_point), scale, zero_point), expected
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_range_contains_zero_and_constants_survive(symmetric):
    fmt = Uniform(8, symmetric, "channel")
    x = torch.tensor([[3.0, 5.0], [-4.0, -2.0], [0.0, 0.0], [1e-42, 0.0]])
    observer = MinMax(fmt)
    observer.update(x)
    low, high = observer.range()
    assert (low <= 0).all() and (high >= 0).all()
    scale, zero_point = fmt.grid(low, high)
    values = fmt.decode(fmt.encode(x, scale, zero_point), scale, zero_point)
    torch.testing.assert_close(values, x, atol=0.02, rtol=0)


def test_nonsense_formats_are_refused():
    for bad in ({"bits": 1}, {"bits": 17}, {"bits": 4, "granularity": "row"}):
        with pytest.raises(ValueError):
            Uniform(**bad)
    with pytest.raises(ValueError, match="groups of 5 do not divide 24"):
        Uniform(4, granularity=5).rows(draw(8, 24))


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(name, bad):
    observer = OBSERVERS[name](Uniform(8))
    with pytest.raises(ValueError, match="not finite"):
        observer.update(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="nothing was seen"):
        OBSERVERS[name](Uniform(8)).range()
    with pytest.raises(ValueError, match="empty"):
        observer.update(torch.empty(0))


@pytest.mark.parametrize("first, size", [(0.0, 1), (1e-42, 1), (0.0, 1e-3), (1e-37, 100)])
def test_a_range_may_begin_with_next_to_nothing(first, size):
    observer = Histogram(Uniform(8, False))
    for x in (torch.tensor([first]), size * draw(50)):
        observer.update(x)
    largest = size * draw(50).abs().max()
    assert observer.counts.sum() == 51 and largest <= observer.limit <= 2 * largest


@pytest.mark.parametrize("granularity, axis", [("tensor", 0), ("channel", 1)])
def test_histograms_accumulate_exactly_while_the_range_grows(granularity, axis):
    batches = [draw(4, 3, 50, seed=i) * 3.0**i for i in range(4)]
    fmt = Uniform(8, False, granularity, axis)
    observer = Histogram(fmt)
    for x in batches:
        observer.update(x)
    rows = fmt.rows(torch.cat(batches))
    assert observer.counts.sum(1).tolist() == [rows.shape[1]] * len(rows)
    for row, centres, counts, limit in zip(
        rows, observer.centres(), observer.counts, observer.limit
    ):
        assert limit >= row.abs().max()
        edges = np.linspace(-float(limit), float(limit), len(counts) + 1)
        expected, _ = np.histogram(row.double().numpy(), edges)
        # A value on an edge may fall to either side.
        assert np.abs(np.cumsum(expected) - counts.cumsum(0).numpy()).max() <= 1
        assert centres[0] == pytest.approx((edges[0] + edges[1]) / 2)


def test_percentile_of_all_batches():
    batches = [draw(100_000, seed=i) for i in range(3)]
    observer = Percentile(Uniform(8, symmetric=False))
    for x in batches:
        observer.update(x)
    low, high = (float(end) for end in observer.range())
    expected = np.percentile(torch.cat(batches).numpy(), [0.01, 99.99])
    width = float(2 * observer.limit / observer.counts.shape[1])
    assert [low, high] == pytest.approx(list(expected), abs=width)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mse_is_the_optimum_of_its_grid_per_channel(bits):
    fmt = Uniform(bits, granularity="channel")
    weight = draw(5, 40) ** 3
    observer = MSE(fmt)
    observer.update(weight)
    scale, _ = fmt.grid(*observer.range())
    for row, chosen in zip(weight.double().numpy(), scale.double().numpy()):
        full = max(-row.min() / 2 ** (bits - 1), row.max() / (2 ** (bits - 1) - 1))
        grid = np.append(full * (1 - np.arange(81) / 100), chosen)[:, None]
        codes = np.clip(np.round(row / grid), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        errors = ((row - codes * grid) ** 2).sum(1)
        assert errors[-1] <= errors[:-1].min() * 1.0001


def test_mse_through_a_histogram_is_close_to_the_exact_one():
    fmt, x = Uniform(4), draw(50_000) ** 3
    exact, binned = MSE(fmt), MSE(fmt)
    exact.update(x)
    for part in x.chunk(5):
        binned.update(part)
    assert exact.only is not None and binned.only is None
    rounded = [fmt.nearest(x, *fmt.grid(*observer.range())) for observer in (exact, binned)]
    errors = [(x - values).square().sum() for values in rounded]
    assert errors[1] <= 1.02 * errors[0]


def numpy_error(values, low, high, bits):
    """Squared error of `values` [n] on 2**bits levels of an affine grid, in float64."""
    scale = (high - low) / (2**bits - 1)
    zero_point = np.round(-low / scale)
    codes = np.clip(np.round(values / scale) + zero_point, 0, 2**bits - 1)
    return np.square(values - (codes - zero_point) * scale).sum()


@pytest.mark.parametrize("granularity, axis", [("tensor", 0), ("channel", 1)])
def test_mse_of_activations_beats_minmax_and_any_pair_of_its_grid(granularity, axis):
    fmt = Uniform(4, False, granularity, axis)
    x = torch.nn.functional.silu(3 * draw(8, 3, 20, 20))
    observer = MSE(fmt)
    observer.update(x)
    for values, low, high in zip(fmt.rows(x).double().numpy(), *observer.range()):
        found = numpy_error(values, low.item(), high.item(), 4)
        smallest, largest = min(values.min(), 0), max(values.max(), 0)
        for s in np.linspace(1, 0.2, 6):
            for t in np.linspace(1, 0.2, 81):
                assert found <= 1.02 * numpy_error(values, s * smallest, t * largest, 4)


def test_kl_clips_outliers_and_keeps_a_plain_distribution():
    fmt = Uniform(4, symmetric=False)
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    plain, outlier = KL(fmt), KL(fmt)
    plain.update(x)
    outlier.update(torch.cat((x, torch.tensor([4.0]))))
    assert float(plain.range()[1]) > 0.9
    assert float(outlier.range()[1]) < 2


def numpy_divergence(counts, centres, low, high, bits, symmetric=False):
    """Kullback-Leibler divergence of a histogram clipped to [low, high] from its levels."""
    scale = (high - low) / (2**bits - 1)
    zero_point, most = np.round(-low / scale), 2**bits - 1
    if symmetric:
        most = 2 ** (bits - 1) - 1
        scale, zero_point = max(-low / (most + 1), high / most), 0
        low, high = -(most + 1) * scale, most * scale
    inside = (centres >= low) & (centres <= high)
    kept = counts[inside].astype(float)
    levels = np.clip(np.round(centres[inside] / scale) + zero_point, -most - 1, most)
    q = np.zeros_like(kept)
    for level in set(levels):
        filled = (levels == level) & (kept > 0)
        if filled.any():
            q[filled] = kept[levels == level].sum() / filled.sum()
    p = kept.copy()
    p[0] += counts[centres < low].sum()
    p[-1] += counts[centres > high].sum()
    for edge in (0, -1):
        if p[edge] > 0 and q[edge] == 0:
            q[edge] = 1
    p, q = p / p.sum(), q / q.sum()
    return (p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()


@pytest.mark.parametrize("symmetric, sign, bits", [(False, 1, 4), (True, 1, 4), (True, -1, 3)])
def test_kl_has_the_least_divergence_of_its_grid(symmetric, sign, bits):
    x = sign * torch.nn.functional.silu(2 * draw(20_000))
    observer = KL(Uniform(bits, symmetric=symmetric))
    observer.update(x)
    values = x.double().numpy()
    limit = np.abs(values).max()
    counts, edges = np.histogram(values, 4096, (-limit, limit))
    centres = (edges[:-1] + edges[1:]) / 2
    every = [
        numpy_divergence(counts, centres, s * values.min(), s * values.max(), bits, symmetric)
        for s in np.linspace(1, 0.2, 81)
    ]
    low, high = (end.item() for end in observer.range())
    found = numpy_divergence(counts, centres, low, high, bits, symmetric)
    assert found <= 1.01 * min(every) < 0.6 * max(every)


def test_the_upper_end_by_least_squared_error_is_searched_on_a_fine_grid():
    x = draw(20_000, seed=2).abs()
    observer = MSE(Uniform(4, symmetric=False))
    observer.update(x)
    values, (low, high) = x.double().numpy(), (end.item() for end in observer.range())
    every = [numpy_error(values, 0, s * values.max(), 4) for s in np.linspace(1, 0.2, 81)]
    assert numpy_error(values, low, high, 4) <= 1.001 * min(every)


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_channel_has_the_range_that_it_has_alone(name):
    normal = draw(2, 3, 2000)
    x = torch.stack([normal[:, k].sign() * normal[:, k].abs() ** (2 * k + 1) for k in range(3)], 1)
    together = OBSERVERS[name](Uniform(4, False, "channel", 1))
    for part in x:
        together.update(part[None])
    for channel, low, high in zip(x.unbind(1), *together.range()):
        alone = OBSERVERS[name](Uniform(4, symmetric=False))
        for part in channel:
            alone.update(part)
        assert torch.stack(alone.range()).flatten().tolist() == [low, high]


@pytest.mark.parametrize("name", ["minmax", "mse"])
def test_constant_channels_are_written_exactly(name):
    weight = torch.tensor([0.3, 0.0, -0.7, 1e-41])[:, None].expand(4, 9)
    fmt = Uniform(4, granularity="channel")
    observer = OBSERVERS[name](fmt)
    observer.update(weight)
    scale, _ = fmt.grid(*observer.range())
    torch.testing.assert_close(fmt.decode(fmt.encode(weight, scale), scale), weight)


def test_an_average_range_moves_by_a_hundredth_with_each_later_batch():
    observer = OBSERVERS["ema"](Uniform(8, symmetric=False))
    low = high = None
    for i in range(4):
        x = (i + 1) * draw(50, seed=i)
        observer.update(x)
        ends = float(x.min()), float(x.max())
        low, high = ends if i == 0 else (0.99 * low + 0.01 * ends[0], 0.99 * high + 0.01 * ends[1])
    assert [float(end) for end in observer.range()] == pytest.approx([low, high])


def test_percentiles_are_the_outer_edges_of_their_bins():
    observer = OBSERVERS["percentile"](Uniform(8, symmetric=False))
    observer.update(torch.cat([torch.full((99_990,), 0.30001), torch.tensor([1.0] * 10)]))
    low, high = (float(end) for end in observer.range())
    assert low == 0 and high == pytest.approx((math.floor(0.30001 * 2048) + 1) / 2048, abs=1e-6)
