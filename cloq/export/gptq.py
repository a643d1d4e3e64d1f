"""GPTQ, packed: the format that transformers loads and PEFT trains on.

Per linear layer with in = K, out = N, group size G and b bits:

    qweight int32 [K·b/32, N]          codes, a bit stream along K
    qzeros  int32 [ceil(K/G), N·b/32]  zero points, a bit stream along N
    scales  fp16  [ceil(K/G), N]
    g_idx   int32 [K]                  group of each input
    W[n, k] = (code − zero) · scale

Written as `checkpoint_format: gptq_v2`, which stores zero points as they are; v1 (`gptq`) stores zero − 1 and cannot hold an
asymmetric 0. The library multiplies in float16, the precision of the scales, so what it computes with is float16(W), whatever precision
the rest of the model is in.

Layers whose width or group size is not that of config.json stand in its `dynamic`, GPTQModel's table of patterns and what is different for
the modules that they match. GPTQModel and servers read it; transformers does not and fails on such a folder, so `cloq.load` gives each
layer its width (`cloq.use.several_widths`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cloq import __version__
from cloq.algebra import packing
from cloq.errors import ExportError
from cloq.export.format import FLOATS, Contents, ExpertsStored, StoredLayer, TensorSpec, check_pattern
from cloq.models import is_conv1d
from cloq.types import AnyQuantizedWeight, QuantizedWeight, WeightLayout

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Gptq:
    """Writes GPTQ v2: 2, 3, 4 and 8 bits, symmetric and asymmetric, activation order, a shorter last group."""

    name: ClassVar[str] = "gptq"
    experts: ClassVar[ExpertsStored] = "apart"
    dtype: str | None = None

    def check(self, contents: Contents) -> None:
        for name, layout in contents.layouts.items():
            if layout.kind != "integer":
                raise ExportError(f"{name} has a codebook ({layout.bits}-bit nf4), which GPTQ files cannot hold; use --format nf4 or dense")
            if layout.shape[0] % 32 or layout.shape[1] % 32:
                raise ExportError(
                    f"{name} is {layout.shape}, and GPTQ packs outputs and inputs in multiples of 32. Leave it dense with "
                    f"--skip {name.rsplit('.', 1)[-1]}, or use --format compressed-tensors or dense"
                )

    def tensors(self, name: str, weight: AnyQuantizedWeight, contents: Contents) -> dict[str, Tensor]:
        return encode(weight)

    def quantization_config(self, contents: Contents) -> dict[str, Any]:
        grids = Counter(_grid(layout) for layout in contents.layouts.values())
        common = max(grids, key=lambda grid: grids[grid])  # the first of equals
        symmetric = all(layout.symmetric for layout in contents.layouts.values())
        others = _patterns({name: grid for name, layout in contents.layouts.items() if (grid := _grid(layout)) != common})
        return config(*common, symmetric, contents) | ({"dynamic": others} if others else {})


def _grid(layout: WeightLayout) -> tuple[int, int | None]:
    return layout.bits, layout.group_size


_HELD_AS_ONE = ((("q_proj", "k_proj", "v_proj"), "qkv_proj"), (("gate_proj", "up_proj"), "gate_up_proj"))
"""Layers that servers put together, and what they call them; a pattern has to match that name too."""


def _patterns(grids: Mapping[str, tuple[int, int | None]]) -> dict[str, dict[str, int]]:
    """`dynamic` for these layers: a pattern for those of one module that are alike."""
    alike: dict[tuple[str, int, int | None], list[str]] = {}
    for name, grid in grids.items():
        parent, _, leaf = name.rpartition(".")
        alike.setdefault((parent, *grid), []).append(leaf)
    found = {}
    for (parent, bits, size), leaves in alike.items():
        together = [fused for parts, fused in _HELD_AS_ONE if set(parts) <= set(leaves)]
        pattern = rf"+:^{re.escape(parent)}\.({'|'.join(map(re.escape, [*leaves, *together]))})$"
        found[pattern] = {"bits": bits, "group_size": -1 if size is None else size}
    return found


def config(bits: int, group_size: int | None, symmetric: bool, contents: Contents) -> dict[str, Any]:
    """The `quantization_config` of a GPTQ folder.

    `backend: torch` makes plain `from_pretrained` take the one kernel that is exact and trains at every width, group size and
    device. Left to choose, GPTQModel takes kernels that refuse to train (GPU), or that compute in bfloat16 and, once used for
    inference, pass no gradient to the layers below (4 bits on a CPU, even under `auto_trainable`).
    """
    inside = [name for name in contents.dense if name.startswith(contents.blocks + ".")]
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1 if group_size is None else group_size,
        "sym": symmetric,
        "desc_act": any(layout.permuted for layout in contents.layouts.values()),
        "checkpoint_format": "gptq_v2",
        "format": "gptq_v2",
        "backend": "torch",
        "lm_head": False,
        "block_name_to_quantize": contents.blocks,
        "meta": {"quantizer": [f"cloq:{__version__}"]},
    } | ({"modules_in_block_to_quantize": [_named(contents.layouts, inside)]} if inside else {})


def _named(quantized: Iterable[str], dense: list[str]) -> list[str]:
    """What optimum finds the quantized layers by, the ends of their names: the last parts where these fit no dense layer, as there may be
    thousands of experts; else the full names."""
    short = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in quantized))
    return list(quantized) if any(name.endswith(tuple(short)) for name in dense) else short


def encode(weight: QuantizedWeight) -> dict[str, Tensor]:
    """A layer's tensors by suffix. Raises `ExportError` for a scale that float16 does not hold (of a base made by someone
    else)."""
    scales = weight.scale.to(torch.float16)
    if not torch.equal(scales.float(), weight.scale):
        raise ExportError("GPTQ stores scales as float16, and this base has others; use --format compressed-tensors or dense")
    return {
        "qweight": packing.pack(weight.codes, weight.bits).T.contiguous(),
        "qzeros": packing.pack(weight.zero.T, weight.bits),
        "scales": scales.T.contiguous(),
        "g_idx": weight.group_index.int(),
    }


def decode(tensors: dict[str, Tensor], bits: int, group_size: int | None) -> QuantizedWeight:
    """The inverse of `encode`. Without `g_idx`, groups are runs of `group_size` columns."""
    scale = tensors["scales"].T.float().contiguous()
    columns = len(tensors["g_idx"]) if "g_idx" in tensors else tensors["qweight"].shape[0] * 32 // bits
    group_index = tensors["g_idx"].long() if "g_idx" in tensors else torch.arange(columns) // (group_size or columns)
    zero = packing.unpack(tensors["qzeros"], bits, len(scale)).T.contiguous()
    codes = packing.unpack(tensors["qweight"].T.contiguous(), bits, columns)
    return QuantizedWeight(codes, scale, zero, group_index, bits, group_size, bool((zero == 2 ** (bits - 1)).all()))


def zeros_v1_to_v2(qzeros: Tensor, bits: int) -> Tensor:
    """Adds the 1 that v1 leaves out, as GPTQModel does: field by field modulo 2^bits at 3 bits, else to whole words, where a
    field that is already full carries into its neighbour. (A symmetric grid has none; for an asymmetric one GPTQModel's writer
    borrows alike.)"""
    if bits == 3:
        columns = qzeros.shape[1] * 32 // 3
        return packing.pack((packing.unpack(qzeros, 3, columns) + 1) & 7, 3)
    ones = sum(1 << shift for shift in range(0, 32, bits))
    words = (qzeros.long() + ones) & 0xFFFFFFFF
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@dataclass(frozen=True)
class GptqReader:
    """Reads GPTQ v1 and v2 as transformers does through optimum and GPTQModel.

    bits, group_size: of layers that no pattern of `dynamic` matches. modules: ends of the names of quantized layers, `None` for every
    linear layer in the blocks. dynamic: patterns, the first that matches a name wins, and the width and group size of its layers.
    """

    bits: int
    group_size: int | None
    version: int
    blocks: str | None = None
    modules: tuple[str, ...] | None = None
    dynamic: tuple[tuple[re.Pattern[str], int, int | None], ...] = ()
    marker: ClassVar[str] = "qweight"

    @classmethod
    def of(cls, quantization_config: dict[str, Any]) -> GptqReader:
        get = quantization_config.get
        bits, group_size = get("bits"), get("group_size", 128)
        form = get("checkpoint_format") or get("format") or "gptq"
        if bits not in BITS or form not in ("gptq", "gptq_v2"):
            raise ExportError(f"this GPTQ base has {bits} bits in the format {form!r}; read are 2, 3, 4, 8 bits in gptq and gptq_v2")
        dynamic = tuple(_override(key, values, bits, group_size) for key, values in (get("dynamic") or {}).items() if key[:2] != "-:")
        if dynamic and form == "gptq":
            raise ExportError(
                "this GPTQ base has several widths (dynamic) in the old format (v1), which is not read; convert it to gptq_v2"
            )
        blocks, modules = get("block_name_to_quantize"), get("modules_in_block_to_quantize")
        if modules is not None:
            modules = tuple(name for group in modules for name in ([group] if isinstance(group, str) else group))
        if not all(isinstance(n, str) for n in modules or ()):
            raise TypeError("modules are named by text")
        if not isinstance(blocks, str | None):
            raise TypeError("block_name_to_quantize is text")
        return cls(bits, _group_size(group_size), 2 if form == "gptq_v2" else 1, blocks, modules, dynamic)

    @property
    def widths(self) -> frozenset[int]:
        return frozenset([self.bits, *(bits for _, bits, _ in self.dynamic)])

    def grid(self, name: str) -> tuple[int, int | None]:
        """Width and group size of a layer."""
        return next(((bits, size) for pattern, bits, size in self.dynamic if pattern.match(name)), (self.bits, self.group_size))

    def layers(self, model: nn.Module) -> set[str]:
        blocks = self.blocks or _usual_blocks(model)
        found = {n for n, m in model.named_modules() if (type(m) is nn.Linear or is_conv1d(m)) and n.startswith(blocks)}
        return found if self.modules is None else {name for name in found if name.endswith(self.modules)}

    def obstacle(self, model: nn.Module, layers: set[str]) -> str | None:
        """transformers initialises modules again after loading, which skips what is loaded; but a few models (GPT-2) then reach
        for the `weight` of a layer inside the module, and a packed layer has none. Found out by calling that initialisation."""
        seen = set()
        for name in sorted(layers):
            path, _, leaf = name.rpartition(".")
            parent = model.get_submodule(path)
            if (type(parent), leaf) not in seen and _initialization_needs(model, parent, leaf):
                return f"transformers initialises {type(parent).__name__} through the weight of {name}, and a packed layer has none"
            seen.add((type(parent), leaf))
        return None

    def specs(self, name: str, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        (rows, columns), (bits, group_size) = shape, self.grid(name)
        groups = math.ceil(columns / (group_size or columns))
        return {
            "qweight": TensorSpec((math.ceil(columns * bits / 32), rows), (torch.int32,)),
            "qzeros": TensorSpec((groups, math.ceil(rows * bits / 32)), (torch.int32,)),
            "scales": TensorSpec((groups, rows), FLOATS),
            "g_idx": TensorSpec((columns,), (torch.int32,)),
        }

    def shape(self, layer: StoredLayer) -> tuple[int, int]:
        words, rows = layer.shape("qweight")
        return rows, layer.shape("g_idx")[0] if "g_idx" in layer.suffixes else words * 32 // self.grid(layer.name)[0]

    def decode(self, layer: StoredLayer) -> QuantizedWeight:
        specs, (bits, group_size) = self.specs(layer.name, self.shape(layer)), self.grid(layer.name)
        there = {suffix: spec for suffix, spec in specs.items() if suffix != "g_idx" or suffix in layer.suffixes}
        tensors = layer.read_all(there, bits, group_size)
        if self.version == 1:
            tensors["qzeros"] = zeros_v1_to_v2(tensors["qzeros"], bits)
        groups = len(tensors["scales"])
        if "g_idx" in tensors and not 0 <= int(tensors["g_idx"].min()) <= int(tensors["g_idx"].max()) < groups:
            raise ExportError(f"{layer.name}.g_idx names groups outside of 0…{groups - 1}; the file is damaged: export it again")
        return decode(tensors, bits, group_size)


def _group_size(value: Any) -> int | None:
    if value == -1:
        return None
    if value is not None and not (type(value) is int and value > 0):
        raise TypeError("group_size is a number of columns or -1")
    return value


def _override(pattern: str, values: dict[str, Any], bits: int, group_size: Any) -> tuple[re.Pattern[str], int, int | None]:
    """An entry of `dynamic`: what it does not say is as for the others."""
    unknown = sorted(set(values) - {"bits", "group_size", "sym", "desc_act"})
    width, size = values.get("bits", bits), _group_size(values.get("group_size", group_size))
    if unknown or width not in BITS:
        what = f"sets {', '.join(unknown)}" if unknown else f"has {width} bits"
        raise ExportError(
            f"this GPTQ base {what} for the modules {pattern!r} (dynamic); read are widths of 2, 3, 4, 8 bits and group sizes"
        )
    return check_pattern(pattern.removeprefix("+:"), "this GPTQ base's dynamic"), width, size


def _initialization_needs(model: nn.Module, parent: nn.Module, child: str) -> bool:
    """Whether initialising `parent` fails with a module without weight in the place of `child`. The model is on the meta
    device."""
    layer = parent.get_submodule(child)
    setattr(parent, child, nn.Module())
    try:
        with torch.random.fork_rng(devices=[]):
            model._init_weights(parent)
    except AttributeError:
        return True
    finally:
        setattr(parent, child, layer)
    return False


def _usual_blocks(model: nn.Module) -> str:
    """Where optimum looks for blocks if config.json does not say."""
    usual = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers", "model.language_model.layers")
    names = [name for name, _ in model.named_modules()]
    found = next((start for start in usual if any(name.startswith(start) for name in names)), None)
    if found is None:
        raise ExportError(
            f"config.json does not say which blocks are quantized: set block_name_to_quantize in it (usual: {', '.join(usual)})"
        )
    return found
