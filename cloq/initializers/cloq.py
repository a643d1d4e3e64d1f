"""CLoQ: the factors that best undo a quantized layer's output error on the calibration data, in closed form.

Deng et al., arXiv:2501.18475, Theorem 3.1. For `E = W − Q` and the Gram matrix `G = S Sᵀ` of the layer's inputs it minimises
`‖(E − B A) S‖_F²` over all `B A` of the given rank. With `V` the top eigenvectors of `E G Eᵀ` the optimum is `B A = V Vᵀ E`
(`lowrank` says why), found here without the paper's root, inverse and damping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cloq import lowrank
from cloq.linalg import all_finite
from cloq.precision import full_precision
from cloq.quantizers.descent import descend
from cloq.types import AnyQuantizedWeight, LayerStats, LoraFactors, Quantize, QuantizedWeight

SPLITS = ("paper", "balanced")

KEPT = 0.1
"""Share of the Gram matrix that is kept along the directions that the factors will undo. None at all lets the codes drift there."""


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
    B, A = vectors, vectors.to(error.dtype).T @ weighted
    if roots is not None:
        B = B / roots
    if split == "balanced":
        B, A = lowrank.share_steps(B, A, gram)
    elif roots is not None:
        B, triangle = torch.linalg.qr(B)
        A = triangle.to(A.dtype) @ A
    remaining = 0.0 if rank == min(error.shape) else max(total - float(values.sum()), 0.0)
    return ClosedForm(LoraFactors(A.float(), B.float()), remaining, total, values)


def _roots(outputs: Tensor | None, like: Tensor) -> Tensor | None:
    """`D^{1/2}` as a column, `(out, 1)`."""
    return None if outputs is None else outputs.to(like).sqrt()[:, None]


@dataclass(frozen=True)
class Cloq:
    """Quantize, fit the factors to the error in closed form, and choose the codes again for what the factors will undo.

    split: see `closed_form`.
    rounds: how often the codes are chosen again; 0 is the paper's method.

    **A round.** Whatever the codes are, factors with these rows `A` can take away all of the error that lies in the directions of
    `A S`; the best `B` leaves `‖(W − Q) S‖²` without them, which is the norm with the Gram matrix `lowrank.deflate(G, A)`. So the
    quantizer gets that matrix, deflated to a share `KEPT`, and the target `W − B A`. Integer codes are then improved one by one
    (`quantizers.descend`), and the factors follow them by two orthogonal steps, which serve the next round as well as the optimum
    would. The codes with the least error are the result, with the closed form's factors, so that no number of rounds is worse on the
    calibration data than none. The base alone gets worse: it is made for its factors.

    **Outputs that count more** (`stats.outputs`) are the factors' alone: a quantizer treats every row by itself, so that a weight of the
    row changes none of its codes; the factors choose which rows' errors to undo. Errors are compared with the weights.
    """

    split: str = "paper"
    rounds: int = 0

    def initialize(self, weight: Tensor, stats: LayerStats, quantize: Quantize, rank: int) -> tuple[AnyQuantizedWeight, LoraFactors]:
        """Raises `ValueError` for a rank above `min(weight.shape)`."""
        lowrank.check_rank(rank, weight.shape)
        weight = weight.detach().float()
        codes = quantize(weight, stats)
        if self.rounds and rank < min(weight.shape):  # at full rank there is no error left
            codes = self._chosen_again(codes, weight, stats, quantize, rank)
        return codes, closed_form(weight - codes.dequantize(), stats.gram, rank, self.split, stats.outputs).factors

    def _chosen_again(
        self, first: AnyQuantizedWeight, weight: Tensor, stats: LayerStats, quantize: Quantize, rank: int
    ) -> AnyQuantizedWeight:  # fmt: skip
        """The codes of the best round; the split has no part in them."""
        roots, best = _roots(stats.outputs, weight), first
        fitted = closed_form(weight - first.dequantize(), stats.gram, rank, outputs=stats.outputs)
        B, A, least = fitted.factors.B, fitted.factors.A, fitted.error
        for _ in range(self.rounds):
            target = weight - B @ A
            corrected = LayerStats(lowrank.deflate(stats.gram, A, KEPT), stats.n_tokens)
            quantized = quantize(target, corrected)
            if isinstance(quantized, QuantizedWeight):
                quantized = descend(quantized, target, corrected.gram)
            left = weight - quantized.dequantize()
            if roots is None:
                B, A, error = lowrank.follow(left, stats.gram, B)
            else:
                B, A, error = lowrank.follow(roots * left, stats.gram, roots * B)
                B = B / roots
            if error < least:
                best, least = quantized, error
        return best
