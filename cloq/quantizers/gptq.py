"""GPTQ: columns in order, each column's rounding error pushed onto the columns that are still free.

Frantar et al., arXiv:2210.17323, Algorithm 1. With `H = G + λI` and `Uᵀ U = H⁻¹`, `U` upper triangular, quantizing column i to `q` moves
the later columns by `−(w_i − q) U[i, i+1:] / U[i, i]`, which is the least-squares answer to the error just made.

Departures from the paper: the factor comes from one Cholesky factorization of the reversed matrix (`linalg.inverse_cholesky`); the work
runs on the transposed weight so that a column is contiguous; a failed factorization raises the damping and says so in the result.
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
    act_order: columns in order of falling diagonal of the Gram matrix. Groups then follow that order (`group_index` is a permutation's),
        unless `static_groups`.
    static_groups: every group's scale and zero point from the original weight, before any column is quantized, in the original order.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    search: bool = False
    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False

    def quantize(self, weight: Tensor, stats: LayerStats) -> QuantizedWeight:
        """`weight (out, in)` of any float dtype, `stats.gram (in, in)`. Inputs whose diagonal is zero get weight 0."""
        weight = weight.detach().float()
        rows, columns = weight.shape
        gram = stats.gram.float()
        diagonal = gram.diagonal()
        dead = diagonal <= 0
        order = torch.argsort(diagonal, descending=True, stable=True) if self.act_order else torch.arange(columns, device=weight.device)
        natural = grid.group_index(columns, self.group_size, weight.device)
        index = natural[order] if self.static_groups else natural  # group of each column, in processing order
        n_groups = int(natural[-1]) + 1

        free = weight.masked_fill(dead, 0.0)[:, order].T.contiguous()  # (in, out): one processed column is one contiguous row
        gram = torch.where(dead[:, None] | dead, torch.diag(dead.to(gram.dtype)), gram)[order][:, order]
        factor, damping = linalg.inverse_cholesky(gram, self.damping)

        scale, zero = weight.new_empty(n_groups, rows), weight.new_empty(n_groups, rows)
        fixed = self.static_groups or self.group_size is None
        if fixed:
            original = weight.masked_fill(dead, 0.0)
            for g in range(n_groups):
                scale[g], zero[g] = grid.fit(original[:, natural == g], self.bits, self.symmetric, self.search)

        codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
        step = BLOCK if self.group_size is None else max(self.group_size, BLOCK // self.group_size * self.group_size)
        for start in range(0, columns, step):
            end = min(start + step, columns)
            errors = torch.empty(end - start, rows, device=weight.device)
            for i in range(start, end):
                g = int(index[i])
                if not fixed and i % self.group_size == 0:
                    scale[g], zero[g] = grid.fit(free[i : i + self.group_size].T, self.bits, self.symmetric, self.search)
                code = grid.encode(free[i], scale[g], zero[g], self.bits)
                codes[i] = code.byte()
                error = (free[i] - grid.decode(code, scale[g], zero[g])) / factor[i, i]
                free[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1.0)
                errors[i - start] = error
            free[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1.0)

        inverse = torch.argsort(order)
        return QuantizedWeight(
            codes.T[:, inverse].contiguous(), scale.T.contiguous(), zero.T.byte(), index[inverse], self.bits, self.group_size,
            self.symmetric, damping,
        )  # fmt: skip
