"""The 4-bit container: a 2- or 3-bit grid re-coded, exactly, as the symmetric 4-bit GPTQ that every server has fast kernels for.

    (q − z) · s  =  ((q − z + 8) − 8) · s       so the new code is q − z + 8, the new zero point 8, the scale the same

For 2 and 3 bits `q − z` lies in −7…7, so the new code fits in 0…15; a symmetric 4-bit grid has these codes already. Memory is
that of 4 bits.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cloq.errors import ExportError
from cloq.export import gptq
from cloq.export.format import Contents, ExpertsStored
from cloq.types import AnyQuantizedWeight, QuantizedWeight

_ZERO = 8


@dataclass(frozen=True)
class Container:
    """Writes symmetric 4-bit GPTQ from 2 and 3 bits (any grid, also mixed) and from 4 bits symmetric."""

    name: ClassVar[str] = "container"
    experts: ClassVar[ExpertsStored] = "apart"
    dtype: str | None = None

    def check(self, contents: Contents) -> None:
        for name, layout in contents.layouts.items():
            if layout.kind == "integer" and (layout.bits > 4 or (layout.bits == 4 and not layout.symmetric)):
                kind = "symmetric" if layout.symmetric else "asymmetric"
                raise ExportError(
                    f"{name} has {layout.bits} bits, {kind}: code − zero does not fit in −8…7, so 4 bits with the zero point 8 "
                    "cannot hold it. Use --format compressed-tensors or gptq, or quantize to 2 or 3 bits, or to 4 with "
                    "--symmetric"
                )
            if layout.kind == "integer" and layout.group_size and layout.shape[1] % layout.group_size:
                raise ExportError(
                    f"{name} has {layout.shape[1]} inputs, which groups of {layout.group_size} do not divide, and no server "
                    "takes that; quantize with --group-size 32 or channel, or use --format gptq or dense"
                )
        sizes = {layout.group_size for layout in contents.layouts.values() if layout.kind == "integer"}
        if len(sizes) > 1:
            named = ", ".join(str(size or "a channel") for size in sorted(sizes, key=str))
            raise ExportError(
                f"this run has groups of {named}, and a container has one group size; use --format gptq, compressed-tensors or dense"
            )
        gptq.Gptq().check(dataclasses.replace(contents, layouts={n: _recoded_layout(v) for n, v in contents.layouts.items()}))

    def tensors(self, name: str, weight: AnyQuantizedWeight, contents: Contents) -> dict[str, Tensor]:
        return gptq.encode(recode(weight))

    def quantization_config(self, contents: Contents) -> dict[str, Any]:
        return gptq.config(4, next(iter(contents.layouts.values())).group_size, True, contents)


def _recoded_layout(layout):
    return dataclasses.replace(layout, bits=4, symmetric=True) if layout.kind == "integer" else layout


def recode(weight: QuantizedWeight) -> QuantizedWeight:
    """The same values on a symmetric 4-bit grid. Raises `ExportError` if a code falls outside of 0…15."""
    codes = weight.codes.short() - weight.zero.short().index_select(1, weight.group_index) + _ZERO
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= 15:
        low, high = int(codes.min()) - _ZERO, int(codes.max()) - _ZERO
        raise ExportError(
            f"code − zero runs from {low} to {high}, and the 4-bit container holds −8…7; use --format gptq or compressed-tensors"
        )
    zero = torch.full_like(weight.zero, _ZERO)
    return dataclasses.replace(weight, codes=codes.to(torch.uint8), zero=zero, bits=4, symmetric=True)
