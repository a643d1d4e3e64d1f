"""GPTQ: columns in order, each column's rounding error pushed onto the columns that are still free.

Frantar et al., arXiv:2210.17323, Algorithm 1. With `H = G + λI` and `Uᵀ U = H⁻¹`, `U` upper triangular, quantizing column i
to `q` moves the later columns by `−(w_i − q) U[i, i+1:] / U[i, i]`, which is the least-squares answer to the error just made.

Departures from the paper: the factor comes from one Cholesky factorization of the reversed matrix
(`linalg.inverse_cholesky`); the work runs on the transposed weight so that a column is contiguous; a failed factorization
raises the damping and says so in the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloq import linalg
from cloq.quantizers import grid
from cloq.types import LayerStats, QuantizedWeight

BLOCK = 128
"""Columns whose updates are applied one by one before the rest of the weight gets them in one product."""


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

    def quantize(self, weight: Tensor, stats: LayerStats) -> QuantizedWeight:
        """`weight (out, in)` of any float dtype, `stats.gram (in, in)`. Inputs whose diagonal is zero get weight 0.

        Raises `ModelError` for values that no grid holds, `ValueError` for a Gram matrix that is not one.
        """
        weight = grid.finite(weight, grid.LARGEST_WEIGHT)
        weight, gram = _settle_dead_inputs(weight, stats.gram.float())
        columns = weight.shape[1]
        order = torch.arange(columns, device=weight.device)
        if self.act_order:
            order = torch.argsort(stats.gram.diagonal(), descending=True, stable=True)
            gram = gram[order][:, order]
        natural = grid.group_index(columns, self.group_size, weight.device)
        index = natural[order] if self.static_groups else natural  # group of each column, in processing order
        fits = None
        if self.static_groups or self.group_size is None:
            fits = [self._fit(weight[:, natural == g]) for g in range(int(natural[-1]) + 1)]

        factor, damping = linalg.inverse_cholesky(gram, self.damping)
        codes, fits = self._sweep(weight[:, order].T.contiguous(), factor, index.tolist(), fits)
        scale, zero = (torch.stack(parts, dim=1) for parts in zip(*fits, strict=True))
        back = torch.argsort(order)
        return QuantizedWeight(
            codes.T[:, back].contiguous(), scale, zero, index[back], self.bits, self.group_size, self.symmetric, damping
        )

    def _fit(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return grid.fit(values, self.bits, self.symmetric, self.search)

    def _sweep(self, free: Tensor, factor: Tensor, index: list[int], fits: list | None) -> tuple[Tensor, list]:
        """Codes `(in, out)` and each group's (scale, zero). `free (in, out)`, one column of the weight per row, is used up.

        fits: given, or `None` to fit every group to what its columns have become when the sweep reaches it.
        """
        columns, rows = free.shape
        moving, fits = fits is None, fits or []
        step = max(self.group_size, BLOCK // self.group_size * self.group_size) if moving else BLOCK
        codes = torch.empty(columns, rows, dtype=torch.uint8, device=free.device)
        for start in range(0, columns, step):
            end = min(start + step, columns)
            errors = torch.empty(end - start, rows, device=free.device)
            for i in range(start, end):
                if moving and i % self.group_size == 0:  # blocks are whole groups, so all of this one is up to date
                    fits.append(self._fit(free[i : i + self.group_size].T))
                scale, zero = fits[index[i]]
                code = grid.encode(free[i], scale, zero, self.bits)
                codes[i] = code.byte()
                error = (free[i] - grid.decode(code, scale, zero)) / factor[i, i]
                free[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1.0)
                errors[i - start] = error
            free[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1.0)
        return codes, fits


def _settle_dead_inputs(weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs that are always zero get weight 0 and, for the factorization, the live ones' mean diagonal: no damping changes."""
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    mean = diagonal.clamp_min(0).sum() / (~dead).sum().clamp_min(1)
    gram = torch.where(dead[:, None] | dead, torch.diag(dead * mean), gram)
    return weight.masked_fill(dead, 0.0), gram
