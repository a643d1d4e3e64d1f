"""Round to nearest: every value to the closest point of its group's grid, no calibration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cloq.quantizers import grid
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
        """`weight (out, in)` of any float dtype; `stats` are not used."""
        weight = weight.detach().float()
        rows, columns = weight.shape
        index = grid.group_index(columns, self.group_size, weight.device)
        groups = [slice(None)] if self.group_size is None else [slice(s, s + self.group_size) for s in range(0, columns, self.group_size)]
        fits = [grid.fit(weight[:, g], self.bits, self.symmetric, self.search) for g in groups]
        scale = weight.new_empty(rows, len(groups))
        zero = index.new_empty(rows, len(groups)).byte()
        for g, (s, z) in enumerate(fits):
            scale[:, g], zero[:, g] = s, z
        codes = grid.encode(weight, scale[:, index], zero[:, index], self.bits).byte()
        return QuantizedWeight(codes, scale, zero, index, self.bits, self.group_size, self.symmetric)
