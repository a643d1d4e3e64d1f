"""Every numerical policy of cloq in one place: the weighted low-rank solve, error norms, and the damped Cholesky factorization.

**The low-rank problem.** Given an error `E (out, in)` and a Gram matrix `G = S Sᵀ (in, in)`, find the rank-r `X` that minimises
`‖(E − X) S‖_F²`. Let `V (out, r)` hold the top-r eigenvectors of `M = E G Eᵀ`. Then `X = V Vᵀ E` is optimal and what remains is the sum
of the discarded eigenvalues of `M`. (By Eckart-Young the best `X S` is the rank-r truncation of `E S = V σ Pᵀ`, which is `V Vᵀ E S`;
`V Vᵀ E` attains it.) No root of `G`, no inverse and no damping are needed, so a rank-deficient `G` is as good as any other.
This is the optimum of CLoQ, arXiv:2501.18475, Theorem 3.1, reached on another path: the paper takes `R = Σ^{1/2} Uᵀ` from an
eigendecomposition of `G`, an SVD of `R Eᵀ`, and `R⁻¹`.

`M` is never formed for large layers: block Lanczos needs only products with `E` and `G`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EXACT_BELOW = 128
"""Layers whose smaller side is at most this are solved by a dense float64 eigendecomposition: nothing is gained by iterating."""

KRYLOV_TOLERANCE = 1e-4
"""The iteration stops when one more block lowers the remaining error by less than this fraction of it."""

KRYLOV_MAX_BLOCKS = 12
"""The largest Krylov basis, in blocks of rank + oversampling vectors, before it restarts from its best vectors."""


class TopEigen(NamedTuple):
    """vectors `(out, r)`, orthonormal; values `(r,)` descending, float64; trace: sum of all eigenvalues, so the remainder is known."""

    vectors: Tensor
    values: Tensor
    trace: float


class DampedCholesky(NamedTuple):
    """factor: upper triangular `U (in, in)` with `Uᵀ U = (G + λ I)⁻¹`; damping: λ over the mean of `diag(G)`."""

    factor: Tensor
    damping: float


def gram_norm2(matrix: Tensor, gram: Tensor) -> float:
    """`‖X S‖_F² = trace(X G Xᵀ)` for `X (out, in)`, `G = S Sᵀ (in, in)`; the sum is taken in float64."""
    return max(0.0, float(((matrix @ gram.to(matrix.dtype)) * matrix).sum(dtype=torch.float64)))


def relative_error(error: Tensor, weight: Tensor, gram: Tensor) -> float:
    """`‖E S‖² / ‖W S‖²`; 0 where both vanish, as for a layer that never saw a non-zero input."""
    reference = gram_norm2(weight, gram)
    return gram_norm2(error, gram) / reference if reference > 0 else 0.0


def top_eigenvectors(error: Tensor, gram: Tensor, rank: int) -> TopEigen:
    """Top eigenvectors of `M = E G Eᵀ`, `(out, out)`, without forming it where it is large.

    `rank` must not exceed `min(out, in)`. Small layers and ranks near the full one are solved exactly in float64. Otherwise the
    iteration multiplies in float64 on the CPU and on devices that have it, in float32 elsewhere.
    """
    small = min(error.shape)
    if small <= EXACT_BELOW or 3 * rank >= small:
        return _top_eigenvectors_exact(error, gram, rank)
    return _top_eigenvectors_krylov(error, gram, rank)


def _top_eigenvectors_exact(error: Tensor, gram: Tensor, rank: int) -> TopEigen:
    error, gram = _wide(error), _wide(gram)
    if error.shape[0] <= error.shape[1]:
        basis, core = None, error @ gram @ error.T
    else:  # E = basis · R, and M = basis (R G Rᵀ) basisᵀ has its whole range there
        basis, triangle = torch.linalg.qr(error)
        core = triangle @ gram @ triangle.T
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)[:, :rank]
    return TopEigen(vectors if basis is None else basis @ vectors, values[:rank], float(values.sum()))


def _top_eigenvectors_krylov(error: Tensor, gram: Tensor, rank: int) -> TopEigen:
    """Block Lanczos with full reorthogonalization and Rayleigh-Ritz; restarts from the best vectors when the basis is full.

    One step costs `2 k (2·out·in + in²)` operations for `k = rank + oversampling` vectors. The starting block is a fixed pseudo-random
    one, so that equal inputs give equal factors.
    """
    error, gram = _wide(error), _wide(gram)
    out = error.shape[0]

    def times_m(vectors: Tensor) -> Tensor:
        return error @ (gram @ (error.T @ vectors))

    trace = float(((error @ gram) * error).sum(dtype=torch.float64))
    width = min(rank + max(8, rank // 8), out)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(error.shape[1], width, generator=generator, dtype=torch.float32).to(error)
    block = torch.linalg.qr(error @ (gram @ start)).Q  # one multiplication ahead of a random block in the output space
    basis, images = block, times_m(block)
    captured = 0.0
    while True:
        values, rotation = torch.linalg.eigh(_symmetric(basis.T @ images))
        top = values.flip(0)[:rank].clamp_min(0)
        energy = float(top.sum())
        remaining = max(trace - energy, 0.0)
        converged = energy - captured <= KRYLOV_TOLERANCE * remaining or remaining <= 1e-12 * trace
        if converged or basis.shape[1] + width > out:
            return TopEigen(basis @ rotation.flip(1)[:, :rank], top, trace)
        captured = energy
        block = _orthonormal_complement(images[:, -width:], basis)
        if basis.shape[1] >= KRYLOV_MAX_BLOCKS * width:
            keep = rotation.flip(1)[:, :width]
            basis, images = basis @ keep, images @ keep
            block = _orthonormal_complement(block, basis)
        basis = torch.cat([basis, block], dim=1)
        images = torch.cat([images, times_m(block)], dim=1)


def _orthonormal_complement(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal basis of `block` after removing its part in `basis`; projected twice, which is enough (Kahan, Parlett)."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.T @ block)).Q
    return block


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _wide(tensor: Tensor) -> Tensor:
    """float64 where the device has it."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation of `(out, in)` in the Frobenius norm as `B (out, r)`, `A (r, in)` with `BᵀB = A Aᵀ`."""
    u, s, vt = torch.linalg.svd(_wide(matrix), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).to(matrix.dtype), (root[:, None] * vt[:rank]).to(matrix.dtype)


def balance(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the singular values shared: `BᵀB = A Aᵀ`. Costs one thin QR of each factor and an `(r, r)` SVD."""
    qb, rb = torch.linalg.qr(_wide(B))
    qa, ra = torch.linalg.qr(_wide(A).T)
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    root = s.sqrt()
    return (qb @ (u * root)).to(B.dtype), ((root[:, None] * vt) @ qa.T).to(A.dtype)


def inverse_cholesky(gram: Tensor, damping: float, attempts: int = 8) -> DampedCholesky:
    """Upper triangular `U` with `Uᵀ U = (G + λ I)⁻¹`, `λ = damping · mean(diag G)`, float32 in and out.

    Eq. for GPTQ, arXiv:2210.17323 §3.3 step 3. One Cholesky factorization of the index-reversed matrix and one triangular inverse give
    it directly (`J G J = L Lᵀ`, `U = J L⁻¹ J`), so no inverse is ever formed and factorized again.

    Where the factorization fails the damping is raised tenfold from at least 1e-4, at most `attempts` times; the damping that succeeded
    is returned and belongs in the report. Raises `ValueError` if none does or the Gram matrix is not finite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the Gram matrix holds NaN or Inf")
    mean = float(gram.diagonal().mean(dtype=torch.float64))
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    if mean <= 0:
        return DampedCholesky(identity, damping)
    for _ in range(attempts):
        lower, info = torch.linalg.cholesky_ex((gram + (damping * mean) * identity).flip(0, 1))
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            if bool(torch.isfinite(inverse).all()):
                return DampedCholesky(inverse.flip(0, 1), damping)
        damping = max(10 * damping, 1e-4)
    raise ValueError(f"Cholesky factorization failed up to a relative damping of {damping / 10:g}; the Gram matrix is not one")


def largest_eigenvalue(gram: Tensor, iterations: int = 50, tolerance: float = 1e-4) -> float:
    """λmax of a positive semi-definite `(in, in)` matrix by power iteration from a fixed start; an estimate from below."""
    vector = torch.randn(gram.shape[0], generator=torch.Generator().manual_seed(0)).to(gram)
    value = 0.0
    for _ in range(iterations):
        image = gram @ (vector / vector.norm().clamp_min(1e-30))
        previous, value = value, float(image.norm())
        if value == 0 or abs(value - previous) <= tolerance * value:
            break
        vector = image
    return value
