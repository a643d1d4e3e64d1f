"""The weighted low-rank solve: what the factors can undo, in which norm, and what is left to the codes.

**The low-rank problem.** Given an error `E (out, in)` and a Gram matrix `G = S Sᵀ (in, in)`, find the rank-r `X` that minimises
`‖(E − X) S‖_F²`. Let `V (out, r)` hold the top-r eigenvectors of `M = E G Eᵀ`. Then `X = V Vᵀ E` is optimal and what remains
is the sum of the discarded eigenvalues of `M`. (By Eckart-Young the best `X S` is the rank-r truncation of `E S = V σ Pᵀ`,
which is `V Vᵀ E S`; `V Vᵀ E` attains it.) No root of `G`, no inverse and no damping are needed, so a rank-deficient `G` is as
good as any other. This is the optimum of CLoQ, arXiv:2501.18475, Theorem 3.1, reached on another path: the paper takes `R =
Σ^{1/2} Uᵀ` from an eigendecomposition of `G`, an SVD of `R Eᵀ`, and `R⁻¹`.

`M` is never formed for large layers: block Lanczos needs only products with `E` and `G`.

**Precision.** A float32 `E` is solved in float32, which loses nothing as long as what remains is not a small part of large sums; that is
measured (`_float32_holds`), and where it fails all is done again in float64. An `E` in float64 is solved in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cloq.algebra.linalg import symmetric

EXACT_BELOW = 128
"""Layers whose smaller side is at most this are solved by a dense eigendecomposition: nothing is gained by iterating."""

EXACT_SHARE = 0.1
"""So are ranks of more than this share of the smaller side: the iteration would build a basis that is as large as the problem."""

FLOAT32_SHARE = 1e-2
"""Of the whole, that what remains must hold for float32: its products are good to about 1e-6 of the whole, so what remains to 1e-4."""

FLOAT32_TOLERANCE = 3e-4
"""Of what remains, that float32's rounding of `E G` may be worth at most."""

PROBES = 8
"""Rows of `E G` that are computed in float64 as well, to see how far off float32's are."""

WIDENED = 1 << 16
"""Values that are widened to float64 at a time for those."""

UNREACHED = 1e-9
"""Of the largest `Σ h_k²`, below which a term's is rounding."""

NO_DIRECTION = 1e-20
"""Of the largest `Σ h_k²`, below which a row of `A` has no direction beside the largest one's in float64."""

KRYLOV_TOLERANCE = 1e-4
"""The iteration stops when all blocks that could follow would lower the remaining error by less than this fraction of it."""

KRYLOV_MAX_BLOCKS = 8
"""The largest Krylov basis, in blocks of rank + oversampling vectors, before it restarts from its best vectors. At least 4."""

SETTLED = 1e-4
"""Share of what remains that the last step of an iteration from near vectors may have taken off it for these to be the answer."""

GRAM_PANEL = 2048
"""Columns of the Gram matrix that are widened to float64 at a time: a large one is never held twice."""


class TopEigen(NamedTuple):
    """vectors: `(out, r)`, orthonormal, float64. values: `(r,)`, descending, float64. trace: sum of all eigenvalues.

    slack: what the rounding of `E G` may have added to or taken from any sum of eigenvalues, 0 in float64.
    """

    vectors: Tensor
    values: Tensor
    trace: float
    slack: float = 0.0


def check_rank(rank: int, shape: tuple[int, int]) -> None:
    """Raises `ValueError` unless `1 <= rank <= min(out, in)`. Callers clip what a user asked for, and report that they did."""
    if not 1 <= rank <= min(shape):
        raise ValueError(f"the rank must be 1 to {min(shape)} for a layer of shape {tuple(shape)}, got {rank}")


def top_eigenvectors(error: Tensor, gram: Tensor | None, rank: int) -> TopEigen:
    """Top eigenvectors of `M = E G Eᵀ`, `(out, out)`, without forming it where it is large.

    gram: `(in, in)`; `(in,)` for a diagonal; `None` for the identity, where the result are the left singular vectors of `E`.
    rank: raises `ValueError` above `min(out, in)`, see `check_rank`.

    Small layers and large ranks are solved exactly, others by iteration; either within a thousandth of what the optimum leaves. A float64
    error and small layers are solved in float64, others in float32 where that suffices, and always where the device has no float64.
    """
    check_rank(rank, error.shape)
    small = min(error.shape)
    exactly = small <= EXACT_BELOW or rank > EXACT_SHARE * small
    solve = _top_eigenvectors_exact if exactly else _top_eigenvectors_krylov
    if error.dtype != torch.float64 and (small > EXACT_BELOW or error.device.type == "mps"):
        found = solve(error.float(), gram, rank)
        if error.device.type == "mps" or _float32_holds(found, rank < small):
            return found
    return solve(error.double(), gram, rank)


def _float32_holds(found: TopEigen, rest: bool) -> bool:
    """Whether a float32 solution's `trace − Σ values` is large enough to be known. rest: something remains, whatever the numbers say."""
    remaining = found.trace - float(found.values.sum())
    return found.trace == 0 or (rest and remaining >= FLOAT32_SHARE * found.trace and found.slack <= FLOAT32_TOLERANCE * remaining)


def _known_share(error: Tensor) -> float:
    """The smallest share of the whole that is worth resolving in the dtype of `E`."""
    if error.dtype == torch.float64:
        return 1e-12
    return 1e-6 if error.device.type == "mps" else FLOAT32_SHARE


def _times_gram(matrix: Tensor, gram: Tensor | None) -> Tensor:
    """`X G` for `X (rows, in)` and the three forms of `G`, in the dtype of `X`."""
    if gram is None:
        return matrix
    if gram.ndim == 1:
        return matrix * gram.to(matrix.dtype)
    if gram.dtype == matrix.dtype:
        return matrix @ gram
    panels = (gram[:, start : start + GRAM_PANEL] for start in range(0, gram.shape[1], GRAM_PANEL))
    return torch.cat([matrix @ panel.to(matrix.dtype) for panel in panels], dim=1)


def _rounding_slack(error: Tensor, weighted: Tensor, gram: Tensor | None) -> float:
    """A bound of what rounding in `Y = E G` does to any sum of eigenvalues of `Y Eᵀ`: `‖ΔY‖ ‖E‖`.

    `‖ΔY‖` is taken to be the share of `‖E‖` that it is in the largest rows of `E`, whose products are repeated in float64.
    """
    if gram is None or error.dtype == torch.float64 or error.device.type == "mps":
        return 0.0
    norms = torch.linalg.vector_norm(error, dim=1)
    rows = norms.topk(min(PROBES, len(norms))).indices
    exact = error[rows].double()
    off = (_times_wide(exact, gram) if gram.ndim == 2 else exact * gram) - weighted[rows]
    largest = float(exact.norm())
    return float(off.norm()) / largest * float(norms.square().sum(dtype=torch.float64)) if largest else 0.0


def _times_wide(few: Tensor, matrix: Tensor) -> Tensor:
    """`X M` in the dtype of `X (few, rows)`; the matrix is widened panel by panel, each small enough for a core's own cache."""
    step = max(16, WIDENED // matrix.shape[1])
    panels = range(0, matrix.shape[0], step)
    return sum(few[:, start : start + step] @ matrix[start : start + step].to(few.dtype) for start in panels)


def _top_eigenvectors_exact(error: Tensor, gram: Tensor | None, rank: int) -> TopEigen:
    basis = None
    weighted = _times_gram(error, gram)
    slack = _rounding_slack(error, weighted, gram)
    if error.shape[0] > error.shape[1]:  # E = basis · R, and M = basis (R G Rᵀ) basisᵀ has its whole range there
        basis, error = torch.linalg.qr(error)
        weighted = basis.T @ weighted
    values, vectors = torch.linalg.eigh(symmetric(weighted @ error.T))
    vectors = vectors.flip(1)[:, :rank]
    trace = float(values.sum(dtype=torch.float64))
    vectors, top = _rayleigh_ritz(vectors, weighted, error)
    return TopEigen(vectors if basis is None else basis.to(vectors.dtype) @ vectors, top, trace, slack)


def _top_eigenvectors_krylov(error: Tensor, gram: Tensor | None, rank: int) -> TopEigen:
    """Block Lanczos with full reorthogonalization and Rayleigh-Ritz; restarts from the best vectors when the basis is full.

    `E G` is formed once, since the trace needs it; one step then costs `4 k · out · in` operations for `k = rank +
    oversampling` vectors. The starting block is a fixed pseudo-random one, so that equal inputs give equal factors. Four to
    seven blocks are usual.
    """
    weighted = _times_gram(error, gram)
    slack = _rounding_slack(error, weighted, gram)
    trace = float((weighted * error).sum(dtype=torch.float64))
    unknown = max(_known_share(error) * trace, slack / FLOAT32_TOLERANCE)  # less than this remains: float64 is needed, or all is done
    width = min(rank + max(8, rank // 8), *error.shape)
    out = error.shape[0]
    most = min(KRYLOV_MAX_BLOCKS * width, out)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(error.shape[1], width, generator=generator, dtype=torch.float32).to(error)
    block = torch.linalg.qr(weighted @ start).Q  # one multiplication ahead of a random block in the output space
    basis, images = block, weighted @ (error.T @ block)
    core = symmetric(basis.T @ images)
    energy, gain = 0.0, 0.0
    while True:
        values, rotation = torch.linalg.eigh(core)
        top = values[-rank:].clamp_min(0)
        previous, gain, energy = gain, float(top.sum(dtype=torch.float64)) - energy, float(top.sum(dtype=torch.float64))
        remaining = max(trace - energy, 0.0)
        converged = remaining <= unknown or basis.shape[1] == out
        if not converged and basis.shape[1] >= 3 * width:  # the gains at the start, and after a restart, say little
            converged = _still_to_gain(gain, previous) <= KRYLOV_TOLERANCE * remaining
        if converged:
            vectors, values = _rayleigh_ritz(basis @ rotation[:, -rank:], weighted, error)
            return TopEigen(vectors, values, trace, slack)
        block = images[:, -width:]
        if basis.shape[1] == most:
            best = rotation[:, -width:]
            basis, images, core = basis @ best, images @ best, torch.diag(values[-width:])
        block = _orthonormal_complement(block[:, : most - basis.shape[1]], basis)
        image = weighted @ (error.T @ block)
        side = basis.T @ image
        core = torch.cat([torch.cat([core, side], dim=1), torch.cat([side.T, symmetric(block.T @ image)], dim=1)])
        basis, images = torch.cat([basis, block], dim=1), torch.cat([images, image], dim=1)


def _rayleigh_ritz(vectors: Tensor, weighted: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """The space of `vectors (out, r)` as eigenvectors of `M = Y Eᵀ` within it, and their values, descending. Orthonormal to float64."""
    vectors = torch.linalg.qr(_wide(vectors)).Q
    left, right = (_wide(vectors.to(matrix.dtype).T @ matrix) for matrix in (weighted, error))
    values, rotation = torch.linalg.eigh(symmetric(left @ right.T))
    return vectors @ rotation.flip(1), values.flip(0).clamp_min(0)


def _still_to_gain(gain: float, previous: float) -> float:
    """The sum of all gains to come if they fall as the last two did: `gain · (ratio + ratio² + …)`. In truth they fall faster."""
    if gain <= 0:
        return 0.0
    ratio = min(gain / max(previous, gain), 0.99)
    return gain * ratio / (1 - ratio)


def _orthonormal_complement(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal basis of `block` after removing its part in `basis`; projected twice, which is enough (Kahan, Parlett)."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block


def _wide(tensor: Tensor) -> Tensor:
    """float64 where the device has it."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def low_rank(error: Tensor, gram: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """`B (out, r)`, `A (r, in)`, balanced and in the dtype of `error`: the rank-r `B A` that minimises `‖(E − B A) S‖_F²`.

    gram: in one of the forms that `top_eigenvectors` takes; `None` gives the truncated SVD.
    """
    error = error if error.dtype == torch.float64 else error.float()
    vectors = top_eigenvectors(error, gram, rank).vectors
    B, A = balance(vectors, vectors.to(error.dtype).T @ error)
    return B.to(error.dtype), A.to(error.dtype)


class Followed(NamedTuple):
    """B: `(out, r)`, orthonormal. A: `(r, in)`, `Bᵀ E`. remaining: `‖(E − B A) S‖²`. gained: what the last step took off it."""

    B: Tensor
    A: Tensor
    remaining: float
    gained: float

    @property
    def settled(self) -> bool:
        """Whether these are the top eigenvectors, as far as anyone can tell from what remains."""
        return 0.0 <= self.remaining < math.inf and self.gained <= SETTLED * self.remaining


def follow(error: Tensor, gram: Tensor, vectors: Tensor, steps: int = 2) -> Followed:
    """Orthogonal iteration from known vectors towards the top eigenvectors of `M = E G Eᵀ`: `B = orth(M … M V)`, `A = Bᵀ E`.

    vectors: `V (out, r)`, of any length; those of an error much like this one. steps: at least 2. Each is two products with a thin matrix,
    where the optimum takes a decomposition. What remains is summed from itself, not as a difference of large sums.
    """
    error = error if error.dtype == torch.float64 else error.float()
    weighted = _times_gram(error, gram)
    A = vectors.to(error.dtype).T @ error
    taken = []
    for step in range(steps):
        B = torch.linalg.qr(weighted @ A.T).Q
        A = B.T @ error
        if step >= steps - 2:
            image = B.T @ weighted
            taken.append(float((image * A).sum(dtype=torch.float64)))
    remaining = weighted.sub_(B @ image).mul_(error - B @ A)
    return Followed(B, A, max(float(remaining.sum(dtype=torch.float64)), 0.0), taken[1] - taken[0])


def as_eigenvectors(B: Tensor, A: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with B's columns turned within their space, so that `A G Aᵀ` is diagonal, the largest term first: as eigenvectors
    of `M = E G Eᵀ` where B spans the space of the top ones.

    B: `(out, r)`, orthonormal. A: `(r, in)`, `Bᵀ E`.
    """
    core = symmetric(_wide(_times_gram(A, gram)) @ _wide(A).T)
    rotation = torch.linalg.eigh(core).eigenvectors.flip(1)
    return (_wide(B) @ rotation).to(B.dtype), (rotation.T @ _wide(A)).to(A.dtype)


def balance(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the singular values shared: `BᵀB = A Aᵀ`. Costs one thin QR of each factor and an `(r, r)` SVD."""
    qb, rb = torch.linalg.qr(_wide(B))
    qa, ra = torch.linalg.qr(_wide(A).T)
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    root = s.sqrt()
    return (qb @ (u * root)).to(B.dtype), ((root[:, None] * vt) @ qa.T).to(A.dtype)


def share_steps(B: Tensor, A: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, each of its r terms scaled so that training moves the layer's outputs as far through `B` as through `A`.

    An optimizer such as Adam moves every entry by about the learning rate η, whatever the entry's size. With `h = A x` and signs at
    random, moving `B`'s column k changes the outputs by `η² · out · ⟨h_k²⟩` in mean square, and moving `A`'s row k by
    `η² · ⟨‖x‖²⟩ · ‖b_k‖²`. `b_k · c` and `a_k / c` with `c⁴ = out · ⟨h_k²⟩ / (⟨‖x‖²⟩ ‖b_k‖²)` make both alike, and their sum the least.

    B: `(out, r)`. A: `(r, in)`. gram: `(in, in)`, of any scale. A term that the inputs do not reach is scaled like the one that they reach
    the least; without any inputs all stay as they are.
    """
    rows = _wide(A)
    reached = (_times_gram(rows, gram) * rows).sum(1).clamp_min(0)  # Σ h_k²
    sizes = _wide(B).square().sum(0)
    inputs = float(gram.diagonal().sum(dtype=torch.float64))
    ratios = B.shape[0] * reached / (inputs * sizes)
    held = torch.isfinite(ratios) & (reached > UNREACHED * reached.max())
    if not bool(held.any()):
        return B, A
    scales = torch.where(held, ratios, ratios[held].min()).pow(0.25)
    return (B * scales).to(B.dtype), (A / scales[:, None]).to(A.dtype)


def deflate(gram: Tensor, rows: Tensor, kept: float = 0.0) -> Tensor:
    """`G − (1 − kept) · G Aᵀ (A G Aᵀ)⁺ A G` for `G (in, in)`, `A (r, in)`: what is left of `G` once `B A` may take what it can.

    With `kept = 0`, `trace(E G' Eᵀ) = min over B of ‖(E − B A) S‖²`, the least-squares residual. Positive semi-definite for `kept` in
    0 … 1. Directions of `A S` below 1e-6 of the largest (squared) are left in.
    """
    rows = _wide(rows)
    weighted = _times_gram(rows, gram)
    reached = (weighted * rows).sum(1, keepdim=True)
    known = (reached > NO_DIRECTION * reached.max()).to(rows.dtype)  # others are rounding beside it, and stop a decomposition
    rows, weighted = known * rows, known * weighted
    values, vectors = torch.linalg.eigh(symmetric(weighted @ rows.T))
    held = values > 1e-6 * values[-1].clamp_min(0)
    directions = ((vectors[:, held] / values[held].sqrt()).T @ weighted).to(gram.dtype)
    return symmetric(torch.addmm(gram, directions.T, directions, alpha=kept - 1.0))
