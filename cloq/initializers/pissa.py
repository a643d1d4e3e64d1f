"""PiSSA: the principal part of the weight goes into the factors, and only the rest is quantized.

Meng et al., arXiv:2404.02948 (there QPiSSA): `B A = SVD_r(W)`, the singular values shared between both factors, and
`Q = quantize(W − B A)`. Fine-tuning then moves the principal directions themselves. The factors do not undo the error of Q.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cloq.algebra import lowrank
from cloq.types import AnyQuantizedWeight, LayerStats, LoraFactors, Quantize


@dataclass(frozen=True)
class Pissa:
    """Factors first, then quantize what they leave."""

    def initialize(self, weight: Tensor, stats: LayerStats, quantize: Quantize, rank: int) -> tuple[AnyQuantizedWeight, LoraFactors]:
        """`stats` are the quantizer's alone. Raises `ValueError` for a rank above `min(weight.shape)`."""
        lowrank.check_rank(rank, weight.shape)
        weight = weight.detach().float()
        B, A = lowrank.low_rank(weight, None, rank)
        return quantize(weight - B @ A, stats), LoraFactors(A, B)
