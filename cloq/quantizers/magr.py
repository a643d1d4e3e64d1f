"""MagR: shrink each group's largest weights before quantization while keeping the layer's output.

Zhang et al., "MagR: Weight Magnitude Reduction for Enhancing Post-Training Quantization", NeurIPS 2024. Per row,

    min over Ŵ of  ½ ‖(W − Ŵ) S‖² + α Σ_groups ‖ŵ_group‖_∞,     S Sᵀ = G / λmax(G)

by proximal gradient. A smaller largest magnitude is a finer grid for the quantizer that follows.

Departures from the paper: accelerated steps (FISTA, with restart when the direction turns), 32 of which do what 150 plain ones
do; the prox by a finite Newton iteration instead of a sort; the penalty per quantization group, since it is the
group's range that sets the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cloq.algebra import linalg
from cloq.types import AnyQuantizedWeight, LayerStats, Quantizer

MARGIN = 1.01
"""The estimate of λmax comes from below; steps are shorter by this much, to stay where they converge."""


@dataclass(frozen=True)
class Magr:
    """A quantizer that runs MagR first.

    then: the quantizer that gets the reduced weight.
    group_size: columns that share a penalty, `None` for whole rows.
    alpha: weight of the penalty; the paper's 1e-3 per channel and 1e-4 per group.
    iterations: accelerated proximal steps.
    """

    then: Quantizer
    group_size: int | None = 64
    alpha: float = 1e-4
    iterations: int = 32

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> AnyQuantizedWeight:
        """Quantizes the reduced weight with the same statistics; without any, the weight itself."""
        return self.then.quantize(weight if stats is None else self.reduce(weight, stats), stats)

    def reduce(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """The weight of smaller magnitude, `(out, in)` float32. Unchanged where the Gram matrix is zero."""
        weight = weight.detach().float()
        peak = stats.once("largest eigenvalue", lambda: linalg.largest_eigenvalue(stats.gram.float()))
        if peak <= 0:
            return weight
        step = 1 / MARGIN
        gram, scale = linalg.scaled(stats.gram.float())
        gram = gram * (step * scale / peak)
        anchor = weight @ gram
        current, ahead, momentum = weight, weight, 1.0
        for _ in range(self.iterations):
            target = _prox_groups(ahead - (ahead @ gram - anchor), step * self.alpha, self.group_size)
            change = target - current
            if float(((ahead - target) * change).sum()) > 0:  # the momentum points uphill: restart (O'Donoghue and Candès, 2015)
                momentum = 1.0
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = target + ((momentum - 1) / following) * change
            current, momentum = target, following
        return current


def _prox_groups(values: Tensor, threshold: float, group_size: int | None) -> Tensor:
    if group_size is None:
        return prox_max(values, threshold)
    whole = values.shape[1] // group_size * group_size
    parts = [prox_max(values[:, :whole].reshape(-1, group_size), threshold).reshape(values.shape[0], whole)] if whole else []
    if whole < values.shape[1]:
        parts.append(prox_max(values[:, whole:], threshold))
    return torch.cat(parts, dim=1)


def prox_max(values: Tensor, threshold: float) -> Tensor:
    """`argmin_x ½‖x − v‖² + t ‖x‖_∞` for each row of `(rows, n)`: clip at the τ with `Σ max(|v| − τ, 0) = t`, or 0 if `‖v‖₁ ≤ t`.

    τ is the root of a decreasing, convex, piecewise linear function; Newton's iteration from below rises to it and ends after
    finitely many steps (Michelot, 1986). It starts at `‖v‖_∞ − t`, which no root is below: two or three steps where t is small, as here.
    Equal to `v − t · projection of v/t on the ℓ1 ball`.
    """
    magnitude = values.abs()
    tau = (magnitude.amax(1, keepdim=True) - threshold).clamp_min(0)
    for _ in range(values.shape[1]):
        above = magnitude > tau
        count = above.sum(1, keepdim=True).clamp_min(1)
        following = ((magnitude * above).sum(1, keepdim=True) - threshold) / count
        following = torch.maximum(following, tau)
        if bool((following <= tau).all()):
            break
        tau = following
    tau = torch.where(magnitude.sum(1, keepdim=True) <= threshold, torch.zeros_like(tau), tau)
    return torch.minimum(torch.maximum(values, -tau), tau)
