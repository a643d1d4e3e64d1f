"""AutoRound's own folders, read only: codes that were trained, packed as GPTQ packs them or, with 4 bits asymmetric, as AWQ does.

What config.json calls `packing_format`:

    auto_round:auto_gptq                 as GPTQ v1: zero points minus one; no g_idx
    auto_round, auto_round:gptqmodel     as GPTQ v2: zero points as they are; g_idx with the second only
    auto_round:auto_awq                  qweight int32 [in, out/8], qzeros int32 [in/G, out/8], scales [in/G, out]: eight outputs
                                         to a word, in the order 0 2 4 6 1 3 5 7

`extra_config` says what is different for single layers, by their names or by patterns that are searched for in names. AutoRound writes
plain GPTQ folders as well (`--format auto_gptq`), which are read as such.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cloq.algebra import packing
from cloq.errors import ExportError
from cloq.export.format import FLOATS, StoredLayer, TensorSpec, check_pattern
from cloq.export.gptq import BITS, GptqReader
from cloq.models import is_conv1d
from cloq.specs import shown
from cloq.types import AnyQuantizedWeight, QuantizedWeight

_GPTQ_VERSIONS = {"auto_round:auto_gptq": 1, "auto_round": 2, "auto_round:gptqmodel": 2}
_AWQ = "auto_round:auto_awq"
_AWQ_BITS = 4
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_DENSE = 16
"""Layers of so many bits and more are left as they are."""


@dataclass(frozen=True)
class AutoRoundReader:
    """packed: how layers are packed, with which widths and group sizes. with_index: whether g_idx is stored. blocks: what the names of
    quantized layers start with; empty where config.json does not say. beyond: layers outside of the blocks that are quantized too."""

    packed: GptqReader
    with_index: bool
    blocks: tuple[str, ...] = ()
    beyond: frozenset[str] = frozenset()
    marker: ClassVar[str] = "qweight"

    @classmethod
    def of(cls, quantization_config: dict[str, Any]) -> AutoRoundReader:
        get = quantization_config.get
        packed = get("packing_format", "auto_round:auto_gptq")
        if packed != _AWQ and packed not in _GPTQ_VERSIONS:
            raise ExportError(f"this AutoRound base is packed as {shown(packed)}; read are {', '.join([*_GPTQ_VERSIONS, _AWQ])}")
        _refuse_more(quantization_config, "this AutoRound base")
        bits, size = get("bits"), get("group_size")
        _check_grid(bits, size, packed)
        blocks = tuple(_blocks(get("block_name_to_quantize") or get("to_quant_block_names")))
        grids, beyond = [], set()
        for name, values, pattern in _overrides(get("extra_config") or {}):
            grid = values.get("bits", bits), values.get("group_size", size)
            if not _is_dense(grid[0]):
                _refuse_more(values, f"this AutoRound base's layer {shown(name)}")
                _check_grid(*grid, packed)
                beyond |= {name} if _is_name(name) and blocks and not name.startswith(blocks) else set()
            grids.append((pattern, grid[0], _columns(grid[1])))
        reader = _AwqPacked if packed == _AWQ else GptqReader
        layers = reader(bits, _columns(size), _GPTQ_VERSIONS.get(packed, 2), dynamic=tuple(grids))
        return cls(layers, packed == "auto_round:gptqmodel", blocks, frozenset(beyond))

    @property
    def widths(self) -> frozenset[int]:
        return frozenset(bits for bits in self.packed.widths if not _is_dense(bits))

    def layers(self, model: nn.Module) -> set[str]:
        linear = {name for name, module in model.named_modules() if type(module) is nn.Linear or is_conv1d(module)}
        inside = {name for name in linear if name.startswith(self.blocks)} if self.blocks else self.packed.layers(model)
        return {name for name in inside | (linear & self.beyond) if not _is_dense(self.packed.grid(name)[0])}

    def obstacle(self, model: nn.Module, layers: set[str]) -> str | None:
        return self.packed.obstacle(model, layers)

    def specs(self, name: str, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {suffix: spec for suffix, spec in self.packed.specs(name, shape).items() if suffix != "g_idx" or self.with_index}

    def shape(self, layer: StoredLayer) -> tuple[int, int]:
        return self.packed.shape(layer)

    def decode(self, layer: StoredLayer) -> AnyQuantizedWeight:
        return self.packed.decode(layer)


class _AwqPacked(GptqReader):
    """Layers packed along their outputs, in AWQ's order."""

    def specs(self, name: str, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        (rows, columns), (_, group_size) = shape, self.grid(name)
        groups = math.ceil(columns / (group_size or columns))
        return {
            "qweight": TensorSpec((columns, rows // len(_AWQ_ORDER)), (torch.int32,)),
            "qzeros": TensorSpec((groups, rows // len(_AWQ_ORDER)), (torch.int32,)),
            "scales": TensorSpec((groups, rows), FLOATS),
        }

    def shape(self, layer: StoredLayer) -> tuple[int, int]:
        columns, words = layer.shape("qweight")
        return words * len(_AWQ_ORDER), columns

    def decode(self, layer: StoredLayer) -> QuantizedWeight:
        (rows, columns), (bits, group_size) = self.shape(layer), self.grid(layer.name)
        tensors = layer.read_all(self.specs(layer.name, (rows, columns)), bits, group_size)
        codes, zero = (_unpack_awq(tensors[suffix]) for suffix in ("qweight", "qzeros"))
        scale, groups = tensors["scales"].T.float().contiguous(), torch.arange(columns) // (group_size or columns)
        return QuantizedWeight(codes, scale, zero, groups, bits, group_size, bool((zero == 2 ** (bits - 1)).all()))


def _unpack_awq(packed: Tensor) -> Tensor:
    """`(n, out/8)` int32 → `(out, n)` uint8: eight codes a word, put into the order of the outputs."""
    rows, words = packed.shape
    stored = packing.unpack(packed, _AWQ_BITS, words * len(_AWQ_ORDER)).reshape(rows, words, len(_AWQ_ORDER))
    ordered = torch.empty_like(stored)
    ordered[:, :, list(_AWQ_ORDER)] = stored
    return ordered.reshape(rows, -1).T.contiguous()


def _blocks(named: Any) -> Iterator[str]:
    """What names of quantized layers start with: text with commas, a list, or lists in a list, each of names with a common start."""
    for item in named.split(",") if isinstance(named, str) else named or []:
        start = item if isinstance(item, str) else _common_start(item)
        yield start.strip().rstrip(".") + "."


def _common_start(names: list[str]) -> str:
    """Of full names, whole parts alone."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    same = [part[0] for part in parts if len(set(part)) == 1]
    return ".".join(same)


def _overrides(extra: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], re.Pattern[str]]]:
    """What is different for which layers, in the order in which AutoRound looks: a layer's own name before any pattern, and of the patterns
    the first that is found in the name."""
    for name, values in extra.items():
        yield name, values, re.compile(f"{re.escape(name)}$")
    for name, values in extra.items():
        if not _is_name(name):
            yield name, values, check_pattern(name if name.startswith((".*", "^")) else f".*{name}", "this AutoRound base's extra_config")


def _is_name(key: str) -> bool:
    return re.fullmatch(r"[\w.]+", key) is not None


def _is_dense(bits: Any) -> bool:
    return isinstance(bits, int) and bits >= _DENSE


def _columns(group_size: Any) -> int | None:
    return None if group_size == -1 else group_size


def _refuse_more(values: dict[str, Any], what: str) -> None:
    """Raises `ExportError` for anything but integer weights."""
    data, activations = values.get("data_type", "int"), values.get("act_bits")
    if data != "int":
        raise ExportError(f"{what} has weights of the type {shown(data)}; integers are what can be read")
    if activations is not None and not _is_dense(activations):
        raise ExportError(f"{what} quantizes activations too ({shown(activations)} bits); read are weights alone")
    if rotated := [key for key in values if "rotation" in key and values[key]]:
        raise ExportError(f"{what} was rotated before it was quantized ({rotated[0]}), which is not read")


def _check_grid(bits: Any, size: Any, packed: str) -> None:
    widths = (_AWQ_BITS,) if packed == _AWQ else BITS
    if type(bits) is not int or bits not in widths:
        raise ExportError(f"this AutoRound base has {shown(bits)} bits packed as {packed}; read are {', '.join(map(str, widths))}")
    if type(size) is not int or not (size == -1 or size > 0):
        raise ExportError(f"this AutoRound base has groups of {shown(size)}; read are groups of whole columns, and -1 for one a channel")
