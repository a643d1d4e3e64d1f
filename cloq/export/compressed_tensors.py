"""compressed-tensors, pack-quantized: the format that vLLM takes at every width.

Per linear layer with in = K, out = N, group size G and b bits:

    weight_packed      int32 [N, ceil(K·b/32)]   codes, a bit stream along K
    weight_scale       fp16  [N, K/G]
    weight_zero_point  int32 [ceil(N·b/32), K/G] zero points, a bit stream along N; left out where every one is 2^(b−1)
    weight_shape       int64 [2]                 (N, K)
    W[n, k] = (code − zero) · scale

The library counts from −2^(b−1) and stores q + 2^(b−1), so the stored codes and zero points are ours. `config_groups` give each
layer its width, group size and symmetry. G divides K; groups are runs of columns.

What transformers 5.23 with compressed-tensors 0.20 makes of it: weights stay packed until the first forward, which PEFT cannot
wrap, and packed zero points fail to load at all. `dequantize: true` in the configuration makes it decode while loading, which
does both, but with the first group's width for every layer; so it is written where there is one group.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from cloq.algebra import packing
from cloq.errors import ExportError
from cloq.export.format import FLOATS, Contents, ExpertsStored, StoredLayer, TensorSpec, check_pattern
from cloq.types import AnyQuantizedWeight, QuantizedWeight, WeightLayout

FORMAT = "pack-quantized"


class Scheme(NamedTuple):
    """Of one config group. group_size: `None` is per channel."""

    bits: int
    group_size: int | None
    symmetric: bool


@dataclass(frozen=True)
class CompressedTensors:
    """Writes pack-quantized: 2, 3, 4 and 8 bits, symmetric and asymmetric, per group or channel, several widths in one folder."""

    name: ClassVar[str] = "compressed-tensors"
    experts: ClassVar[ExpertsStored] = "refused"
    dtype: str | None = None

    def check(self, contents: Contents) -> None:
        if contents.fused:
            raise ExportError(
                f"the files hold {contents.fused[0]} in pieces, and transformers cannot put it together beside "
                "compressed-tensors layers; use --format gptq, container or dense"
            )
        for name, layout in contents.layouts.items():
            if layout.kind != "integer":
                raise ExportError(
                    f"{name} has a codebook ({layout.bits}-bit nf4), which pack-quantized files cannot hold; use --format nf4 or dense"
                )
            if name in contents.conv1d:
                raise ExportError(f"{name} is a Conv1D, which compressed-tensors does not load; use --format gptq or dense")
            if layout.permuted:
                raise ExportError(
                    f"{name} has its groups in activation order, which compressed-tensors no longer reads; "
                    "quantize with --static-groups or without --act-order, or use --format gptq or dense"
                )
            if layout.group_size and layout.shape[1] % layout.group_size:
                raise ExportError(
                    f"{name} has {layout.shape[1]} inputs, which groups of {layout.group_size} do not divide, and "
                    "compressed-tensors has no shorter last group; quantize with --group-size 32 or channel, or use --format "
                    "gptq or dense"
                )

    def tensors(self, name: str, weight: AnyQuantizedWeight, contents: Contents) -> dict[str, Tensor]:
        return encode(weight)

    def quantization_config(self, contents: Contents) -> dict[str, Any]:
        groups: dict[Scheme, list[str]] = {}
        for name, layout in contents.layouts.items():
            groups.setdefault(_scheme(layout), []).append(name)
        single = len(groups) == 1
        return {
            "quant_method": "compressed-tensors",
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": _config_group(scheme, ["Linear"] if single else names) for i, (scheme, names) in enumerate(groups.items())
            },
            "ignore": list(contents.dense),
        } | ({"dequantize": True} if single else {})


def _scheme(layout: WeightLayout) -> Scheme:
    return Scheme(layout.bits, layout.group_size, layout.symmetric)


def _config_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None, "format": FORMAT}


def encode(weight: QuantizedWeight) -> dict[str, Tensor]:
    """A layer's tensors by suffix. Scales that float16 holds are stored so, others (of a base made by someone else) as
    float32."""
    half = weight.scale.half()
    tensors = {
        "weight_packed": packing.pack(weight.codes, weight.bits),
        "weight_scale": half if torch.equal(half.float(), weight.scale) else weight.scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if weight.symmetric:
        return tensors
    return tensors | {"weight_zero_point": packing.pack(weight.zero.T, weight.bits).T.contiguous()}


def decode(tensors: dict[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `encode`."""
    out, columns = (int(n) for n in tensors["weight_shape"])
    scale = tensors["weight_scale"].float().reshape(out, -1)
    if scheme.symmetric:
        zero = torch.full(scale.shape, 2 ** (scheme.bits - 1), dtype=torch.uint8)
    else:
        zero = packing.unpack(tensors["weight_zero_point"].T.contiguous(), scheme.bits, out).T.contiguous()
    codes = packing.unpack(tensors["weight_packed"], scheme.bits, columns)
    group_index = torch.arange(columns) // (scheme.group_size or columns)
    return QuantizedWeight(codes, scale, zero, group_index, scheme.bits, scheme.group_size, scheme.symmetric)


@dataclass(frozen=True)
class CompressedTensorsReader:
    """Reads pack-quantized weights. groups: (targets, scheme) in the order of the file. ignore: layers left dense."""

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...] = ()
    marker: ClassVar[str] = "weight_packed"

    @classmethod
    def of(cls, quantization_config: dict[str, Any]) -> CompressedTensorsReader:
        form = quantization_config.get("format")
        if form != FORMAT:
            raise ExportError(f"this compressed-tensors base has the format {form!r}; {FORMAT} is what can be read")
        if quantization_config.get("transform_config"):
            raise ExportError("this compressed-tensors base rotates its activations (transform_config), which is not supported")
        groups = quantization_config.get("config_groups") or {}
        schemes = tuple((tuple(group["targets"]), _read_scheme(name, group)) for name, group in groups.items())
        ignore = tuple(quantization_config.get("ignore") or ())
        for target in (*ignore, *(target for targets, _ in schemes for target in targets)):
            if target.startswith("re:"):
                check_pattern(target[3:], "this compressed-tensors base's configuration")
        return cls(schemes, ignore)

    @property
    def widths(self) -> frozenset[int]:
        return frozenset(scheme.bits for _, scheme in self.groups)

    def layers(self, model: nn.Module) -> set[str]:
        linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        targets = [target for group, _ in self.groups for target in group]
        kinds = {name: {kind.__name__ for kind in type(module).__mro__} for name, module in linears}

        def among(name: str, patterns) -> bool:
            return any(_names(pattern, name) or pattern in kinds[name] for pattern in patterns)

        return {name for name, _ in linears if among(name, targets) and not among(name, self.ignore)}

    def obstacle(self, model: nn.Module, layers: set[str]) -> str | None:
        return None

    def scheme(self, name: str) -> Scheme:
        """Of a layer: an exact target wins over a pattern, a pattern over a class name."""
        targets = {target: scheme for group, scheme in self.groups for target in group}
        for target in sorted(targets, key=lambda t: ("re:" in t, t)):
            if _names(target, name):
                return targets[target]
        by_class = [scheme for target, scheme in targets.items() if target == "Linear"]
        if not by_class:
            raise ExportError(f"no config group names {name}, which is quantized; config.json and the tensors disagree")
        return by_class[0]

    def specs(self, name: str, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        scheme, (rows, columns) = self.scheme(name), shape
        groups = columns // (scheme.group_size or columns)
        zero = {"weight_zero_point": TensorSpec((math.ceil(rows * scheme.bits / 32), groups), (torch.int32,))}
        return {
            "weight_packed": TensorSpec((rows, math.ceil(columns * scheme.bits / 32)), (torch.int32,)),
            "weight_scale": TensorSpec((rows, groups), FLOATS),
            "weight_shape": TensorSpec((2,), (torch.int64, torch.int32)),
        } | ({} if scheme.symmetric else zero)

    def shape(self, layer: StoredLayer) -> tuple[int, int]:
        return tuple(int(n) for n in layer.read("weight_shape"))

    def decode(self, layer: StoredLayer) -> QuantizedWeight:
        if "weight_g_idx" in layer.suffixes:
            raise ExportError(
                f"{layer.name} has its groups in activation order (weight_g_idx), which compressed-tensors no longer reads; use "
                "another base"
            )
        specs = self.specs(layer.name, self.shape(layer))
        tensors = {suffix: layer.read(suffix) for suffix in specs}
        for suffix, tensor in tensors.items():
            if tuple(tensor.shape) != specs[suffix].shape:
                raise ExportError(
                    f"{layer.name}.{suffix} is {tuple(tensor.shape)}, where config.json asks for {specs[suffix].shape}; "
                    "the two disagree, or an old version of the library packed it"
                )
        return decode(tensors, self.scheme(layer.name))


def _read_scheme(name: str, group: dict[str, Any]) -> Scheme:
    weights = group.get("weights") or {}
    strategy, size, bits = weights.get("strategy"), weights.get("group_size"), weights.get("num_bits")
    strategy = strategy or ("group" if size and size > 0 else "channel" if size == -1 else "tensor")
    if group.get("input_activations") or group.get("output_activations"):
        raise ExportError(f"{name} of this compressed-tensors base quantizes activations too, which is not supported")
    if weights.get("type", "int") != "int" or bits not in (2, 3, 4, 8) or strategy not in ("group", "channel"):
        raise ExportError(
            f"{name} of this compressed-tensors base has {bits} bits ({weights.get('type', 'int')}) per {strategy}; "
            "read are integers of 2, 3, 4 and 8 bits per group or channel"
        )
    return Scheme(bits, size if strategy == "group" else None, bool(weights.get("symmetric", True)))


def _names(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name
