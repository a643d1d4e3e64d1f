"""NF4 as bitsandbytes saves it: loadable by plain `from_pretrained`, trainable by PEFT.

Per linear layer (out, in), in blocks of `blocksize` values of the flattened row-major weight:

    weight                                     uint8 [out·in/2, 1]   two codes a byte, the first in the high half
    weight.absmax                              fp32  [blocks]        largest magnitude of each block
    weight.quant_map                           fp32  [16]            the codebook
    weight.quant_state.bitsandbytes__nf4       uint8 [n]             JSON: quant_type, blocksize, dtype, shape
    W = quant_map[code] · absmax[block]

Double quantization, which this project reads but does not write, keeps absmax itself as codes: uint8 `weight.absmax` with
`weight.nested_absmax`, `weight.nested_quant_map`, and nested_blocksize and nested_offset in the JSON:
absmax = nested_quant_map[absmax] · nested_absmax[block // nested_blocksize] + nested_offset.

On a CPU, bitsandbytes 0.50 gives wrong weights for most layers whose inputs are no multiple of the block (it disagrees with its own
quantization there, and with its GPU kernels); so such layers are not written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cloq.errors import ExportError
from cloq.export.format import Contents, ExpertsStored, StoredLayer, TensorSpec
from cloq.models import is_conv1d
from cloq.quantizers.nf4 import CODEBOOK
from cloq.types import AnyQuantizedWeight, CodebookWeight

_STATE = "weight.quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class Nf4:
    """Writes NF4 without double quantization. Only codebook weights: an integer grid has other levels."""

    name: ClassVar[str] = "nf4"
    experts: ClassVar[ExpertsStored] = "refused"
    dtype: str | None = None

    def check(self, contents: Contents) -> None:
        for name, layout in contents.layouts.items():
            if layout.kind != "codebook":
                raise ExportError(
                    f"{name} is on an integer grid of {layout.bits} bits, whose levels NF4's codebook does not have; "
                    "use --format gptq, compressed-tensors or container, or quantize with --quantizer nf4 --bits 4"
                )
            if layout.shape[1] % layout.group_size:
                raise ExportError(
                    f"{name} has {layout.shape[1]} inputs, so that blocks of {layout.group_size} straddle rows, which bitsandbytes "
                    f"decodes wrongly on a CPU; leave it dense with --skip {name.rsplit('.', 1)[-1]}, or use --format dense"
                )

    def tensors(self, name: str, weight: AnyQuantizedWeight, contents: Contents) -> dict[str, Tensor]:
        return encode(weight, contents.dtype)

    def quantization_config(self, contents: Contents) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": contents.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(contents.dense),
        }


def encode(weight: CodebookWeight, dtype: str) -> dict[str, Tensor]:
    """A layer's tensors by suffix. dtype: what bitsandbytes decodes to, by name."""
    codes = weight.codes.flatten()
    state = {"quant_type": "nf4", "blocksize": weight.block_size, "dtype": dtype, "shape": list(weight.shape)}
    return {
        "weight": (codes[::2] << 4 | codes[1::2])[:, None].contiguous(),
        "weight.absmax": weight.scale.float(),
        "weight.quant_map": weight.codebook.float(),
        _STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def decode(tensors: dict[str, Tensor]) -> CodebookWeight:
    """The inverse of `encode`, and of what bitsandbytes saves with double quantization and with other storage dtypes."""
    state = _state(tensors[_STATE])
    packed = tensors["weight"].contiguous().view(torch.uint8).flatten()
    out, columns = state["shape"]
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)[: out * columns]
    absmax = tensors["weight.absmax"]
    if codes.numel() != out * columns or len(absmax) != -(-codes.numel() // state["blocksize"]):
        raise ExportError(f"weight holds {packed.numel() * 2} codes and {len(absmax)} scales for a layer ({out}, {columns}); it is damaged")
    if "weight.nested_absmax" in tensors:
        block = torch.arange(len(absmax)) // state["nested_blocksize"]
        scale = tensors["weight.nested_absmax"][block]
        absmax = tensors["weight.nested_quant_map"][absmax.long()] * scale + state["nested_offset"]
    codebook = torch.tensor(CODEBOOK)  # the library decodes with its own table, whatever the file says
    if not torch.allclose(tensors["weight.quant_map"].float(), codebook, atol=1e-5):
        raise ExportError("weight.quant_map is not the NF4 codebook, and bitsandbytes would decode with that; the file is damaged")
    return CodebookWeight(codes.reshape(out, columns), absmax.float(), codebook, state["blocksize"])


def _state(packed: Tensor) -> dict[str, Any]:
    return json.loads(bytes(packed.tolist()).decode())


@dataclass(frozen=True)
class Nf4Reader:
    """Reads NF4 as transformers does through bitsandbytes. skip: names that it leaves dense, `None` for its default (head, tied
    ones)."""

    skip: tuple[str, ...] | None = None
    double: bool = False
    marker: ClassVar[str] = _STATE

    @classmethod
    def of(cls, quantization_config: dict[str, Any]) -> Nf4Reader:
        get = quantization_config.get
        if get("load_in_8bit") or not get("load_in_4bit", True) or get("bnb_4bit_quant_type", "fp4") != "nf4":
            kind = "LLM.int8()" if get("load_in_8bit") else f"4-bit {get('bnb_4bit_quant_type', 'fp4')}"
            raise ExportError(f"this bitsandbytes base is {kind}; nf4 is what can be read")
        skip = get("llm_int8_skip_modules")
        return cls(None if skip is None else tuple(skip), bool(get("bnb_4bit_use_double_quant")))

    @property
    def widths(self) -> frozenset[int]:
        return frozenset([4])

    def layers(self, model: nn.Module) -> set[str]:
        from transformers.quantizers.base import get_keys_to_not_convert

        skip = list(get_keys_to_not_convert(model) if self.skip is None else self.skip)
        skip += getattr(model, "_keep_in_fp32_modules", None) or ()
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear or is_conv1d(module)]
        return {name for name in linears if not any(_skips(key, name) for key in skip)}

    def obstacle(self, model: nn.Module, layers: set[str]) -> str | None:
        return None

    def specs(self, name: str, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        nested = {"weight.nested_absmax", "weight.nested_quant_map"} if self.double else set()
        return {
            "weight": TensorSpec(None, (torch.uint8, torch.float16, torch.bfloat16, torch.float32)),
            "weight.absmax": TensorSpec(None, (torch.uint8,) if self.double else (torch.float32,)),
            "weight.quant_map": TensorSpec((16,), (torch.float32,)),
            _STATE: TensorSpec(None, (torch.uint8,)),
        } | {suffix: TensorSpec(None, (torch.float32,)) for suffix in nested}

    def shape(self, layer: StoredLayer) -> tuple[int, int]:
        return tuple(_state(layer.read(_STATE))["shape"])

    def decode(self, layer: StoredLayer) -> CodebookWeight:
        wanted = ("weight", "weight.absmax", "weight.quant_map", _STATE)
        nested = [suffix for suffix in ("weight.nested_absmax", "weight.nested_quant_map") if suffix in layer.suffixes]
        return decode({suffix: layer.read(suffix) for suffix in (*wanted, *nested)})


def _skips(key: str, name: str) -> bool:
    """transformers' rule: the start of the name up to a dot, also as a pattern, or its end."""
    return name.endswith(key) or re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name) is not None
