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

BLOCK = 64
"""Columns whose gradients are kept up to date one by one; the others get a block's changes in one product."""


def descend(quantized: QuantizedWeight, target: Tensor, gram: Tensor, sweeps: int = 1) -> QuantizedWeight:
    """`quantized (out, in)` with codes closer to `target (out, in)` in the norm of `gram (in, in)`; everything else is its own.

    Inputs whose diagonal is zero keep their codes: nothing depends on them.
    """
    columns = quantized.group_index
    codes = quantized.codes.float().T.contiguous()
    scale, zero = (part.float()[:, columns].T.contiguous() for part in (quantized.scale, quantized.zero))
    gram = gram.float()
    diagonal = gram.diagonal()
    live = (diagonal > 0).tolist()
    values = grid.decode(codes, scale, zero)
    gradient = gram @ (target.float().T - values)  # one column of the weight per row, as in GPTQ
    for _ in range(sweeps):
        for start in range(0, len(codes), BLOCK):
            end = min(start + BLOCK, len(codes))
            own, moved = gradient[start:end].clone(), torch.zeros_like(values[start:end])
            for i in range(start, end):
                if not live[i]:
                    continue
                codes[i] = grid.encode(values[i] + own[i - start] / diagonal[i], scale[i], zero[i], quantized.bits)
                decoded = grid.decode(codes[i], scale[i], zero[i])
                moved[i - start] = decoded - values[i]
                values[i] = decoded
                own.addr_(gram[start:end, i], moved[i - start], alpha=-1.0)
            gradient.addmm_(gram[:, start:end], moved, alpha=-1.0)
    return dataclasses.replace(quantized, codes=codes.byte().T.contiguous())
