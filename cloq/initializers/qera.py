"""QERA-approx: the best correction when the inputs of a layer are taken to be uncorrelated.

Zhang et al., arXiv:2410.06040. With `S = diag(sqrt(E[x_i²]))` it minimises `‖(W − Q − B A) S‖_F²`:

    B A = SVD_r((W − Q) S) S⁻¹

which is CLoQ with the diagonal of the Gram matrix in place of the whole. Solved here as CLoQ is, `B A = V Vᵀ (W − Q)` with
`V` the left singular vectors of `(W − Q) S`: nothing is divided by S, so a dead input (`E[x²] = 0`) is as good as any other.

Departure from the paper: the singular values of `B A` are shared between both factors (`BᵀB = A Aᵀ`); the product is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cloq.algebra import lowrank
from cloq.types import AnyQuantizedWeight, LayerStats, LoraFactors, Quantize


@dataclass(frozen=True)
class Qera:
    """Quantize, then fit the factors to the error weighted by each input's root mean square."""

    def initialize(self, weight: Tensor, stats: LayerStats, quantize: Quantize, rank: int) -> tuple[AnyQuantizedWeight, LoraFactors]:
        """Uses the diagonal of `stats.gram`, on any scale. Raises `ValueError` for a rank above `min(weight.shape)`."""
        lowrank.check_rank(rank, weight.shape)
        weight = weight.detach().float()
        quantized = quantize(weight, stats)
        energy = stats.gram.diagonal().clamp_min(0)
        B, A = lowrank.low_rank(weight - quantized.dequantize(), energy, rank)
        return quantized, LoraFactors(A, B)
