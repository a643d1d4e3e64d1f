"""The loops of quantizers that a GPU would run as thousands of small operations: plain torch operations, or one launch on a GPU.

Two are over the columns of a block, each of which waits for the one before; the third is over the ranges that a group's grid may have.
All work on the transposed weight, so that a column of the layer is a row here, `(columns, out)`. On a CUDA device the loop is a Triton
kernel (`cloq.kernels.columns`) where Triton is installed and the kernel has been seen to do on that device what the plain loop does. It
differs from the plain loop by the order of float32 sums.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cloq.quantizers.grid import SHRINKS, Grid, fit, grid

INNER = 16
"""Columns whose updates are applied one by one before the rest gets them in one product, in the plain loops."""

MOST_COLUMNS = 128
"""Of a group whose grid a kernel fits: it holds them all at once. Larger groups, such as whole channels, are few."""

SMALLEST_CURVATURE = torch.finfo(torch.float32).tiny
"""The reciprocal of anything smaller is no float32."""


def round_columns(free: Tensor, shares: Tensor, grids: Grid, groups: Tensor | None, steps: Tensor, errors: Tensor) -> None:
    """Rounds each column to its grid and pushes its error onto the columns behind it: GPTQ's inner loop.

    free `(columns, out)`: left as the columns were rounded. shares `(columns, columns)`: how much of an error in column i column j > i
    answers for. grids, groups: see `grids_of`. steps, errors `(columns, out)`: get the steps, and each column's error against what it had
    become.
    """
    _round(_kernels(free.device), free, shares, grids, groups, steps, errors)


def descend_columns(values: Tensor, steps: Tensor, gradient: Tensor, gram: Tensor, grids: Grid, groups: Tensor | None) -> Tensor:
    """Moves each column to the point of its grid that is best while all others stay: coordinate descent's inner loop.

    values, steps `(columns, out)`: replaced. gradient `(columns, out)`: used up. gram `(columns, columns)`. grids, groups: see `grids_of`.
    Columns whose curvature, the diagonal of `gram`, is too small to divide by stay. Returns by how much each value moved.
    """
    return _descend(_kernels(values.device), values, steps, gradient, gram, grids, groups)


def fit_grid(
    values: Tensor, bits: int, symmetric: bool, search: bool, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scale and zero point `(out,)` of one group for each row of the layer: `grid.fit`, of columns.

    values `(columns, out)`. importance `(columns,)`: what the squared rounding error of each column counts, positive.
    """
    return _fit_grid(_kernels(values.device), values, bits, symmetric, search, importance)


def why_plainly(device: torch.device) -> str | None:
    """Why the plain loops run on a GPU; `None` where they do not, and on devices that have no kernels."""
    return _found(device)[1] if device.type == "cuda" else None


def grids_of(grids: Grid, groups: Tensor | None, columns: int) -> list[Grid]:
    """The grid of each column, `(out,)`.

    grids: of the groups, its tensors `(groups, out)`. groups: of the columns, `(columns,)` int64; `None` where all have the first one.
    """
    wanted = [0] * columns if groups is None else groups.tolist()
    each = {group: Grid(*(part[group] for part in grids)) for group in set(wanted)}
    return [each[group] for group in wanted]


def _round(
    kernels: Any, free: Tensor, shares: Tensor, grids: Grid, groups: Tensor | None, steps: Tensor, errors: Tensor
) -> None:  # fmt: skip
    if kernels is None:
        _round_plainly(free, shares, grids_of(grids, groups, len(free)), steps, errors)
    else:
        kernels.round_columns(free, shares.contiguous(), grids, groups, steps, errors)


def _descend(
    kernels: Any, values: Tensor, steps: Tensor, gradient: Tensor, gram: Tensor, grids: Grid, groups: Tensor | None
) -> Tensor:  # fmt: skip
    if kernels is None:
        return _descend_plainly(values, steps, gradient, gram, grids_of(grids, groups, len(values)))
    curvature = gram.diagonal().double()
    reciprocals = torch.where(curvature < SMALLEST_CURVATURE, 0.0, 1 / curvature).float()
    return kernels.descend_columns(values, steps, gradient, gram.contiguous(), reciprocals, grids, groups)


def _fit_grid(
    kernels: Any, values: Tensor, bits: int, symmetric: bool, search: bool, importance: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    values = values.contiguous()  # where values of one grid lie side by side, torch bounds them at an eighth of the speed
    if kernels is None or len(values) > MOST_COLUMNS:
        return fit(values.T, bits, symmetric, search, importance)
    importance = torch.ones_like(values[:, 0]) if importance is None else importance
    shrinks = _shrinks(values.device) if search else None
    scale, zero = kernels.fit_grid(values, importance.contiguous(), shrinks, 2**bits - 1, symmetric)
    return scale, zero.to(torch.uint8)


@functools.cache
def _shrinks(device: torch.device) -> Tensor:
    """Copied once: a copy from the host waits for all that the GPU has to do."""
    return torch.tensor(SHRINKS, device=device)


# -- plain torch operations ------------------------------------------------------------------------------------------------


def _round_plainly(free: Tensor, shares: Tensor, grids: Sequence[Grid], steps: Tensor, errors: Tensor) -> None:
    rows = list(zip(free.unbind(), steps.unbind(), errors.unbind(), grids, strict=True))
    for first in range(0, len(rows), INNER):
        last = min(first + INNER, len(rows))
        for i in range(first, last):
            value, step, error, points = rows[i]
            points.round(value, out=step)
            torch.addcmul(value, step, points.scale, value=-1, out=error)
            free[i + 1 : last].addr_(shares[i, i + 1 : last], error, alpha=-1)
        free[last:].addmm_(shares[first:last, last:].T, errors[first:last], alpha=-1)


def _descend_plainly(values: Tensor, steps: Tensor, gradient: Tensor, gram: Tensor, grids: Sequence[Grid]) -> Tensor:
    moved = torch.zeros_like(values)
    best = torch.empty_like(values[0])
    rows = list(zip(values.unbind(), steps.unbind(), gradient.unbind(), moved.unbind(), gram.diagonal().tolist(), grids, strict=True))
    for first in range(0, len(rows), INNER):
        last = min(first + INNER, len(rows))
        for i in range(first, last):
            value, step, slope, move, curvature, points = rows[i]
            if curvature < SMALLEST_CURVATURE:
                continue
            points.round(torch.add(value, slope, alpha=1 / curvature, out=best), out=step)
            torch.mul(step, points.scale, out=best)
            torch.sub(best, value, out=move)
            value.copy_(best)
            gradient[i + 1 : last].addr_(gram[i + 1 : last, i], move, alpha=-1)
        gradient[last:].addmm_(gram[last:, first:last], moved[first:last], alpha=-1)
    return moved


# -- the kernels -----------------------------------------------------------------------------------------------------------


def _kernels(device: torch.device) -> Any:
    """The module with the kernels, where they are to be used."""
    return _found(device)[0] if device.type == "cuda" else None


@functools.cache
def _found(device: torch.device) -> tuple[Any, str | None]:
    """The kernels, and why there are none. Tried once for each device."""
    try:
        kernels = importlib.import_module("cloq.kernels.columns")
    except ImportError as error:
        return None, f"Triton is not installed ({error})"
    try:
        differing = differences(kernels, device)
    except Exception as error:  # a compiler, a driver, a device that it does not know: anything can come, and the plain loops are there
        return None, f"its kernels do not run on {device} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    return (None, f"its kernels are wrong on {device} ({differing})") if differing else (kernels, None)


def differences(kernels: Any, device: torch.device) -> str | None:
    """What the kernels make otherwise than the plain loops, of a small problem with a column that nothing depends on; `None` for nothing
    but the order of sums."""
    columns, rows = 40, 70
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    scale, zero = 0.3 + draw(5, rows).square(), torch.randint(0, 4, (5, rows), generator=generator)
    inputs, weight = draw(3 * columns, columns), draw(columns, rows)
    inputs[:, 7] = 0
    gram, shares = inputs.T @ inputs, (0.1 * draw(columns, columns)).triu(1)
    weight, gram, shares, scale, zero = (x.to(device) for x in (weight, gram, shares, scale, zero))
    grids, apart = grid(scale, zero, 2), torch.arange(columns, device=device) % len(scale)

    def rounded(kernels: Any, groups: Tensor | None) -> Tensor:
        free, steps, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
        _round(kernels, free, shares, grids, groups, steps, errors)
        return torch.stack([free, steps, errors])

    def descended(kernels: Any, groups: Tensor | None) -> Tensor:
        steps = torch.zeros_like(weight)
        values = steps.clone()
        return torch.stack([_descend(kernels, values, steps, gram @ weight, gram, grids, groups), values, steps])

    def fitted(kernels: Any, symmetric: bool) -> Tensor:
        return torch.stack([part.float() for part in _fit_grid(kernels, weight, 2, symmetric, True, gram.diagonal() + 1)])

    tried = [("the search for scales", fitted, False), ("the search for scales", fitted, True)]
    tried += [(name, made, groups) for name, made in (("rounding", rounded), ("coordinate descent", descended)) for groups in (None, apart)]
    for name, made, how in tried:
        found, expected = made(kernels, how), made(None, how)
        off = ~torch.isclose(found, expected, rtol=1e-3, atol=1e-3).all(0)  # a value at the edge of two codes may fall to either side
        if float(off.float().mean()) > 0.02:
            return f"{name}: {int(off.sum())} of {off.numel()} values"
    return None
