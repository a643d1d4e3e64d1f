"""EoRA: the correction in the eigenspace of the inputs, by an explicit root of the Gram matrix and its inverse.

Liu et al., arXiv:2410.21271, Algorithm 1. With `G = U Λ Uᵀ`, `S = U Λ^{1/2}` and the truncated SVD `(W − Q) S ≈ P σ Rᵀ`,

    B = P σ^{1/2},      A = σ^{1/2} Rᵀ S⁻¹

It minimises what CLoQ minimises, on the path that CLoQ's own paper takes too, and so is the twin of `closed_form` in other
clothes: one decomposition of `(in, in)` more, and a rule for the eigenvalues that have no inverse.

Departure from the paper, which leaves that rule open: eigenvalues below 1e-12 of the largest are raised to it, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloq.algebra import lowrank
from cloq.types import AnyQuantizedWeight, LayerStats, LoraFactors, Quantize

SMALLEST_EIGENVALUE = 1e-12
"""Of the largest; sixteen digits less the accuracy that the decomposition itself keeps."""


@dataclass(frozen=True)
class Eora:
    """Quantize, then fit the factors to the error in the eigenspace of the inputs."""

    def initialize(self, weight: Tensor, stats: LayerStats, quantize: Quantize, rank: int) -> tuple[AnyQuantizedWeight, LoraFactors]:
        """Raises `ValueError` for a rank above `min(weight.shape)`. A Gram matrix of zeros gives the plain truncated SVD."""
        lowrank.check_rank(rank, weight.shape)
        weight = weight.detach().float()
        quantized = quantize(weight, stats)
        root, inverse = _root_and_inverse(stats.gram)
        projected = (weight - quantized.dequantize()).to(root.dtype) @ root
        P, energies, *_ = lowrank.top_eigenvectors(projected, None, rank)
        share = energies.to(root.dtype).sqrt().sqrt()  # σ^{1/2}
        # a direction that holds no error at all gets zeros in both factors rather than 0/0
        undo = torch.where(share > 1e-8 * share[0], 1 / share, torch.zeros_like(share))
        A = (undo[:, None] * (P.T @ projected)) @ inverse
        return quantized, LoraFactors(A.float(), (P * share).float())


def _root_and_inverse(gram: Tensor) -> tuple[Tensor, Tensor]:
    """`S = U Λ^{1/2}` and `S⁻¹ = Λ^{-1/2} Uᵀ`, `(in, in)` each, with Λ clipped from below."""
    values, vectors = torch.linalg.eigh(gram.double())
    root = values.clamp_min(max(SMALLEST_EIGENVALUE * float(values[-1]), 1e-30)).sqrt()
    return vectors * root, (vectors / root).T
