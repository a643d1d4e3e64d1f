"""Coordinate descent over codes: each code to its best value while all others stay.

For a row `q` of the decoded weight and the target `t`, `(t − q) G (t − q)ᵀ` as a function of one entry `q_i` is a parabola with its
minimum at `q_i + r_i / G_ii`, `r = (t − q) G`. The nearest point of the entry's own grid is therefore the best code for it, and no
sweep can raise the error. Scales and zero points stay. (Behdin et al., QuantEase, arXiv:2309.01885, is this without a given start.)
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from cloq.quantizers import grid
from cloq.types import QuantizedWeight

BLOCK = 128
"""Columns whose gradients are brought up to date in one product with all changes before them."""

INNER = 16
"""Columns whose gradients are kept up to date one by one; the rest of the block gets their changes in one product."""

SMALLEST_CURVATURE = torch.finfo(torch.float32).tiny
"""The reciprocal of anything smaller is no float32."""


def descend(quantized: QuantizedWeight, target: Tensor, gram: Tensor, sweeps: int = 1) -> QuantizedWeight:
    """`quantized (out, in)` with codes closer to `target (out, in)` in the norm of `gram (in, in)`; everything else is its own.

    Inputs whose diagonal is zero, or too small to divide by, keep their codes: nothing depends on them.
    """
    index = quantized.group_index.tolist()
    grids = [grid.grid(*fits, quantized.bits) for fits in zip(quantized.scale.T, quantized.zero.T, strict=True)]
    gram = gram.float()
    values = quantized.dequantize().T.contiguous()  # one column of the weight per row, as in GPTQ
    zero = quantized.zero.float()[:, quantized.group_index].T
    steps = (quantized.codes.T - zero).contiguous()
    gradient = gram @ (target.float().T - values)
    for sweep in range(sweeps):
        for start in range(0, len(values), BLOCK):
            here = slice(start, min(start + BLOCK, len(values)))
            own = [grids[g] for g in index[here]]
            moved = _descend_block(values[here], steps[here], gradient[here].clone(), gram[here, here], own)
            rest = slice(here.stop if sweep == sweeps - 1 else 0, None)  # nobody asks for the gradient of what is done
            gradient[rest].addmm_(gram[rest, here], moved, alpha=-1)
    return dataclasses.replace(quantized, codes=(steps + zero).T.byte().contiguous())


def _descend_block(values: Tensor, steps: Tensor, gradient: Tensor, gram: Tensor, grids: list[grid.Grid]) -> Tensor:
    """One sweep over a block of columns `(block, out)`, whose values and steps it replaces; returns by how much each value moved.

    gradient `(block, out)` is used up. gram `(block, block)`. grids: of each column.
    """
    moved = torch.zeros_like(values)
    best = torch.empty_like(values[0])
    rows = list(zip(values.unbind(), steps.unbind(), gradient.unbind(), moved.unbind(), gram.diagonal().tolist(), grids, strict=True))
    for first in range(0, len(rows), INNER):
        last = min(first + INNER, len(rows))
        for i in range(first, last):
            value, step, slope, move, curvature, points = rows[i]
            if curvature < SMALLEST_CURVATURE:
                continue
            points.round(torch.add(value, slope, alpha=1 / curvature, out=best), out=step)
            torch.mul(step, points.scale, out=best)
            torch.sub(best, value, out=move)
            value.copy_(best)
            gradient[i + 1 : last].addr_(gram[i + 1 : last, i], move, alpha=-1)
        gradient[last:].addmm_(gram[last:, first:last], moved[first:last], alpha=-1)
    return moved
