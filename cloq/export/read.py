"""A model folder whose linear layers someone quantized, read layer by layer exactly as the real library decodes them.

    folder = QuantizedFolder(path)
    folder.weight("model.layers.0.mlp.up_proj")     the codes, scales and zero points
    folder.decoder()                                the whole model, streamed like any other, decoded as it is read

GPTQ v1 and v2, bitsandbytes NF4, compressed-tensors pack-quantized, AutoRound's integer packings; a folder without
`quantization_config` has no quantized layers. "Exactly" is before the library rounds to the precision that it computes in: a
float16 scale times an integer is given in float32.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloq.errors import ExportError
from cloq.export.auto_round import AutoRoundReader
from cloq.export.compressed_tensors import CompressedTensorsReader
from cloq.export.format import Reader, StoredLayer
from cloq.export.gptq import GptqReader
from cloq.export.nf4 import Nf4Reader
from cloq.models import Checkpoint, Decoder, TensorSource, is_conv1d
from cloq.models.skeleton import build_skeleton, load_config
from cloq.specs import shown
from cloq.types import AnyQuantizedWeight

READERS: dict[str, type[Reader]] = {
    "gptq": GptqReader,
    "bitsandbytes": Nf4Reader,
    "compressed-tensors": CompressedTensorsReader,
    "auto-round": AutoRoundReader,
}
"""By `quant_method` in config.json."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands. Raises `ExportError` if there is none or it is no JSON object."""
    try:
        values = json.loads((folder / "config.json").read_text("utf8"))
    except FileNotFoundError as error:
        raise ExportError(f"{folder} has no config.json; it is not a model folder") from error
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder / 'config.json'} cannot be read ({error}); fetch or export it again") from error
    if not isinstance(values, dict):
        raise ExportError(f"{folder / 'config.json'} is not a JSON object; fetch or export it again")
    return values


def reader_of(quantization_config: dict[str, Any]) -> Reader:
    """The reader for a folder's `quantization_config`. Raises `ExportError` for a method that cannot be read."""
    if not isinstance(quantization_config, dict):
        raise ExportError(f"quantization_config in config.json is {shown(quantization_config)}, not an object; fetch or export it again")
    method = quantization_config.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in quantization_config else None)
    if not isinstance(method, str) or method not in READERS:
        raise ExportError(f"the base is quantized with {shown(method)}; read are {', '.join(READERS)}")
    try:
        return READERS[method].of(quantization_config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ExportError(f"quantization_config in config.json is not one of {method} ({error}); fetch or export it again") from error


class QuantizedFolder:
    """The quantized layers of a model folder. names: their full names, as in the files.

    Raises `ExportError` if the folder's quantization cannot be read, `ModelError` if its files are missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.quantization_config = read_config(self.folder).get("quantization_config")
        self.checkpoint = Checkpoint(self.folder)
        self.reader = reader_of(self.quantization_config) if self.quantization_config else None
        self._layers = _stored_layers(self.checkpoint, self.reader.marker) if self.reader else {}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._layers)

    def weight(self, name: str) -> AnyQuantizedWeight:
        """One layer as it decodes. Raises `ExportError` if its tensors are incomplete or not what config.json says."""
        return self.reader.decode(self._layer(name))

    def shape(self, name: str) -> tuple[int, int]:
        """`(out, in)` of a layer, without decoding it."""
        return self.reader.shape(self._layer(name))

    def _layer(self, name: str) -> StoredLayer:
        if name not in self._layers:
            raise ExportError(f"{self.folder} has no quantized layer {name}")
        return self._layers[name]

    def fingerprint(self) -> str:
        """Changes when the tensors or the way to read them do."""
        config = json.dumps(self.quantization_config, sort_keys=True)
        return hashlib.sha256(f"{self.checkpoint.fingerprint()}:{config}".encode()).hexdigest()

    def decoder(
        self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
    ) -> Decoder:  # fmt: skip
        """The model, streamed block by block, every quantized weight decoded as it is read."""
        if not self._layers:
            return Decoder(self.folder, device, dtype, trust_remote_code)
        model = build_skeleton(load_config(self.folder, trust_remote_code), dtype, trust_remote_code)
        return Decoder(self.folder, device, dtype, trust_remote_code, tensors=self.tensors(model))

    def tensors(self, model: nn.Module) -> TensorSource:
        """The folder's tensors as `model` (no weights needed) would have them dense: `<name>.weight` in float32 for quantized
        layers, the stored tensor for all others."""
        conv1d = {name for name, module in model.named_modules() if is_conv1d(module)}
        turned = {name for name in self._layers if any(name == other or other.endswith("." + name) for other in conv1d)}
        return _DecodedTensors(self, frozenset(turned))

    def own_tensors(self) -> set[str]:
        """Names of the tensors that quantized layers are made of; not their biases."""
        return {f"{layer.name}.{suffix}" for layer in self._layers.values() for suffix in layer.suffixes}

    def small_tensors(self, name: str) -> dict[str, Tensor]:
        """A layer's tensors but for the codes, by suffix: scales, zero points and the like."""
        layer = self._layer(name)
        return {suffix: layer.read(suffix) for suffix in layer.suffixes - _CODES}


class _DecodedTensors:
    """A `TensorSource` over a quantized folder. turned: layers that the model stores `(in, out)`."""

    def __init__(self, folder: QuantizedFolder, turned: frozenset[str]):
        self._folder, self._turned = folder, turned
        self._decoded = {f"{name}.weight": name for name in sorted(folder.names)}
        own = folder.own_tensors()
        self._plain = [name for name in folder.checkpoint.names if name not in own]

    @property
    def names(self) -> list[str]:
        return [*self._plain, *self._decoded]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._decoded:
            return self._folder.checkpoint.shape(name)
        out, columns = self._folder.shape(self._decoded[name])
        return (columns, out) if self._decoded[name] in self._turned else (out, columns)

    def read(self, name: str) -> Tensor:
        if name not in self._decoded:
            return self._folder.checkpoint.read(name)
        value = self._folder.weight(self._decoded[name]).dequantize()
        return value.T.contiguous() if self._decoded[name] in self._turned else value

    def release(self) -> None:
        self._folder.checkpoint.release()

    def fingerprint(self) -> str:
        return self._folder.fingerprint()


_CODES = frozenset({"qweight", "weight", "weight_packed"})
_GPTQ = frozenset({"qweight", "qzeros", "scales", "g_idx"})


def _stored_layers(checkpoint: Checkpoint, marker: str) -> dict[str, StoredLayer]:
    """Layers that have the marker among their tensors, with all the tensors that belong to their weight (not the bias)."""
    found: dict[str, set[str]] = {name[: -len(marker) - 1]: set() for name in checkpoint.names if name.endswith(f".{marker}")}
    for name in checkpoint.names:
        for suffix in _suffixes(name):
            if name[: -len(suffix) - 1] in found and (suffix in _GPTQ or suffix.startswith("weight")):
                found[name[: -len(suffix) - 1]].add(suffix)
    return {name: StoredLayer(name, checkpoint, frozenset(suffixes)) for name, suffixes in found.items()}


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]
