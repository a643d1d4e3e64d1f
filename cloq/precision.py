"""In which precision float32 matrices are multiplied: exactly in the algebra, faster in the forwards.

torch multiplies them as the process has been told to: in TF32 on GPUs, or in bfloat16 on some CPUs, if a training script has asked for
speed (`torch.set_float32_matmul_precision("high")`). Sums over tokens and what is solved from them do not survive that, and are exact
whatever the caller has chosen. A forward does: its products are in TF32 on a GPU, whose ten bits behind the point cost less than chance
does (docs/log.md), and which is several times as fast as float32 there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def full_precision() -> AbstractContextManager[None]:
    """Float32 products of float32 matrices inside, on every device. Serves as a decorator too."""
    return _products("ieee", "highest")


def forward_precision(device: torch.device) -> AbstractContextManager[None]:
    """TF32 products inside on a GPU; elsewhere as the caller has them."""
    return _products("tf32", "high") if device.type == "cuda" else nullcontext()


@contextmanager
def _products(precision: str, as_it_was_called: str) -> Iterator[None]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch before 2.9; newer ones refuse the old setting beside the new
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(as_it_was_called)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    matmuls = [torch.backends.cuda.matmul] + [torch.backends.mkldnn.matmul] * (precision == "ieee")
    chosen = [matmul.fp32_precision for matmul in matmuls]
    for matmul in matmuls:
        matmul.fp32_precision = precision
    try:
        yield
    finally:
        for matmul, before in zip(matmuls, chosen, strict=True):
            matmul.fp32_precision = before
