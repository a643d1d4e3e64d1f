"""Round to nearest: every value to the closest point of its group's grid, no calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloq.quantizers import grid
from cloq.quantizers.columns import fit_grid
from cloq.types import LayerStats, QuantizedWeight


@dataclass(frozen=True)
class Rtn:
    """Round to nearest on a group-wise grid.

    bits: 2, 3, 4 or 8. group_size: columns per group, `None` for one group per row. symmetric, search: see `grid.fit`.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    search: bool = False

    def quantize(self, weight: Tensor, stats: LayerStats | None = None) -> QuantizedWeight:
        """`weight (out, in)` of any float dtype; `stats` are not used. Raises `ModelError` for values that no grid holds."""
        weight = grid.finite(weight, grid.LARGEST_WEIGHT)
        columns = weight.shape[1]
        index = grid.group_index(columns, self.group_size, weight.device)
        groups = weight.split(self.group_size or columns, dim=1)
        fits = [fit_grid(group.T, self.bits, self.symmetric, self.search) for group in groups]
        scale, zero = (torch.stack(parts, dim=1) for parts in zip(*fits, strict=True))
        codes = grid.encode(weight, scale.index_select(1, index), zero.index_select(1, index), self.bits).byte()
        return QuantizedWeight(codes, scale, zero, index, self.bits, self.group_size, self.symmetric)
