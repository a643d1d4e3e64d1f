"""The loops over the columns of a block as one launch each, all rows at once; what they compute is said in `cloq.quantizers.columns`.

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


@triton.jit
def _nearest(value, scale, low, high):
    """The step whose point is nearest."""
    step = tl.minimum(tl.maximum(tl.div_rn(value, scale), low), high)
    return (step + _WHOLE) - _WHOLE


@triton.jit
def _round(free, shares, scales, lows, highs, steps, errors, columns, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = row < rows
    at = column[:, None] * rows + row[None, :]
    there = (column[:, None] < columns) & here[None, :]
    tile = tl.load(free + at, mask=there, other=0.0)
    for i in range(columns):
        value = tl.sum(tl.where(column[:, None] == i, tile, 0.0), axis=0)
        mine = i * rows + row
        scale = tl.load(scales + mine, mask=here, other=1.0)
        low, high = tl.load(lows + mine, mask=here, other=0.0), tl.load(highs + mine, mask=here, other=0.0)
        step = _nearest(value, scale, low, high)
        error = value - step * scale
        tl.store(steps + mine, step, mask=here)
        tl.store(errors + mine, error, mask=here)
        share = tl.load(shares + i * columns + column, mask=(column > i) & (column < columns), other=0.0)
        tile -= share[:, None] * error[None, :]
    tl.store(free + at, tile, mask=there)


@triton.jit
def _descend(
    values, steps, gradient, gram, reciprocals, scales, lows, highs, moved, columns, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = row < rows
    there = (column[:, None] < columns) & here[None, :]
    slopes = tl.load(gradient + column[:, None] * rows + row[None, :], mask=there, other=0.0)
    for i in range(columns):
        mine = i * rows + row
        value, before = tl.load(values + mine, mask=here, other=0.0), tl.load(steps + mine, mask=here, other=0.0)
        scale = tl.load(scales + mine, mask=here, other=1.0)
        low, high = tl.load(lows + mine, mask=here, other=0.0), tl.load(highs + mine, mask=here, other=0.0)
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


def round_columns(free: Tensor, shares: Tensor, scale: Tensor, low: Tensor, high: Tensor, steps: Tensor, errors: Tensor) -> None:
    _launch(_round, free, shares, scale, low, high, steps, errors)


def descend_columns(
    values: Tensor, steps: Tensor, gradient: Tensor, gram: Tensor, reciprocals: Tensor, scale: Tensor, low: Tensor, high: Tensor
) -> Tensor:  # fmt: skip
    moved = torch.empty_like(values)
    _launch(_descend, values, steps, gradient, gram, reciprocals, scale, low, high, moved)
    return moved


def _launch(kernel, *tensors: Tensor) -> None:
    """The first tensor is `(columns, rows)`."""
    columns, rows = tensors[0].shape
    width = max(16, triton.next_power_of_2(columns))
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device, wherever the tensors are
        kernel[(triton.cdiv(rows, ROWS),)](*tensors, columns, rows, COLUMNS=width, ROWS=ROWS, num_warps=WARPS, enable_fp_fusion=True)
