"""Power-of-two factors, powers of two as codes, and the moving average, by worked examples."""

import pytest
import torch
from small import draw

from ptq.formats import Log2, PowerOfTwo, Uniform
from ptq.methods import fq_vit
from ptq.observers import OBSERVERS
from ptq.recipe import LayerSpec

EXAMPLE = torch.tensor([[0.5, -2, 7.5, -16], [-0.25, 1, -8, 15.875], [0.125, 0.5, 4, 2]])
UNSIGNED = Uniform(8, symmetric=False)


def test_power_of_two_factors_of_the_worked_example():
    format = PowerOfTwo(8)
    for observer in (fq_vit.Factors(format), fq_vit.HistogramFactors(format)):
        observer.update(EXAMPLE)
        low, high, shifts = observer.range()
        scale, zero_point = format.grid(low, high)
        assert (scale.item(), zero_point.item()) == (0.015625, 128)
        if isinstance(observer, fq_vit.Factors):
            assert shifts.tolist() == [0, 0, 2, 3]
    errors = fq_vit.errors(format, low, high, format.rows(EXAMPLE))[:, 3] / 3
    assert errors.tolist() == pytest.approx([129.65, 95.25, 42.33, 0], abs=0.01)
    shifts = torch.tensor([0, 0, 2, 3])
    codes = format.encode(EXAMPLE, scale, zero_point, shifts)
    assert codes.tolist() == [[160, 0, 248, 0], [112, 192, 0, 255], [136, 160, 192, 144]]
    assert format.decode(codes, scale, zero_point, shifts).equal(EXAMPLE)
    integers = format.integers(codes, zero_point, shifts)
    assert integers[1].tolist() == [-16, 64, -512, 1016]
    assert integers.sum(-1).tolist() == [-640, 552, 424]
    assert (integers * scale).equal(EXAMPLE)


def test_corrected_factors_err_no_more_than_published_ones():
    x = [draw(64, 16, seed=i) * 2.0 ** torch.arange(-4, 4).repeat(2) + 3 * (i == 1) for i in (0, 1)]
    format, losses = PowerOfTwo(8), []
    for kind in (fq_vit.Factors, fq_vit.HistogramFactors):
        observer = kind(format)
        for tensor in x:
            observer.update(tensor)
        low, high, shifts = observer.range()
        grid = *format.grid(low, high), shifts
        decoded = [format.decode(format.encode(t, *grid), *grid) for t in x]
        losses.append(sum((d - t).square().sum().item() for d, t in zip(decoded, x)))
    assert losses[1] <= 1.001 * losses[0]


@pytest.mark.parametrize("threshold", ["sqrt2", "3/2", "4/3"])
@pytest.mark.parametrize("zero_code", [True, False])
def test_powers_of_two_as_codes(threshold, zero_code):
    format = Log2(4, threshold, zero_code)
    x = torch.linspace(0, 1, 100001, dtype=torch.float64)
    codes = format.encode(x)
    assert codes.unique().tolist() == list(range(16 if zero_code else 17))
    powers = torch.cat((2.0 ** -torch.arange(format.zero), torch.zeros(1)))
    assert format.decode(codes).equal(powers[codes])
    assert format.encode(powers).equal(torch.arange(format.zero + 1, dtype=torch.int32))
    inner = x > 2.0 ** -(format.zero - 1)
    value = format.decode(codes)[inner].double()
    ratio = value / x[inner]
    if threshold == "sqrt2":  # nearest in the logarithm
        assert ratio.max() <= 2**0.5 + 1e-6 and ratio.min() >= 0.5**0.5 - 1e-6
    elif threshold == "4/3":  # nearest in the value
        other = torch.stack((value / 2, value * 2))
        assert ((value - x[inner]).abs() <= (other - x[inner]).abs() + 1e-12).all()
    else:
        assert ratio.max() <= 3 / 2 + 1e-6 and ratio.min() >= 3 / 4 - 1e-6


def test_formats_that_are_none_are_refused():
    for make in (
        lambda: Log2(1),
        lambda: Log2(9),
        lambda: Log2(4, "2"),
        lambda: PowerOfTwo(9),
        lambda: PowerOfTwo(8, most=8),
        lambda: LayerSpec(".*", input=PowerOfTwo(8)),
        lambda: LayerSpec(".*", input=UNSIGNED, attention=Log2(4)),
    ):
        with pytest.raises(ValueError):
            make()


def test_ema_starts_with_the_first_tensor_and_hardly_moves():
    observer = OBSERVERS["ema"](UNSIGNED)
    for high in (1.0, 3.0, 3.0):
        observer.update(torch.tensor([-1.0, high]))
    low, high = observer.range()
    assert low.item() == -1
    assert high.item() == pytest.approx(1 + 2 * (1 - 0.99**2))
