"""Coordinate descent over codes: each code to its best value while all others stay.

For a row `q` of the decoded weight and the target `t`, `(t − q) G (t − q)ᵀ` as a function of one entry `q_i` is a parabola with its
minimum at `q_i + r_i / G_ii`, `r = (t − q) G`. The nearest point of the entry's own grid is therefore the best code for it, and no
sweep can raise the error. Scales and zero points stay. (Behdin et al., QuantEase, arXiv:2309.01885, is this without a given start.)
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from cloq.quantizers import grid
from cloq.quantizers.columns import descend_columns
from cloq.types import QuantizedWeight

BLOCK = 128
"""Columns whose gradients are formed in one product, from all changes before them."""


def descend(quantized: QuantizedWeight, target: Tensor, gram: Tensor, sweeps: int = 1) -> QuantizedWeight:
    """`quantized (out, in)` with codes closer to `target (out, in)` in the norm of `gram (in, in)`; everything else is its own.

    Inputs whose diagonal is zero, or too small to divide by, keep their codes: nothing depends on them.
    """
    index = quantized.group_index
    codes, scales, zeros = (tensor.T.contiguous().float() for tensor in (quantized.codes, quantized.scale, quantized.zero))
    grids = grid.grid(scales, zeros, quantized.bits)
    gram = gram.float()
    zero = zeros.index_select(0, index)
    steps = codes.sub_(zero)  # one column of the weight per row, as in GPTQ
    values = steps * scales.index_select(0, index)
    left = (target.float().T - values).contiguous()  # never the target itself, which is the caller's
    for _ in range(sweeps):
        for start in range(0, len(values), BLOCK):
            here = slice(start, min(start + BLOCK, len(values)))
            left[here] -= descend_columns(values[here], steps[here], gram[here] @ left, gram[here, here], grids, index[here])
    return dataclasses.replace(quantized, codes=steps.add_(zero).T.byte().contiguous())
