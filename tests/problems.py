"""Layers to solve, made on the spot: every way in which a Gram matrix or a weight can be awkward.

A problem is a weight and the inputs that the layer saw. Weights are never square, so that a transposed one cannot pass unseen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cloq.types import LayerStats

SHAPES = {"wide": (40, 72), "tall": (88, 48)}
"""Small enough for the exact route of the low-rank solve."""

LARGE_SHAPES = {"wide": (144, 250), "tall": (260, 150)}
"""Large enough for the iterative route, up to rank 14."""


class Problem(NamedTuple):
    """weight: `(out, in)` float32. inputs: `(tokens, in)` float32."""

    weight: Tensor
    inputs: Tensor

    @property
    def gram(self) -> Tensor:
        """As calibration makes it: one float32 product."""
        return self.inputs.T @ self.inputs

    @property
    def stats(self) -> LayerStats:
        return LayerStats(self.gram, len(self.inputs))


def _well_conditioned(x: Tensor) -> Tensor:
    return x


def _power_law(x: Tensor) -> Tensor:
    """Correlated inputs with energies that fall as 1/i², as activations do."""
    n = x.shape[1]
    mix = torch.randn(n, n, generator=torch.Generator().manual_seed(3)) / n**0.5
    return (x / torch.arange(1, n + 1)) @ mix


def _rank_deficient(x: Tensor) -> Tensor:
    return x[: x.shape[1] // 3]


def _one_token(x: Tensor) -> Tensor:
    return x[:1]


def _outlier_channel(x: Tensor) -> Tensor:
    """One input is a thousand times larger than the others, and correlated with two of them."""
    x = x.clone()
    x[:, 5] = 1000 * (x[:, 5] + 0.3 * x[:, 6] - 0.3 * x[:, 11])
    return x


def _dead_channels(x: Tensor) -> Tensor:
    """A seventh of the inputs is always zero."""
    x = x.clone()
    x[:, ::7] = 0
    return x


def _outlier_and_dead(x: Tensor) -> Tensor:
    return _dead_channels(_outlier_channel(x))[: x.shape[1] // 2]


def _collinear(x: Tensor) -> Tensor:
    """Every input comes twice."""
    return x[:, torch.arange(x.shape[1]) // 2]


def _tiny(x: Tensor) -> Tensor:
    return 1e-5 * x


def _mostly_constant(x: Tensor) -> Tensor:
    """A mean that dwarfs the variation: one eigenvalue holds nearly everything."""
    return 30 + 0.1 * x


KINDS = {
    "well conditioned": _well_conditioned,
    "power law": _power_law,
    "rank deficient": _rank_deficient,
    "one token": _one_token,
    "outlier channel": _outlier_channel,
    "dead channels": _dead_channels,
    "outlier and dead": _outlier_and_dead,
    "collinear": _collinear,
    "tiny": _tiny,
    "mostly constant": _mostly_constant,
}
"""What the inputs of a layer can be like."""


def problem(kind: str, shape: tuple[int, int], seed: int = 0) -> Problem:
    """The problem of a kind and shape; equal arguments give equal tensors. The weight has heavy tails, as trained ones have."""
    out, columns = shape
    generator = torch.Generator().manual_seed(1000 + seed)
    weight = 0.02 * torch.randn(out, columns, generator=generator)
    weight[torch.rand(out, columns, generator=generator) < 0.01] *= 6
    inputs = torch.randn(5 * columns, columns, generator=generator)
    return Problem(weight, KINDS[kind](inputs).contiguous())


def root(gram: Tensor) -> Tensor:
    """`S` with `S Sᵀ = G`, float64, by an eigendecomposition: what `closed_form` does without."""
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp_min(0).sqrt()


def optimum(error: Tensor, gram: Tensor, rank: int) -> float:
    """The least `‖(E − X) S‖²` over all `X` of a rank, by brute force in float64: the discarded singular values of `E S`."""
    return float(torch.linalg.svdvals(error.double() @ root(gram))[rank:].square().sum())


def output_error(error: Tensor, gram: Tensor) -> float:
    """`‖X S‖²`, float64."""
    error = error.double()
    return float(((error @ gram.double()) * error).sum().clamp_min(0))


def rounding(error: Tensor, gram: Tensor) -> float:
    """What any solution may be off by, absolutely: the negative eigenvalues of `E G Eᵀ`, which are there only because a
    rank-deficient `G` was summed in float32, and twelve digits of the whole."""
    error = error.double()
    values = torch.linalg.eigvalsh(error @ gram.double() @ error.T)
    return float(2 * values.clamp_max(0).abs().sum() + 1e-12 * values.abs().sum())
