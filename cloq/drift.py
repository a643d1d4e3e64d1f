"""What has gone wrong before a layer, and how the layer makes up for it.

Behind compressed layers a layer is given `x` where the original model gives it `x°`, and its output is added to a stream `s` that
should have been `s°`. Its compressed weight does best not to copy `W` but to answer for both:

    min over Ŵ of  Σ ‖(s° + W x°) − (s + Ŵ x)‖²  =  Σ ‖(W* − Ŵ) x‖² + what no Ŵ can change,
    W* = W + (W D + R) G⁻¹,      D = Σ (x° − x) xᵀ,   R = Σ (s° − s) xᵀ,   G = Σ x xᵀ

`W D + R` is `Σ (t° − t) xᵀ`, where `t°` and `t` are the streams with the layer's output in them, while its weight is `W` in both models. So
everything that quantizes `W` and fits factors to it quantizes and fits `W*` in the same way. With few tokens the whole step fits
their noise: `G` is damped as for GPTQ, and a share of the step is taken.

The first half, `D`, is known from QEP (Arai and Ichikawa, arXiv:2504.09629) and GPTAQ (Li et al., arXiv:2504.02692). The second, that a
layer whose output is added to the stream answers for the stream, is cloq's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cloq import linalg
from cloq.types import LayerStats

DAMPING = 0.01
"""Of the Gram matrix, relative to its mean diagonal."""


@dataclass(frozen=True, eq=False)
class Drift:
    """What a layer has to make up for, float32; sums over the same tokens as the layer's Gram matrix, of which it has one.

    inputs: `D (in, in)`, of a layer whose output is not added to anything. sums: `W D + R (out, in)`, of one whose output is.
    """

    inputs: Tensor | None = None
    sums: Tensor | None = None

    @property
    def total(self) -> Tensor:
        return next(total for total in (self.inputs, self.sums) if total is not None)

    def step(self, weight: Tensor) -> Tensor:
        """`W D + R`, `(out, in)`."""
        return self.sums if self.sums is not None else weight @ self.inputs


def sums_of(drifts: dict[str, Drift]) -> Iterator[Tensor]:
    """Every sum once, in order: layers that share an input share `D`."""
    seen: set[int] = set()
    for drift in drifts.values():
        if id(drift.total) not in seen:
            seen.add(id(drift.total))
            yield drift.total


def corrected(weight: Tensor, stats: LayerStats, drift: Drift, share: float) -> Tensor:
    """`W + share · (W D + R) (G + λ I)⁻¹`, `(out, in)` float32. A damping that fails is raised, as everywhere."""
    weight = weight.float()
    factor, _ = stats.once((corrected, DAMPING), lambda: linalg.damped_cholesky(stats.gram.float(), DAMPING))
    step = torch.linalg.solve_triangular(factor.T, drift.step(weight), upper=False, left=False)  # H = R Rᵀ: X H⁻¹ = (X R⁻ᵀ) R⁻¹
    return weight + share * torch.linalg.solve_triangular(factor, step, upper=True, left=False)
