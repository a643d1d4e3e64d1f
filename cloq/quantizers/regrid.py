"""Onto a grid that is there already: new values, the nearest codes, the old scales.

What rounding a changed weight back into its own packed file would give. No data, no search: every value by itself.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cloq.quantizers import grid
from cloq.types import AnyQuantizedWeight, CodebookWeight


def onto_grid_of(weight: AnyQuantizedWeight, values: Tensor) -> AnyQuantizedWeight:
    """`values (out, in)` rounded to the nearest points of `weight`'s grid: its scales, zero points or codebook, other codes."""
    if isinstance(weight, CodebookWeight):
        scale = weight.scale.repeat_interleave(weight.block_size)[: values.numel()]
        scaled = torch.where(scale > 0, values.flatten() / scale, 0.0)
        codes = torch.bucketize(scaled, (weight.codebook[1:] + weight.codebook[:-1]) / 2).reshape(values.shape)
    else:
        scale, zero = (per_group.float().index_select(1, weight.group_index) for per_group in (weight.scale, weight.zero))
        codes = grid.encode(values, scale, zero, weight.bits)
    return dataclasses.replace(weight, codes=codes.byte())
