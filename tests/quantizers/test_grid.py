"""Scales, zero points and codes against loops over single numbers."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cloq.quantizers import Rtn, grid

FLOATS = st.floats(-65504, 65504, width=32)


def half(value: float) -> float:
    """Rounded to float16, and never to 0."""
    rounded = float(torch.tensor(value, dtype=torch.float32).half())
    return rounded if rounded else math.copysign(2.0**-24, value)


def naive_fit(values: list[float], bits: int, symmetric: bool) -> tuple[float, int]:
    low, high, levels = min(0.0, *values), max(0.0, *values), 2**bits - 1
    if low == high == 0:
        return 1.0, 2 ** (bits - 1) if symmetric else 0
    if not symmetric:
        scale = half((high - low) / levels)
        return scale, min(max(round(-low / scale), 0), levels)
    n = 2 ** (bits - 1)
    candidates = [max(-low / n, high / (n - 1)), -max(high / n, -low / (n - 1))]
    return half(min(candidates, key=abs)), n


@given(st.lists(FLOATS, min_size=1, max_size=9), st.sampled_from((2, 3, 4, 8)), st.booleans())
@example([7.707141553786494e-44], 8, False)  # the range over 255 is no float32 any more
@settings(max_examples=300, deadline=None)
def test_fit_and_encode_are_the_textbook_formulas(values, bits, symmetric):
    row = torch.tensor([values], dtype=torch.float32)
    scale, zero = grid.fit(row, bits, symmetric, search=False)
    expected_scale, expected_zero = naive_fit(row[0].tolist(), bits, symmetric)
    # float32 against Python's float64: the rounding to float16 may fall on the other side
    assert abs(float(scale)) == pytest.approx(abs(expected_scale), rel=1.1e-3, abs=2.0**-24)
    if float(scale) == expected_scale:
        assert abs(int(zero) - expected_zero) <= (1 if abs(-min(0.0, *values) / expected_scale % 1 - 0.5) < 1e-3 else 0)
    codes = grid.encode(row, scale[:, None], zero[:, None].float(), bits)
    decoded = grid.decode(codes, scale[:, None], zero[:, None].float())
    for value, found in zip(row[0].tolist(), decoded[0].tolist(), strict=True):
        points = [(code - int(zero)) * float(scale) for code in range(2**bits)]
        nearest = min(abs(value - point) for point in points)
        assert abs(value - found) <= nearest * (1 + 1e-5) + 1e-6 * abs(value)


@given(arrays.arrays("float32", (3, 8), elements=st.floats(-1, 1, width=32)), st.sampled_from((2, 3, 4, 8)), st.booleans())
@settings(max_examples=100, deadline=None)
def test_min_max_leaves_at_most_a_step(values, bits, symmetric):
    """Half a step by rounding, half more where the rounded zero point shifts the ends, plus what float16 takes from the range."""
    values = torch.from_numpy(values)
    scale, zero = (t[:, None] for t in grid.fit(values, bits, symmetric, search=False))
    error = values - grid.decode(grid.encode(values, scale, zero.float(), bits), scale, zero.float())
    slack = 2.0**bits * (2.0**-11 * scale.abs() + 2.0**-25)
    assert bool((error.abs() <= (0.5 if symmetric else 1.0) * scale.abs() + slack).all())


@given(arrays.arrays("float32", (4, 16), elements=st.floats(-1, 1, width=32)), st.sampled_from((2, 3, 4, 8)), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_search_never_does_worse_than_the_range(values, bits, symmetric):
    values = torch.from_numpy(values)
    errors = []
    for search in (False, True):
        errors.append((values - rounded(values, bits, symmetric, search)).double().square().sum(1))
    assert bool((errors[1] <= errors[0] * (1 + 1e-5) + 1e-12).all())


def rounded(values: torch.Tensor, bits: int, symmetric: bool, search: bool, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The values on the grid that fits each row."""
    scale, zero = (t[:, None] for t in grid.fit(values, bits, symmetric, search, weights))
    return grid.decode(grid.encode(values, scale, zero.float(), bits), scale, zero.float())


def naive_search(row: torch.Tensor, weights: torch.Tensor, bits: int, symmetric: bool) -> float:
    """The weighted squared error of one row's best grid, candidate after candidate, in float64."""
    low, high, levels, middle = min(0.0, float(row.min())), max(0.0, float(row.max())), 2**bits - 1, 2 ** (bits - 1)

    def error(scale, zero):
        steps = (row / scale).round().clamp(-zero, levels - zero)
        return float((weights * (row - scale * steps).square()).sum()), steps

    if symmetric:
        magnitudes = max(-low / middle, high / (middle - 1)), max(high / middle, -low / (middle - 1))
        pairs = [(magnitudes[0], middle), (-magnitudes[1], middle)]
    else:
        below = min(math.floor(-low / half((high - low) / levels)), levels - 1)
        pairs = [((high - low) / levels, below), ((high - low) / levels, below + 1)]
    tried = [(half(shrink * scale), zero) for shrink in grid.SHRINKS for scale, zero in pairs]
    scale, zero = min(tried, key=lambda one: error(*one)[0])
    least, steps = error(scale, zero)
    fitted = half(float((weights * steps * row).sum() / (weights * steps.square()).sum()))
    return min(least, error(fitted, zero)[0])


@pytest.mark.parametrize("bits, symmetric", [(2, False), (2, True), (3, False), (4, False), (4, True)])
def test_the_search_finds_what_trying_one_after_the_other_finds(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    values, weights = torch.randn(30, 32, generator=generator) + 0.3, torch.rand(32, generator=generator) + 0.1
    found = (weights * (values - rounded(values, bits, symmetric, True, weights)).square()).sum(1).double()
    expected = torch.tensor([naive_search(row, weights.double(), bits, symmetric) for row in values.double()], dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_the_search_finds_the_grid_that_values_are_on(bits, symmetric):
    """A layer that has been quantized already is left as it is."""
    codes = torch.randint(0, 2**bits, (50, 40), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1
    values = 0.25 * (codes - 2 ** (bits - 1) if symmetric else codes - 1)
    assert torch.equal(rounded(values, bits, symmetric, search=True), values)


def test_both_zero_points_and_a_fitted_scale_are_worth_more_than_narrower_ranges():
    """At 2 bits, against thirteen shares of the range with the zero point where the range has it."""
    weight = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scales = [((high - low) / 3 * (1 - 0.05 * step)).half().float() for step in range(13)]
    zero = (-3 * low / (high - low)).round()
    narrower = torch.stack([(weight - grid.decode(grid.encode(weight, s, zero, 2), s, zero)).square().sum(1) for s in scales]).amin(0).sum()
    found = (weight - rounded(weight, 2, False, True)).square().sum()
    assert float(found / narrower) < 0.985


def test_the_search_pays_at_two_bits():
    weight = torch.randn(64, 640, generator=torch.Generator().manual_seed(0))
    errors = [float((weight - Rtn(2, 64, search=search).quantize(weight).dequantize()).norm()) for search in (False, True)]
    assert errors[1] < 0.85 * errors[0]


@pytest.mark.parametrize("values, sign", [([-2.0, -1.0, 0.0, 1.0], 1), ([2.0, 1.0, 0.0, -1.0], -1)])
def test_a_symmetric_grid_uses_all_four_levels_at_two_bits(values, sign):
    row = torch.tensor([values])
    scale, zero = grid.fit(row, 2, symmetric=True, search=False)
    assert float(scale) == sign and int(zero) == 2
    codes = grid.encode(row, scale, zero.float(), 2)
    assert codes.tolist() == [[0, 1, 2, 3]]
    assert grid.decode(codes, scale, zero.float()).tolist() == [values]


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("constant", (0.75, -0.75, 2.0**-20, 1000.0))
def test_constants_are_exact_up_to_the_scale(bits, symmetric, constant):
    row = torch.full((1, 5), constant)
    scale, zero = grid.fit(row, bits, symmetric, search=False)
    decoded = grid.decode(grid.encode(row, scale, zero.float(), bits), scale, zero.float())
    steps = 2 ** (bits - 1) if symmetric else 2**bits - 1
    torch.testing.assert_close(decoded, row, rtol=2**-11, atol=steps * 2.0**-25)


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("search", (False, True))
def test_zero_is_always_on_the_grid(symmetric, search):
    """A pruned weight stays pruned."""
    generator = torch.Generator().manual_seed(0)
    for low, high in ((-1, 1), (0.5, 1), (-1, -0.5), (-0.01, 1)):
        row = torch.rand(50, 9, generator=generator) * (high - low) + low
        row[:, 4] = 0
        scale, zero = (t[:, None] for t in grid.fit(row, 3, symmetric, search))
        decoded = grid.decode(grid.encode(row, scale, zero.float(), 3), scale, zero.float())
        assert not decoded[:, 4].any()


@pytest.mark.parametrize("magnitude", (1e-45, 1e-20, 1e-7, 1e-3, 1.0, 65504.0, 1e20, 3e38))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("search", (False, True))
def test_any_magnitude_gives_a_finite_grid(magnitude, bits, symmetric, search):
    rows = magnitude * torch.tensor([[1.0, -1.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0], [-1.0, -0.2, 0.0, 0.0], [0.0] * 4])
    scale, zero = grid.fit(rows, bits, symmetric, search)
    assert bool(scale.isfinite().all()) and bool((scale != 0).all()) and torch.equal(scale, scale.half().float())
    codes = grid.encode(rows, scale[:, None], zero[:, None].float(), bits)
    assert bool(codes.isfinite().all()) and float(codes.min()) >= 0 and float(codes.max()) < 2**bits
    assert not grid.decode(codes, scale[:, None], zero[:, None].float())[3].any()


@pytest.mark.parametrize("columns, size, sizes", [(128, 64, [64, 64]), (100, 32, [32, 32, 32, 4]), (20, 64, [20]), (20, None, [20])])
def test_the_last_group_takes_what_is_left(columns, size, sizes):
    index = grid.group_index(columns, size)
    assert index.dtype == torch.int64 and torch.bincount(index).tolist() == sizes and bool((index.diff() >= 0).all())


def test_a_small_layer_keeps_its_digits():
    """Weights of 1e-4 have scales below 2^-14, float16's smallest normal number: they lose a few digits, not all."""
    weight = 1e-4 * torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    for bits, limit in ((4, 0.15), (8, 0.02)):
        error = weight - Rtn(bits, 64).quantize(weight).dequantize()
        assert float(error.norm() / weight.norm()) < limit
