"""GPTQ, packed: the format that transformers loads and PEFT trains on.

Per linear layer with in = K, out = N, group size G and b bits:

    qweight int32 [K·b/32, N]          codes, a bit stream along K
    qzeros  int32 [ceil(K/G), N·b/32]  zero points, a bit stream along N
    scales  fp16  [ceil(K/G), N]
    g_idx   int32 [K]                  group of each input
    W[n, k] = (code − zero) · scale

Written as `checkpoint_format: gptq_v2`, which stores zero points as they are; v1 stores zero − 1 and cannot hold an asymmetric 0.
One width and one group size per folder: readers know only those of config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cloq import __version__, packing
from cloq.errors import ExportError
from cloq.types import LayerResult, QuantizedWeight, WeightLayout


@dataclass(frozen=True)
class Gptq:
    """The GPTQ v2 format, 2, 3, 4 and 8 bits, symmetric and asymmetric."""

    name: str = "gptq"

    def check(self, layouts: dict[str, WeightLayout], dense: list[str]) -> None:
        for name, layout in layouts.items():
            if layout.kind != "integer":
                raise ExportError(f"{name} has a codebook ({layout.bits}-bit nf4), which GPTQ files cannot hold; use --format nf4 or dense")
            if layout.shape[0] % 32 or layout.shape[1] % 32:
                raise ExportError(f"{name} is {layout.shape}; GPTQ packs in and out in multiples of 32. Leave it dense with --skip, or use --format dense")
        widths = {(layout.bits, layout.group_size) for layout in layouts.values()}
        if len(widths) > 1:
            named = ", ".join(f"{bits} bits in groups of {size or 'a channel'}" for bits, size in sorted(widths, key=str))
            raise ExportError(f"GPTQ files have one width and group size, this run has {named}; use --format compressed-tensors, container or dense")

    def tensors(self, name: str, result: LayerResult) -> dict[str, Tensor]:
        return encode(result.weight)

    def quantization_config(self, layouts: dict[str, WeightLayout], dense: list[str], blocks: str) -> dict[str, Any]:
        first = next(iter(layouts.values()))
        symmetric = all(layout.symmetric for layout in layouts.values())
        return config(first.bits, first.group_size, symmetric, any(layout.permuted for layout in layouts.values()), list(layouts), dense, blocks)


def encode(weight: QuantizedWeight) -> dict[str, Tensor]:
    """A layer's tensors by suffix."""
    return {
        "qweight": packing.pack(weight.codes, weight.bits).T.contiguous(),
        "qzeros": packing.pack(weight.zero.T, weight.bits),
        "scales": weight.scale.T.to(torch.float16).contiguous(),
        "g_idx": weight.group_index.int(),
    }


def config(
    bits: int, group_size: int | None, symmetric: bool, permuted: bool, names: list[str], dense: list[str], blocks: str
) -> dict[str, Any]:
    """The `quantization_config` of a GPTQ folder. `auto_trainable` makes plain `from_pretrained` choose kernels that can train."""
    values = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1 if group_size is None else group_size,
        "sym": symmetric,
        "desc_act": permuted,
        "checkpoint_format": "gptq_v2",
        "format": "gptq_v2",
        "backend": "auto_trainable",
        "block_name_to_quantize": blocks,
        "damp_percent": 0.01,
        "meta": {"quantizer": [f"cloq:{__version__}"]},
    }
    return values | ({"modules_in_block_to_quantize": [names]} if dense else {})
