"""SVD: the best low-rank correction of the weight error itself, with no regard to what the layer is fed.

The data-free baseline (the LoRC of ZeroQuant-V2, Yao et al., arXiv:2303.08302): `B A` is the truncated singular value
decomposition of `W − Q`. It is CLoQ with the identity for a Gram matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cloq.algebra import lowrank
from cloq.types import AnyQuantizedWeight, LayerStats, LoraFactors, Quantize


@dataclass(frozen=True)
class Svd:
    """Quantize, then `B A = SVD_r(W − Q)`, the singular values shared between both factors (`BᵀB = A Aᵀ`)."""

    def initialize(self, weight: Tensor, stats: LayerStats, quantize: Quantize, rank: int) -> tuple[AnyQuantizedWeight, LoraFactors]:
        """`stats` are the quantizer's alone. Raises `ValueError` for a rank above `min(weight.shape)`."""
        lowrank.check_rank(rank, weight.shape)
        weight = weight.detach().float()
        quantized = quantize(weight, stats)
        B, A = lowrank.low_rank(weight - quantized.dequantize(), None, rank)
        return quantized, LoraFactors(A, B)
