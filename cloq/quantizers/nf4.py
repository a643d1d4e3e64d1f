"""NF4: sixteen quantiles of the normal distribution, scaled by each block's largest magnitude.

Dettmers et al., arXiv:2305.14314 §3. The codes, scales and decoded values are those of
`bitsandbytes.functional.quantize_4bit` with `quant_type="nf4"`, `blocksize=64`, `compress_statistics=False`, to the last bit;
so an exported base needs no second quantization.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloq.quantizers import grid
from cloq.types import CodebookWeight, LayerStats

CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of N(0, 1) at 8 even steps from 1 − 0.9677083 up to 1/2 and 9 on to 0.9677083, divided by the largest; float32.

Written out because the library's table is: recomputed quantiles may differ in the last bit.
"""

SMALLEST_PEAK = 1e-38
"""A block's largest magnitude is not divided by below this."""


@dataclass(frozen=True)
class Nf4:
    """Every value to the nearest entry of the codebook. block_size: values that share a scale, along the flattened weight."""

    block_size: int = 64

    def quantize(self, weight: Tensor, stats: LayerStats | None = None) -> CodebookWeight:
        """`weight (out, in)` of any float dtype, blocks in row-major order, the last one maybe shorter; `stats` are not used.

        A value halfway between two entries goes to the lower one. Raises `ModelError` for NaN or Inf.
        """
        weight = grid.finite(weight)
        flat = weight.flatten()
        codebook = torch.tensor(CODEBOOK, device=weight.device)
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % self.block_size)).reshape(-1, self.block_size)
        peak = blocks.abs().amax(1)
        scaled = blocks * (1.0 / peak.clamp_min(SMALLEST_PEAK))[:, None]
        if flat.numel() % self.block_size:  # the library divides in a short last block, where it multiplies in the others
            peak[-1] = peak[-1].clamp_min(SMALLEST_PEAK)
            scaled[-1] = blocks[-1] / peak[-1]
        midpoints = (codebook[1:] + codebook[:-1]) / 2
        codes = torch.bucketize(scaled.flatten()[: flat.numel()], midpoints)
        return CodebookWeight(codes.byte().reshape(weight.shape), peak, codebook, self.block_size)
