"""Group-wise integer grids: which scale and zero point a group gets, and how a value becomes a code.

Scales are rounded to float16 before any value is coded, because that is what the file holds: codes chosen for an unrounded
scale would be fitted to a grid that no reader sees. Ranges always contain 0, so a dead or pruned weight is represented
exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cloq.errors import ModelError

SMALLEST_SCALE = 2.0**-24
"""The smallest float16 above 0. Scales below 2^-14 keep fewer digits, but codes are chosen for the rounded scale."""

SHRINKS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the range that the search tries."""

LARGEST_WEIGHT = 65504.0
"""The largest float16: weights up to it have a scale that the file can hold, on every grid."""


def finite(weight: Tensor, limit: float = torch.finfo(torch.float32).max) -> Tensor:
    """The weight in float32, detached. Raises `ModelError` for NaN, Inf or a magnitude above `limit`."""
    weight = weight.detach().float()
    peak = float(weight.abs().max()) if weight.numel() else 0.0
    if not peak <= limit:  # also where peak is NaN
        allowed = f"magnitudes up to {limit:g} (float16 scales hold no more)" if limit <= LARGEST_WEIGHT else "finite values"
        raise ModelError(f"a weight {tuple(weight.shape)} holds {peak:g}; only {allowed} can be quantized. Skip this layer")
    return weight


def group_index(columns: int, group_size: int | None, device: torch.device | None = None) -> Tensor:
    """Group of each of `columns` inputs, `(in,)` int64. `None` is one group; the last may be shorter than the others."""
    positions = torch.arange(columns, device=device)
    return torch.zeros_like(positions) if group_size is None else positions // group_size


def fit(values: Tensor, bits: int, symmetric: bool, search: bool, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point for each row of `values (rows, n)`: `(rows,)` float32 representable in float16, and `(rows,)` uint8.

    asymmetric: min-max, the range widened to contain 0.
    symmetric: zero point `2**(bits-1)`; all `2**bits` levels are used, and the side with the larger magnitude gets the extra
        level by the sign of the scale. (At 2 bits the levels are −2…1; dropping one costs points.)
    search: of shrunken ranges, each with the zero points on either side of where the range has its zero (symmetric: with either sign),
        keep per row the grid with the least squared rounding error, the n values weighted by `importance (n,)` if that is given; then
        fit the scale to the codes by least squares, and keep it where it helps.

    Any float32 values give a finite grid: scales beyond float16 are cut to its limits, and codes to the grid's ends.
    """
    low, high = values.amin(1).clamp_max(0), values.amax(1).clamp_min(0)
    if not search:
        scale, zero = _of_range(low, high, bits, symmetric)
        return scale, zero.to(torch.uint8)
    importance = torch.ones_like(values[0]) if importance is None else importance
    scales, zeros = _candidates(low, high, bits, symmetric)
    errors = _rounding_errors(values, scales, zeros, bits, importance)
    best = errors.argmin(0, keepdim=True)  # the first of equal ones: the widest range
    scale, zero, error = (found.gather(0, best)[0] for found in (scales, zeros, errors))
    fitted = _least_squares_scale(values, grid(scale, zero, bits), importance)
    now = _rounding_errors(values, fitted[None], zero[None], bits, importance)[0]
    return torch.where(now < error, fitted, scale), zero.to(torch.uint8)


def _of_range(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The grid of the whole range."""
    if symmetric:
        as_is, swapped = _symmetric_scales(low, high, bits)
        return _storable(torch.where(as_is <= swapped, as_is, -swapped)), torch.full_like(low, 2 ** (bits - 1))
    scale = _storable(_asymmetric_scale(low, high, bits))
    return scale, (-low / scale).round().clamp_(0, 2**bits - 1)


def _candidates(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points of all grids that the search tries, `(grids, rows)`, the widest first; of each range two."""
    if symmetric:
        as_is, swapped = _symmetric_scales(low, high, bits)
        pair, zeros = torch.stack([as_is, -swapped]), torch.full_like(low, 2 ** (bits - 1)).expand(2, -1)
    else:
        scale = _asymmetric_scale(low, high, bits)
        below = (-low / _storable(scale)).floor_().clamp_(0, 2**bits - 2)
        pair, zeros = scale.expand(2, -1), torch.stack([below, below + 1])
    shrinks = torch.tensor(SHRINKS, device=low.device)[:, None, None]
    return _storable(shrinks * pair).flatten(0, 1), zeros.repeat(len(SHRINKS), 1)


def _symmetric_scales(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The negative side of the grid has `half` steps, the positive one `half - 1`: a negative scale swaps them. Both as magnitudes."""
    half = 2 ** (bits - 1)
    magnitudes = torch.maximum(-low / half, high / (half - 1)), torch.maximum(high / half, -low / (half - 1))
    return tuple(_not_underflowed(magnitude, low, high) for magnitude in magnitudes)


def _asymmetric_scale(low: Tensor, high: Tensor, bits: int) -> Tensor:
    return _not_underflowed((high - low) / (2**bits - 1), low, high)


def _not_underflowed(scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Not zero for a range so small that the division underflowed."""
    return torch.where((scale == 0) & (high > low), SMALLEST_SCALE, scale)


def _least_squares_scale(values: Tensor, points: Grid, importance: Tensor) -> Tensor:
    """The scale with the least squared error for the steps that the values `(rows, n)` round to; the grid's own where all are zero."""
    steps = Grid(*(part[:, None] for part in points)).round(values, out=torch.empty_like(values))
    weighted = steps * importance
    squares = torch.linalg.vecdot(weighted, steps)
    return _storable(torch.where(squares > 0, torch.linalg.vecdot(weighted, values) / squares, points.scale))


def _rounding_errors(values: Tensor, scales: Tensor, zeros: Tensor, bits: int, importance: Tensor) -> Tensor:
    """Squared rounding error, weighted, of each row of `values (rows, n)` under each of its grids, `(grids, rows)`."""
    steps, errors = torch.empty_like(values), torch.empty_like(scales)
    for scale, zero, error in zip(scales[:, :, None], zeros[:, :, None], errors, strict=True):
        grid(scale, zero, bits).round(values, out=steps)
        torch.mv(torch.addcmul(values, steps, scale, value=-1, out=steps).square_(), importance, out=error)
    return errors


class Grid(NamedTuple):
    """The points `step · scale` for whole steps from `low = −zero` to `high = 2**bits − 1 − zero`; codes are steps plus the zero point."""

    scale: Tensor
    low: Tensor
    high: Tensor

    def round(self, values: Tensor, out: Tensor) -> Tensor:
        """The step whose point is nearest, as a float, into `out`."""
        return torch.div(values, self.scale, out=out).round_().clamp_(self.low, self.high)


def grid(scale: Tensor, zero: Tensor, bits: int) -> Grid:
    """The grid of a scale and a zero point, whose shapes broadcast with those of the values to be rounded."""
    zero = zero.float()
    return Grid(scale, -zero, 2**bits - 1 - zero)


def encode(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest codes, as floats: `clamp(round(w / scale) + zero, 0, 2**bits − 1)`. Shapes broadcast."""
    return (values / scale).round_().add_(zero).clamp_(0, 2**bits - 1)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`(codes − zero) · scale`. Shapes broadcast."""
    return (codes - zero) * scale


def _storable(scale: Tensor) -> Tensor:
    """Rounded to float16 and back, never to 0 or Inf; an all-zero group gets 1."""
    magnitude = scale.abs().clamp(SMALLEST_SCALE, torch.finfo(torch.float16).max)
    sign = torch.where(scale < 0, -1.0, 1.0)
    return torch.where(scale == 0, torch.ones_like(scale), sign * magnitude.half().float())
