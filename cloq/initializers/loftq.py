"""LoftQ: quantize what the factors leave, fit the factors to what quantization leaves, and so on.

Li et al., arXiv:2310.08659, Algorithm 1. From `B A = 0`, for t = 1 … T:

    Q_t = quantize(W − B_{t−1} A_{t−1}),        B_t A_t = SVD_r(W − Q_t),  singular values shared between both factors

The last `Q_T` goes with the factors fitted to it. With T = 1 this is `Svd`. The weight error `‖W − Q − B A‖` usually falls
over the rounds but nothing guarantees it, and the data play no part in the fit; both are the method's own.

Departure from the paper: any quantizer takes NF4's place, GPTQ and its grids of any width included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloq.algebra import lowrank
from cloq.types import AnyQuantizedWeight, LayerStats, LoraFactors, Quantize


@dataclass(frozen=True)
class Loftq:
    """iterations: T, rounds of quantizing and fitting. Each costs one quantization and one decomposition."""

    iterations: int = 5

    def __post_init__(self):
        if self.iterations < 1:
            raise ValueError(f"LoftQ needs at least one round, got iterations={self.iterations}")

    def initialize(self, weight: Tensor, stats: LayerStats, quantize: Quantize, rank: int) -> tuple[AnyQuantizedWeight, LoraFactors]:
        """`stats` are the quantizer's alone. Raises `ValueError` for a rank above `min(weight.shape)`."""
        lowrank.check_rank(rank, weight.shape)
        weight = weight.detach().float()
        delta = torch.zeros_like(weight)
        for _ in range(self.iterations):
            quantized = quantize(weight - delta, stats)
            B, A = lowrank.low_rank(weight - quantized.dequantize(), None, rank)
            delta = B @ A
        return quantized, LoraFactors(A, B)
