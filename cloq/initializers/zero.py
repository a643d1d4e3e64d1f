"""Zero: LoRA's own initialization on the quantized weight, as QLoRA does. The correction starts at nothing.

Hu et al., arXiv:2106.09685 §4.1, with PEFT's Kaiming-uniform A. `B A = 0`, so the model starts as the quantized one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloq.algebra import lowrank
from cloq.types import AnyQuantizedWeight, LayerStats, LoraFactors, Quantize


@dataclass(frozen=True)
class Zero:
    """B is zero, A uniform within ±1/√in. seed: of A; equal shapes get equal factors."""

    seed: int = 0

    def initialize(self, weight: Tensor, stats: LayerStats, quantize: Quantize, rank: int) -> tuple[AnyQuantizedWeight, LoraFactors]:
        """`stats` are the quantizer's alone. Raises `ValueError` for a rank above `min(weight.shape)`."""
        lowrank.check_rank(rank, weight.shape)
        out, columns = weight.shape
        generator = torch.Generator().manual_seed(self.seed)
        A = (torch.rand(rank, columns, generator=generator) * 2 - 1) / columns**0.5
        return quantize(weight.detach().float(), stats), LoraFactors(A.to(weight.device), torch.zeros(out, rank, device=weight.device))
