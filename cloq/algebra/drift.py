"""What has gone wrong before a layer, and how the layer makes up for it.

Behind compressed layers a layer is given `x` where the original model gives it `x°`, and its output is added to a stream `s` that
should have been `s°`. Its compressed weight does best not to copy `W` but to answer for both:

    min over Ŵ of  Σ ‖(s° + W x°) − (s + Ŵ x)‖²  =  Σ ‖(W* − Ŵ) x‖² + what no Ŵ can change,
    W* = W + (W D + R) G⁻¹,      D = Σ (x° − x) xᵀ,   R = Σ (s° − s) xᵀ,   G = Σ x xᵀ

`W D + R` is `Σ (t° − t) xᵀ`, where `t°` and `t` are the streams with the layer's output in them, while its weight is `W` in both models. So
everything that quantizes `W` and fits factors to it quantizes and fits `W*` in the same way. With few tokens the whole step fits
their noise, the more so the less of what went wrong can be told from `x`: so `G` is damped, and a share of the step is taken. Both are
chosen for each layer by what they leave of the same sums over held-out tokens.

The first half, `D`, is known from QEP (Arai and Ichikawa, arXiv:2504.09629) and GPTAQ (Li et al., arXiv:2504.02692). The second, that a
layer whose output is added to the stream answers for the stream, is cloq's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cloq.algebra import linalg
from cloq.precision import full_precision
from cloq.types import LayerStats

DAMPING = 0.01
"""Of the Gram matrix, relative to its mean diagonal, where the share is given."""

DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Those that are tried where it is chosen."""

MIXTURES = 128
"""Random mixtures of a wider layer's rows that stand for all of them while dampings are tried."""


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


@full_precision()
def corrected(weight: Tensor, stats: LayerStats, drift: Drift, share: float) -> Tensor:
    """`W + share · (W D + R) (G + λ I)⁻¹`, `(out, in)` float32. A damping that fails is raised, as everywhere."""
    weight = weight.float()
    factor, _ = stats.once((corrected, DAMPING), lambda: linalg.damped_cholesky(stats.gram.float(), DAMPING))
    return weight + share * _solved(factor, drift.step(weight))


@full_precision()
def corrected_by_heldout(weight: Tensor, stats: LayerStats, drift: Drift, unseen: LayerStats, unseen_drift: Drift) -> Tensor:
    """`W + c · (W D + R) (G + λ I)⁻¹`, `(out, in)` float32, with the λ among `DAMPINGS` and the c ≥ 0 that are best for other tokens.

    unseen, unseen_drift: of those. For a step `P` and `Gʰ, Dʰ, Rʰ` over them the deviation there falls by `2c ⟨P, W Dʰ + Rʰ⟩ − c² ‖P Sʰ‖²`,
    so that the best c is a quotient. Neighbouring λ are tried from the middle one as long as it falls more: by `MIXTURES` mixtures of the
    rows with random signs, of which both terms have the same mean as of all rows. Without tokens, or where no step helps, the weight
    stays as it is.
    """
    weight = weight.float()
    wanted, theirs = drift.step(weight), unseen_drift.step(weight)
    mixed = _mixed(wanted, theirs)

    def tried(damping: float) -> _Trial:
        factor, _ = linalg.damped_cholesky(stats.gram.float(), damping)
        _, share, along = _step(factor, *mixed, unseen)
        return _Trial(along * share, factor)

    step, share, _ = _step(_climb(tried).factor, wanted, theirs, unseen)
    return weight + share * step


class _Trial(NamedTuple):
    """won: by how much the deviation of held-out tokens falls. factor: of the damped Gram matrix."""

    won: float
    factor: Tensor


def _climb(tried: Callable[[float], _Trial]) -> _Trial:
    """The best of the dampings, from the middle one on in the direction in which they get better."""
    start = len(DAMPINGS) // 2
    best = tried(DAMPINGS[start])
    for dampings in (DAMPINGS[start + 1 :], DAMPINGS[:start][::-1]):
        before = best
        for damping in dampings:
            trial = tried(damping)
            if trial.won <= best.won:
                break
            best = trial
        if best is not before:
            break
    return best


def _step(factor: Tensor, wanted: Tensor, theirs: Tensor, unseen: LayerStats) -> tuple[Tensor, float, float]:
    """The step `P`, the share of it that is best for held-out tokens, and `⟨P, W Dʰ + Rʰ⟩`, 0 where it leads away."""
    step = _solved(factor, wanted)
    along = max(0.0, float((step * theirs).sum(dtype=torch.float64)))
    return step, linalg.share(along, linalg.gram_norm2(step, unseen.gram)), along


def _mixed(*matrices: Tensor) -> list[Tensor]:
    """`MIXTURES` sums of the matrices' rows, the same of each, with signs at random and always the same; few rows stay as they are."""
    rows = matrices[0].shape[0]
    if rows <= MIXTURES:
        return list(matrices)
    signs = torch.randint(0, 2, (MIXTURES, rows), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    return [signs.to(matrix) @ matrix for matrix in matrices]


def _solved(factor: Tensor, step: Tensor) -> Tensor:
    """`X H⁻¹` for `X (out, in)` and `H = R Rᵀ`."""
    half = torch.linalg.solve_triangular(factor.T, step, upper=False, left=False)  # X H⁻¹ = (X R⁻ᵀ) R⁻¹
    return torch.linalg.solve_triangular(factor, half, upper=True, left=False)
