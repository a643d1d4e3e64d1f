"""Norms, shares, and the damped Cholesky factorization: the numerical policies that quantizers and reports share.

The low-rank solve has its own module, `lowrank`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

NORM_PANEL = 192
"""Columns that `gram_norm2` takes at a time; from 96 to 288 there is no difference."""


class DampedCholesky(NamedTuple):
    """factor: upper triangular `R (in, in)` with `R Rᵀ = G + λ I`; damping: λ over the mean of `diag(G)`."""

    factor: Tensor
    damping: float


def gram_norm2(matrix: Tensor, gram: Tensor) -> float:
    """`‖X S‖_F² = trace(X G Xᵀ)` for `X (out, in)`, `G = S Sᵀ (in, in)`; the last sum is taken in float64.

    By panels of columns, and since `G` is symmetric only with its upper triangle: little more than half the operations of `X G`.
    """
    total = torch.zeros((), dtype=torch.float64, device=matrix.device)
    for start in range(0, matrix.shape[1], NORM_PANEL):
        here = slice(start, start + NORM_PANEL)
        weighted = matrix[:, here] @ gram[here, here].to(matrix.dtype)
        if start:
            weighted.addmm_(matrix[:, :start], gram[:start, here].to(matrix.dtype), alpha=2.0)
        total += weighted.mul_(matrix[:, here]).sum(dtype=torch.float64)
    return max(0.0, float(total))


def relative_error(error: Tensor, weight: Tensor, gram: Tensor) -> float:
    """`‖E S‖² / ‖W S‖²`; 0 where both vanish, as for a layer that never saw a non-zero input."""
    return share(gram_norm2(error, gram), gram_norm2(weight, gram))


def share(part: float, whole: float) -> float:
    """`part / whole`, 0 of nothing."""
    return part / whole if whole > 0 else 0.0


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T).div_(2)


def all_finite(matrix: Tensor) -> bool:
    """Whether there is no NaN and no Inf in it. By its extremes, which NaN passes through: forty times faster than asking every element,
    and no tensor of its size."""
    return matrix.numel() == 0 or bool(torch.stack(torch.aminmax(matrix)).isfinite().all())


def damped_cholesky(gram: Tensor, damping: float, attempts: int = 8) -> DampedCholesky:
    """Upper triangular `R` with `R Rᵀ = G + λ I`, `λ = damping · mean(diag G)`, float32 in and out.

    The lower factor of the index-reversed matrix, reversed back: `J (G + λ I) J = L Lᵀ`, `R = J L J`. It is the inverse of what GPTQ
    (arXiv:2210.17323, §3.3 step 3) calls the Cholesky form: `U = R⁻¹` has `Uᵀ U = (G + λ I)⁻¹`.

    Where the factorization fails the damping is raised tenfold from at least 1e-4, at most `attempts` times; the damping that
    succeeded is returned and belongs in the report. Raises `ValueError` if none does or the Gram matrix is not finite.
    """
    if not all_finite(gram):
        raise ValueError("the Gram matrix holds NaN or Inf")
    mean = float(gram.diagonal().mean(dtype=torch.float64))
    if mean <= 0:
        return DampedCholesky(torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device), damping)
    for _ in range(attempts):
        reversed_ = gram.flip(0, 1)
        reversed_.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(reversed_)
        if int(info) == 0 and all_finite(lower):
            return DampedCholesky(lower.flip(0, 1), damping)
        damping = max(10 * damping, 1e-4)
    raise ValueError(f"Cholesky factorization failed up to a relative damping of {damping / 10:g}; the Gram matrix is not one")


def largest_eigenvalue(gram: Tensor, steps: int = 24) -> float:
    """λmax of a positive semi-definite `(in, in)` matrix by Lanczos from a fixed start: from below, usually within 0.1 %."""
    gram, scale = scaled(gram.float())
    vector = torch.randn(gram.shape[0], generator=torch.Generator().manual_seed(0)).to(gram)
    basis = (vector / vector.norm())[:, None]
    images = gram @ basis
    for _ in range(min(steps, gram.shape[0]) - 1):
        following = images[:, -1:]
        for _ in range(2):
            following = following - basis @ (basis.T @ following)
        norm = float(following.norm())
        if norm <= 1e-6 * float(images[:, -1].norm()):  # an invariant subspace: nothing new to see
            break
        basis = torch.cat([basis, following / norm], dim=1)
        images = torch.cat([images, gram @ basis[:, -1:]], dim=1)
    return scale * float(torch.linalg.eigvalsh(symmetric(basis.T @ images).double())[-1].clamp_min(0))


def scaled(gram: Tensor) -> tuple[Tensor, float]:
    """`(G / s, s)` with `s` a power of two near the largest diagonal entry, where squares of what `G` holds would leave float32; else
    `(G, 1)`. A power of two changes no digit."""
    peak = float(gram.diagonal().max())
    if peak <= 0 or 1e-16 < peak < 1e16:
        return gram, 1.0
    scale = 2.0 ** math.frexp(peak)[1]
    return (gram.double() / scale).float(), scale
