"""The second moment `H = Σ g gᵀ` of a layer's output gradients, without forming it: its diagonal, and what it makes of a few vectors.

From `Y = H Ω`, Ω `(out, SKETCHED)` with normal entries, follow the leading eigenvectors of H (Nyström's approximation: `H ≈ Y (Ωᵀ Y)⁻¹ Yᵀ`,
never more than H itself; Halko, Martinsson and Tropp, arXiv:0909.4061, §5.4). `H` is `(out, out)`, which for a wide layer is more than its
weight; these are a few columns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from cloq.algebra.linalg import symmetric

SKETCHED = 32
"""Random vectors: twice as many as directions are asked for, which finds those to a few per cent of what they hold."""

UNKNOWN = 1e-6
"""Of the sketch's largest eigenvalue, below which one is float32's rounding of the sums."""


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """diagonal: `(out,)`. sketch: `H Ω`, `(out, SKETCHED)`. Sums over rows, float32: those of different rows add up."""

    diagonal: Tensor
    sketch: Tensor

    @staticmethod
    def zeros(out: int, device: torch.device | None = None) -> SecondMoment:
        return SecondMoment(torch.zeros(out, device=device), torch.zeros(out, SKETCHED, device=device))

    @staticmethod
    def of(rows: Tensor) -> SecondMoment:
        """Of gradients `(tokens, out)`."""
        rows = rows.float()
        return SecondMoment(rows.square().sum(0), rows.T @ (rows @ _vectors(rows.shape[1]).to(rows.device)))

    def __add__(self, other: SecondMoment) -> SecondMoment:
        return SecondMoment(self.diagonal + other.diagonal, self.sketch + other.sketch)

    def __truediv__(self, number: float) -> SecondMoment:
        return SecondMoment(self.diagonal / number, self.sketch / number)

    def to(self, device: torch.device) -> SecondMoment:
        return SecondMoment(self.diagonal.to(device), self.sketch.to(device))

    def leading(self, count: int) -> Tensor:
        """`U (out, count)` float32 with `U Uᵀ` close to H's part in its leading eigenvectors, and nowhere more than H."""
        sketch, vectors = self.sketch.cpu().double(), _vectors(len(self.sketch)).double()
        values, turned = torch.linalg.eigh(symmetric(vectors.T @ sketch))
        known = values > UNKNOWN * values[-1].clamp_min(0)
        u, s, _ = torch.linalg.svd(sketch @ (turned[:, known] / values[known].sqrt()), full_matrices=False)
        found = (u * s)[:, :count]
        return torch.nn.functional.pad(found, (0, count - found.shape[1])).to(self.sketch)


@functools.lru_cache(maxsize=16)
def _vectors(out: int) -> Tensor:
    """Ω: the same for all layers of this width, and in every run."""
    return torch.randn(out, SKETCHED, generator=torch.Generator().manual_seed(0))
