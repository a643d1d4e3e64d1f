"""The loops over the columns of a block, and over the ranges that a group may have, as one launch each, all rows at once; what they
compute is said in `cloq.quantizers.columns`.

A program has a few rows of the layer and all columns of the block: it holds what is still to change in registers, takes one column after
the other, and subtracts what that column does from the rest. Columns are whole rows of the transposed tensors: every access is contiguous.

Rounding to the nearest step, halves to even, is the addition of a number so large that nothing behind the point is left; values are
clamped before, which is the same for whole bounds. Division is IEEE's, not the fast one, as torch's is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
"""Rows of a layer that a program has: with 128 columns, 32 registers of each of its 128 threads."""

WARPS = 4

_WHOLE = tl.constexpr(12582912.0)  # 1.5 · 2^23: float32 around it has steps of 1
_SMALLEST, _LARGEST = tl.constexpr(2.0**-24), tl.constexpr(65504.0)  # float16 above 0


@triton.jit
def _nearest(value, scale, low, high):
    """The step whose point is nearest."""
    step = tl.minimum(tl.maximum(tl.div_rn(value, scale), low), high)
    return (step + _WHOLE) - _WHOLE


@triton.jit
def _grid_of(column, groups, rows, SHARED: tl.constexpr):
    """Where the grid of a column begins: all columns have the first one, or each the one of its group."""
    return 0 if SHARED else tl.load(groups + column) * rows


@triton.jit
def _round(
    free, shares, scales, lows, highs, groups, steps, errors, columns, rows,
    SHARED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = row < rows
    at = column[:, None] * rows + row[None, :]
    there = (column[:, None] < columns) & here[None, :]
    tile = tl.load(free + at, mask=there, other=0.0)
    for i in range(columns):
        value = tl.sum(tl.where(column[:, None] == i, tile, 0.0), axis=0)
        mine, points = i * rows + row, _grid_of(i, groups, rows, SHARED) + row
        scale = tl.load(scales + points, mask=here, other=1.0)
        low, high = tl.load(lows + points, mask=here, other=0.0), tl.load(highs + points, mask=here, other=0.0)
        step = _nearest(value, scale, low, high)
        error = value - step * scale
        tl.store(steps + mine, step, mask=here)
        tl.store(errors + mine, error, mask=here)
        share = tl.load(shares + i * columns + column, mask=(column > i) & (column < columns), other=0.0)
        tile -= share[:, None] * error[None, :]
    tl.store(free + at, tile, mask=there)


@triton.jit
def _descend(
    values, steps, gradient, gram, reciprocals, scales, lows, highs, groups, moved, columns, rows,
    SHARED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = row < rows
    there = (column[:, None] < columns) & here[None, :]
    slopes = tl.load(gradient + column[:, None] * rows + row[None, :], mask=there, other=0.0)
    for i in range(columns):
        mine, points = i * rows + row, _grid_of(i, groups, rows, SHARED) + row
        value, before = tl.load(values + mine, mask=here, other=0.0), tl.load(steps + mine, mask=here, other=0.0)
        scale = tl.load(scales + points, mask=here, other=1.0)
        low, high = tl.load(lows + points, mask=here, other=0.0), tl.load(highs + points, mask=here, other=0.0)
        reciprocal = tl.load(reciprocals + i)
        slope = tl.sum(tl.where(column[:, None] == i, slopes, 0.0), axis=0)
        step = tl.where(reciprocal > 0, _nearest(value + reciprocal * slope, scale, low, high), before)
        best = tl.where(reciprocal > 0, step * scale, value)
        move = best - value
        tl.store(values + mine, best, mask=here)
        tl.store(steps + mine, step, mask=here)
        tl.store(moved + mine, move, mask=here)
        share = tl.load(gram + i * columns + column, mask=(column > i) & (column < columns), other=0.0)
        slopes -= share[:, None] * move[None, :]


@triton.jit
def _storable(scale):
    """Rounded to float16, never to 0 or Inf; 1 for zero."""
    stored = tl.minimum(tl.maximum(tl.abs(scale), _SMALLEST), _LARGEST).to(tl.float16).to(tl.float32)
    return tl.where(scale == 0.0, 1.0, tl.where(scale < 0.0, -stored, stored))


@triton.jit
def _not_underflowed(scale, low, high):
    return tl.where((scale == 0.0) & (high > low), _SMALLEST, scale)


@triton.jit
def _steps(tile, scale, zero, levels):
    return _nearest(tile, scale[None, :], -zero[None, :], levels - zero[None, :])


@triton.jit
def _error(tile, weights, scale, zero, levels):
    """Squared rounding error of each row, weighted."""
    off = tile - _steps(tile, scale, zero, levels) * scale[None, :]
    return tl.sum(weights[:, None] * off * off, axis=0)


@triton.jit
def _fit(
    values, importance, shrinks, scales, zeros, levels, tries, columns, rows,
    SEARCH: tl.constexpr, SYMMETRIC: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = row < rows
    tile = tl.load(values + column[:, None] * rows + row[None, :], mask=(column[:, None] < columns) & here[None, :], other=0.0)
    weights = tl.load(importance + column, mask=column < columns, other=0.0)
    low, high = tl.minimum(tl.min(tile, axis=0), 0.0), tl.maximum(tl.max(tile, axis=0), 0.0)
    half = (levels + 1) * 0.5
    if SYMMETRIC:
        one = _not_underflowed(tl.maximum(tl.div_rn(-low, half), tl.div_rn(high, half - 1)), low, high)
        other = -_not_underflowed(tl.maximum(tl.div_rn(high, half), tl.div_rn(-low, half - 1)), low, high)
        below = half + tl.zeros([ROWS], tl.float32)
        above = below
    else:
        one = _not_underflowed(tl.div_rn(high - low, levels), low, high)
        other = one
        below = tl.minimum(tl.maximum(tl.floor(tl.div_rn(-low, _storable(one))), 0.0), levels - 1)
        above = below + 1
    if SEARCH:
        least = tl.full([ROWS], float("inf"), tl.float32)
        scale, zero = tl.full([ROWS], 1.0, tl.float32), tl.full([ROWS], 0.0, tl.float32)
        for i in range(2 * tries):  # of equal ones the first is kept, which has the widest range
            shrink, first = tl.load(shrinks + i // 2), i % 2 == 0
            tried, at = _storable(shrink * tl.where(first, one, other)), tl.where(first, below, above)
            error = _error(tile, weights, tried, at, levels)
            better = error < least
            least = tl.where(better, error, least)
            scale, zero = tl.where(better, tried, scale), tl.where(better, at, zero)
        steps = _steps(tile, scale, zero, levels)
        squares, products = tl.sum(weights[:, None] * steps * steps, axis=0), tl.sum(weights[:, None] * steps * tile, axis=0)
        fitted = _storable(tl.where(squares > 0.0, tl.div_rn(products, squares), scale))
        scale = tl.where(_error(tile, weights, fitted, zero, levels) < least, fitted, scale)
    elif SYMMETRIC:
        scale, zero = _storable(tl.where(one <= -other, one, other)), below
    else:
        scale = _storable(one)
        zero = _nearest(-low, scale, 0.0, levels)
    tl.store(scales + row, scale, mask=here)
    tl.store(zeros + row, zero, mask=here)


Grids = tuple[Tensor, Tensor, Tensor]
"""Scales, lowest and highest steps, each `(groups, out)`."""


def round_columns(free: Tensor, shares: Tensor, grids: Grids, groups: Tensor | None, steps: Tensor, errors: Tensor) -> None:
    _launch(_round, free, shares, *grids, _or_any(groups, free), steps, errors, SHARED=groups is None)


def descend_columns(
    values: Tensor, steps: Tensor, gradient: Tensor, gram: Tensor, reciprocals: Tensor, grids: Grids, groups: Tensor | None
) -> Tensor:  # fmt: skip
    moved = torch.empty_like(values)
    _launch(_descend, values, steps, gradient, gram, reciprocals, *grids, _or_any(groups, values), moved, SHARED=groups is None)
    return moved


def _or_any(wanted: Tensor | None, other: Tensor) -> Tensor:
    """A tensor where a kernel wants one that it does not read."""
    return other if wanted is None else wanted


def fit_grid(values: Tensor, importance: Tensor, shrinks: Tensor | None, levels: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """shrinks: of the search, `None` for none."""
    scale, zero = torch.empty_like(values[0]), torch.empty_like(values[0])
    tries = 0 if shrinks is None else len(shrinks)
    ranges = _or_any(shrinks, importance)
    _launch(_fit, values, importance, ranges, scale, zero, float(levels), tries, SEARCH=tries > 0, SYMMETRIC=symmetric)
    return scale, zero


def _launch(kernel, *arguments: Tensor | float, **constants: bool) -> None:
    """The first argument is a tensor `(columns, rows)`, whose sides are the last ones of the kernel."""
    columns, rows = arguments[0].shape
    sizes = {"COLUMNS": max(16, triton.next_power_of_2(columns)), "ROWS": ROWS}
    with torch.cuda.device_of(arguments[0]):  # Triton launches on the current device, wherever the tensors are
        kernel[(triton.cdiv(rows, ROWS),)](*arguments, columns, rows, **sizes, **constants, num_warps=WARPS, enable_fp_fusion=True)
