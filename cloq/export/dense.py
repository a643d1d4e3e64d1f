"""Dense: every quantized weight decoded to 16 or 32 bits. Loads anywhere and saves nothing: for tools that read nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cloq.algebra.linalg import all_finite
from cloq.errors import ExportError
from cloq.export.format import Contents, ExpertsStored
from cloq.types import AnyQuantizedWeight

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Dense:
    """Writes decoded weights, and everything else, in `dtype`: bfloat16, float16 or float32. Only float32 holds any grid
    exactly."""

    name: ClassVar[str] = "dense"
    experts: ClassVar[ExpertsStored] = "fused"
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ExportError(f"dtype is {self.dtype!r}; a dense export takes {', '.join(DTYPES)}")

    def check(self, contents: Contents) -> None:
        """Any layer can be decoded."""

    def tensors(self, name: str, weight: AnyQuantizedWeight, contents: Contents) -> dict[str, Tensor]:
        value = weight.dequantize()
        return {"weight": narrowed(value.T.contiguous() if name in contents.conv1d else value, DTYPES[self.dtype], name)}

    def quantization_config(self, contents: Contents) -> None:
        return None


def narrowed(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another precision. Raises `ExportError` if a value does not fit its range."""
    result = value.to(dtype)
    if not all_finite(result):
        raise ExportError(f"{name} reaches {float(value.abs().max()):.3g}, which {dtype} cannot hold; use bfloat16 or float32")
    return result
