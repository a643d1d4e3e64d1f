"""CLoQ: the factors that best undo a quantized layer's output error on the calibration data, in closed form.

Deng et al., arXiv:2501.18475, Theorem 3.1. For `E = W − Q` and the Gram matrix `G = S Sᵀ` of the layer's inputs it minimises
`‖(E − B A) S‖_F²` over all `B A` of the given rank. With `V` the top eigenvectors of `E G Eᵀ` the optimum is `B A = V Vᵀ E`
(`lowrank` says why), found here without the paper's root, inverse and damping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cloq.algebra import lowrank
from cloq.algebra.linalg import all_finite, share
from cloq.precision import full_precision
from cloq.quantizers.descent import descend
from cloq.types import AnyQuantizedWeight, LayerStats, LoraFactors, Quantize, QuantizedWeight

SPLITS = ("paper", "balanced")

KEPT = 0.03
"""Share of the Gram matrix that is kept along the directions that the factors will undo. None at all lets the codes drift there."""

EVEN = 0.95
"""An even grid is worth a twentieth of the squared size that 2-bit codes have to hold: a term that takes more of it away is kept."""

SHRINKAGE = 1.0
"""What is added to the Gram matrix's diagonal for the first factors, relative to its mean: how much the size of the weight that is left to
the codes counts beside the outputs. From 0.3 to 3 there is little difference."""


STEPS = 2
"""Of the factors' after each round; one more after the last, which shows whether they have arrived."""


class ClosedForm(NamedTuple):
    """factors: `A (r, in)`, `B (out, r)`, float32. error: `‖(E − B A) S‖²`. total: `‖E S‖²`. spectrum: the r leading
    eigenvalues of `E G Eᵀ`, float64, descending; `total − spectrum.sum() = error`."""

    factors: LoraFactors
    error: float
    total: float
    spectrum: Tensor


@full_precision()
def closed_form(error: Tensor, gram: Tensor, rank: int, split: str = "paper", outputs: Tensor | None = None) -> ClosedForm:
    """The rank-r `B A` that minimises `‖D^{1/2} (E − B A) S‖_F²`, `S Sᵀ = G`, `D` the diagonal of `outputs` or the identity.

    error: `(out, in)`, what the factors should undo, `W − Q`. gram: `(in, in)`, positive semi-definite, of any rank and scale.
    rank: at least 1; more than `min(out, in)` is clipped to it, where the error vanishes.
    split: `paper` gives B orthonormal columns, without `outputs` the eigenvectors with `A = Bᵀ E`; `balanced` scales each of these columns
        and its row of A so that a step of training moves the outputs as far through either (`lowrank.share_steps`). Same product.
    outputs: `(out,)`, positive: what the squared error of each output counts. The problem is the plain one for `D^{1/2} E`, whose product
        is then divided by `D^{1/2}`. The result's `error`, `total` and `spectrum` are those of the weighted problem.

    Raises `ValueError` for wrong shapes, rank or split, and for NaN or Inf. Within 0.1 % of the float64 optimum on any input.
    """
    if error.ndim != 2 or gram.shape != (error.shape[1],) * 2:
        shapes = f"{tuple(error.shape)} and {tuple(gram.shape)}"
        raise ValueError(f"closed_form needs an error (out, in) and a Gram matrix (in, in), got {shapes}")
    if rank < 1:
        raise ValueError(f"the rank must be at least 1, got {rank}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    if not (all_finite(error) and all_finite(gram)):
        raise ValueError("closed_form was given NaN or Inf")
    if outputs is not None and (outputs.shape != error.shape[:1] or not bool(((outputs > 0) & torch.isfinite(outputs)).all())):
        raise ValueError(f"closed_form needs a positive finite weight for each of {error.shape[0]} outputs, got {tuple(outputs.shape)}")
    rank = min(rank, *error.shape)
    error = error if error.dtype == torch.float64 else error.float()
    roots = _roots(outputs, error)
    weighted = error if roots is None else roots * error
    vectors, values, total, _ = lowrank.top_eigenvectors(weighted, gram, rank)
    factors = _split(vectors, vectors.to(error.dtype).T @ weighted, gram, split, roots)
    remaining = 0.0 if rank == min(error.shape) else max(total - float(values.sum()), 0.0)
    return ClosedForm(factors, remaining, total, values)


def _split(vectors: Tensor, A: Tensor, gram: Tensor, split: str, roots: Tensor | None) -> LoraFactors:
    """The factors of `D^{-1/2} V A`, `V (out, r)` orthonormal, split as asked. roots: `D^{1/2}`, `None` for the identity."""
    B = vectors if roots is None else vectors / roots
    if split == "balanced":
        B, A = lowrank.share_steps(B, A, gram)
    elif roots is not None:
        B, triangle = torch.linalg.qr(B)
        A = triangle.to(A.dtype) @ A
    return LoraFactors(A.float(), B.float())


def _roots(outputs: Tensor | None, like: Tensor) -> Tensor | None:
    """`D^{1/2}` as a column, `(out, 1)`."""
    return None if outputs is None else outputs.to(like).sqrt()[:, None]


@dataclass(frozen=True)
class Cloq:
    """Quantize and fit the factors to the error in closed form; or, in rounds, fit the factors first and choose the codes for them.

    split: see `closed_form`.
    rounds: how often codes are chosen for the factors, and factors for the codes; 0 is the paper's method.
    bits: of the codes, where that is known. Rounds ask whether they are 2.

    **The first factors** are made before anything is quantized: the closed form for the weight itself, as if all codes were zero, in the
    norm of `G + tr(G)/in · I`. They hold what r terms can of the layer's outputs and of the weight's size, so that the codes have a smaller
    weight left to hold, on a finer grid.

    **Half a step.** The zero of an integer grid is one of its points, so that four points lie lopsided about it: 1, 2 and −1 steps away.
    Values are about as often to either side and want ½ and 1½. At 2 bits the last of the first factors' terms shifts every row by half of
    its step, which makes the points even; whatever the codes are, the factors that follow take the shift away again.

    **A round.** Whatever the codes are, factors with these rows `A` can take away all of the error that lies in the directions of
    `A S`; the best `B` leaves `‖(W − Q) S‖²` without them, which is the norm with the Gram matrix `lowrank.deflate(G, A)`. So the
    quantizer gets that matrix, deflated to a share `KEPT`, and the target `W − B A`. That is what the last rounds do, a quarter of all
    (`compensated`); the others round to the nearest, which leads the factors to the same place for a fraction of the time. The factors
    follow the codes by two orthogonal steps. In the last round integer codes are improved one by one (`quantizers.descend`). The codes with
    the least error are the result, with the factors that followed them, which are the optimum but for a ten-thousandth; where the last step
    still gained more, with the closed form's. The base alone gets worse: it is made for its factors.

    **Outputs that count more** (`stats.outputs`) are the factors' alone: a quantizer treats every row by itself, so that a weight of the
    row changes none of its codes; the factors choose which rows' errors to undo. Errors are compared with the weights.
    """

    split: str = "paper"
    rounds: int = 0
    bits: int | None = None

    def initialize(self, weight: Tensor, stats: LayerStats, quantize: Quantize, rank: int) -> tuple[AnyQuantizedWeight, LoraFactors]:
        """Raises `ValueError` for a rank above `min(weight.shape)`."""
        lowrank.check_rank(rank, weight.shape)
        weight = weight.detach().float()
        if self.rounds and rank < min(weight.shape):  # at full rank factors undo any codes' error
            return self._chosen_for_factors(weight, stats, quantize, rank)
        codes = quantize(weight, stats)
        return codes, self._fitted(weight, codes, stats, rank)

    def _fitted(self, weight: Tensor, codes: AnyQuantizedWeight, stats: LayerStats, rank: int) -> LoraFactors:
        return closed_form(weight - codes.dequantize(), stats.gram, rank, self.split, stats.outputs).factors

    def _chosen_for_factors(
        self, weight: Tensor, stats: LayerStats, quantize: Quantize, rank: int
    ) -> tuple[AnyQuantizedWeight, LoraFactors]:  # fmt: skip
        """The codes of the best round with their factors; the split has no part in the choice."""
        roots = _roots(stats.outputs, weight)
        B, A = _before_any_codes(weight, stats, rank, self.bits)
        best: tuple[AnyQuantizedWeight, lowrank.Followed] | None = None
        for behind in reversed(range(self.rounds)):
            target = weight - B @ A
            if behind < compensated(self.rounds):
                deflated = LayerStats(lowrank.deflate(stats.gram, A, KEPT), stats.n_tokens)
                codes = quantize(target, deflated)
                if not behind and isinstance(codes, QuantizedWeight):
                    codes = descend(codes, target, deflated.gram)
            else:
                codes = quantize(target, None)
            left, near = weight - codes.dequantize(), B
            if roots is not None:
                left, near = roots * left, roots * near
            followed = lowrank.follow(left, stats.gram, near, STEPS if behind else STEPS + 1)
            B, A = followed.B if roots is None else followed.B / roots, followed.A
            if best is None or followed.remaining < best[1].remaining:
                best = codes, followed
            if not math.isfinite(followed.remaining):  # a weight near float32's limit: no factors follow from it
                break
        codes, followed = best
        if not followed.settled:
            return codes, self._fitted(weight, codes, stats, rank)
        return codes, _split(*lowrank.as_eigenvectors(followed.B, followed.A, stats.gram), stats.gram, self.split, roots)


def compensated(rounds: int) -> int:
    """Of so many rounds the last ones, in which the quantizer makes up for its errors; in those before them it rounds to the nearest."""
    return math.ceil(rounds / 4)


def _before_any_codes(weight: Tensor, stats: LayerStats, rank: int, bits: int | None) -> tuple[Tensor, Tensor]:
    """The first factors, `B (out, r)` and `A (r, in)`."""
    first = closed_form(weight, _shrunk(stats.gram), rank, outputs=stats.outputs).factors
    return _with_half_a_step(weight, first.B, first.A) if bits == 2 else (first.B, first.A)


def _with_half_a_step(weight: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """`B (out, r)`, `A (r, in)` with a shift of `W − B A` in the place of their last term, where an even grid is worth more than the term.

    The step of the even grid of four points that is nearest to normal values is 0.996 of their root mean square (Max, Quantizing for
    minimum distortion, 1960): half of a row's is the shift. Inputs whose weights the other terms hold, such as a massive activation's,
    are shifted by as much less, so that they stay on the grid's zero.
    """
    left = weight - B[:, :-1] @ A[:-1]
    squares, with_last = left.square(), (left - B[:, -1:] @ A[-1:]).square()
    if with_last.sum() <= EVEN * squares.sum():
        return B, A
    rows, columns = (squares.mean(dim, keepdim=True).sqrt() for dim in (1, 0))
    return torch.cat([B[:, :-1], -rows / 2], 1), torch.cat([A[:-1], columns / columns.mean()])


def size_left(weight: Tensor, gram: Tensor, ranks: Sequence[int]) -> Tensor:
    """By rank: `‖W − B A‖² / ‖W‖²` with the first factors, `(ranks,)` float64. What a round leaves of the error goes with it.

    weight: `(out, in)`, with outputs that count alike. ranks: 1 to `min(out, in)`.
    """
    weight = weight.float()
    vectors = lowrank.top_eigenvectors(weight, _shrunk(gram), max(ranks)).vectors
    taken = (vectors.to(weight.dtype).T @ weight).double().square().sum(1).cumsum(0)
    whole = float(weight.double().square().sum())
    return torch.tensor([max(0.0, 1.0 - share(float(taken[rank - 1]), whole)) for rank in ranks], dtype=torch.float64)


def _shrunk(gram: Tensor) -> Tensor:
    """`G + SHRINKAGE · tr(G)/in · I`."""
    shrunk = gram.float().clone()
    shrunk.diagonal().add_(SHRINKAGE * float(shrunk.diagonal().mean(dtype=torch.float64)))
    return shrunk
