"""GPTQ: columns in order, each column's rounding error pushed onto the columns that are still free.

Frantar et al., arXiv:2210.17323, Algorithm 1. With `H = G + λI` and `Uᵀ U = H⁻¹`, `U` upper triangular, quantizing column i
to `q` moves the later columns by `−(w_i − q) U[i, i+1:] / U[i, i]`, which is the least-squares answer to the error just made.

Departures from the paper: `U` is never formed. With `R = U⁻¹`, so that `H = R Rᵀ` (`linalg.damped_cholesky`), the errors
`E = W − Q` of all columns D that are done leave the next block b at

    W_b + E_D R[D, b] U[b, b],       U[b, b] = R[b, b]⁻¹

which is where the paper's updates, block after block, have moved it (the free columns' answer `E_b` solves `E_D R[D, b] + E_b
R[b, b] = 0`). One factorization and the inverses of its diagonal blocks do, and a block is read and written once. Inside a block
the paper's update runs (`columns.round_columns`). The work is on the transposed weight, so that a column is contiguous; a failed
factorization raises the damping and says so in the result.

An error `e` in column i costs `e² R[i, i]²` after the later columns have made up for what they can. The search for scales weighs
each column with the root of that, `R[i, i]`: between the plain sum, which ruins layers with outlier inputs, and the full weight, which
spends the grid on what the factors after it will undo (measured in docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloq.algebra import linalg
from cloq.quantizers import grid
from cloq.quantizers.columns import fit_grid, round_columns
from cloq.quantizers.rtn import Rtn
from cloq.types import LayerStats, QuantizedWeight

BLOCK = 128
"""Columns that are brought up to date in one product, with the errors of all columns before them."""


Fit = tuple[Tensor, Tensor]
"""A group's scale and zero point, `(out,)` each."""


@dataclass(frozen=True)
class Gptq:
    """GPTQ on a group-wise grid.

    bits, group_size, symmetric, search: as in `Rtn`.
    damping: added to the Gram matrix's diagonal, relative to its mean.
    act_order: columns in order of falling diagonal of the Gram matrix. Groups then follow that order (`group_index` is a
        permutation's), unless `static_groups`.
    static_groups: every group's scale and zero point from the original weight, before any column is quantized, in the
    original order.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    search: bool = False
    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> QuantizedWeight:
        """`weight (out, in)` of any float dtype, `stats.gram (in, in)`. Inputs whose diagonal is zero get weight 0.

        Without statistics nothing is pushed anywhere, and what is left is `Rtn`, with scales searched. Raises `ModelError` for values that
        no grid holds, `ValueError` for a Gram matrix that is not one.
        """
        if stats is None:
            return Rtn(self.bits, self.group_size, self.symmetric, search=True).quantize(weight)
        weight = grid.finite(weight, grid.LARGEST_WEIGHT)
        columns = weight.shape[1]
        factor, damping, order, dead = stats.once((Gptq, self.damping, self.act_order), lambda: self._factorize(stats.gram.float()))
        weight = weight.masked_fill(dead, 0.0)
        natural = grid.group_index(columns, self.group_size, weight.device)
        index = natural[order] if self.static_groups else natural  # group of each column, in processing order
        fits = []
        if self.static_groups or self.group_size is None:
            importance = torch.empty_like(weight[0]).index_copy_(0, order, factor.diagonal())
            fits = [self._fit(weight[:, natural == g].T, importance[natural == g]) for g in range(int(natural[-1]) + 1)]

        codes, fits = self._sweep(weight.T[order].contiguous() if self.act_order else weight.T.contiguous(), factor, index, fits)
        scale, zero = (torch.stack(parts, dim=1) for parts in zip(*fits, strict=True))
        if self.act_order:
            back = torch.argsort(order)
            codes, index = codes[back], index[back]
        return QuantizedWeight(codes.T.contiguous(), scale, zero, index, self.bits, self.group_size, self.symmetric, damping)

    def _factorize(self, gram: Tensor) -> tuple[Tensor, float, Tensor, Tensor]:
        """All that a sweep needs of the Gram matrix: the factor in processing order, its damping, that order, and the dead inputs."""
        gram, dead = _settle_dead_inputs(gram)
        order = torch.arange(len(gram), device=gram.device)
        if self.act_order:
            order = torch.argsort(gram.diagonal().masked_fill(dead, 0.0), descending=True, stable=True)
            gram = gram[order[:, None], order]
        return *linalg.damped_cholesky(gram, self.damping), order, dead

    def _fit(self, values: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """values `(group, out)`: columns of a group."""
        return fit_grid(values, self.bits, self.symmetric, self.search, importance)

    def _sweep(self, weight: Tensor, factor: Tensor, index: Tensor, fits: list[Fit]) -> tuple[Tensor, list[Fit]]:
        """Codes `(in, out)` and each group's scale and zero point. `weight (in, out)`: one column of the layer's weight per row.

        index `(in,)`: the columns' groups. fits: of all groups, or none, to fit every group to what its columns have become when the sweep
        reaches it.
        """
        fixed = grid.grid(*(torch.stack(parts) for parts in zip(*fits, strict=True)), self.bits) if fits else None
        step = BLOCK if fixed is not None else max(self.group_size, BLOCK // self.group_size * self.group_size)
        codes = torch.empty_like(weight, dtype=torch.uint8)
        errors = torch.empty_like(weight)
        for start in range(0, len(weight), step):
            here = slice(start, min(start + step, len(weight)))
            identity = torch.eye(len(weight[here]), dtype=factor.dtype, device=factor.device)
            inverse = torch.linalg.solve_triangular(factor[here, here], identity, upper=True)
            free = weight[here].clone()
            if start:
                free.addmm_(inverse.T, factor[:start, here].T @ errors[:start])
            shares, importance = inverse / inverse.diagonal()[:, None], factor.diagonal()[here]
            rounded = torch.empty_like(free)
            if fixed is None:
                fits = fits + self._fit_and_round(free, shares, importance, codes[here], rounded)
            else:
                _round(free, shares, fixed, index[here], codes[here], rounded)
            torch.sub(weight[here], free, out=errors[here]).add_(rounded)
        return codes, fits

    def _fit_and_round(self, free: Tensor, shares: Tensor, importance: Tensor, codes: Tensor, errors: Tensor) -> list[Fit]:
        """`_round` for a block of whole groups, one after the other, so that all of a group is up to date when its grid is fitted. Returns
        the fits. importance `(block,)`: `R[i, i]`."""
        fits = []
        for start in range(0, len(free), self.group_size):
            here, behind = slice(start, start + self.group_size), slice(start + self.group_size, None)
            fits.append(self._fit(free[here], importance[here]))
            one = grid.grid(*(part[None] for part in fits[-1]), self.bits)
            _round(free[here], shares[here, here], one, None, codes[here], errors[here])
            free[behind].addmm_(shares[here, behind].T, errors[here], alpha=-1)
        return fits


def _round(free: Tensor, shares: Tensor, grids: grid.Grid, groups: Tensor | None, codes: Tensor, errors: Tensor) -> None:
    """Codes of some columns, into `codes`, and each column's error against what it had become when it was rounded, into `errors`.

    free `(columns, out)`: left as they were rounded. shares `(columns, columns)`: `U[i, :] / U[i, i]`. grids, groups: see
    `columns.grids_of`.
    """
    steps = torch.empty_like(free)
    round_columns(free, shares, grids, groups, steps, errors)
    codes.copy_(steps.sub_(grids.low if groups is None else grids.low.index_select(0, groups)))


def _settle_dead_inputs(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrix with the live inputs' mean diagonal for those that are always zero, so that no damping changes; and those."""
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    if not bool(dead.any()):
        return gram, dead
    mean = diagonal.clamp_min(0).sum() / (~dead).sum().clamp_min(1)
    return torch.where(dead[:, None] | dead, torch.diag(dead * mean), gram), dead
