"""Writes a quantized model as an ordinary Hugging Face folder, shard by shard, whatever the format of its linear layers.

What is not quantized is copied tensor by tensor from the original; what is comes block by block from the store. The folder appears under
its name only when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save
from torch import Tensor

from cloq.errors import ExportError
from cloq.models import Decoder
from cloq.store import Store, write_atomically, writing
from cloq.types import LayerResult, WeightLayout

SHARD_BYTES = 2 << 30

_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "*.tiktoken")
_NOT_COPIED = {"config.json", "model.safetensors.index.json"}


class Format(Protocol):
    """One way to store a quantized linear layer in a model folder. An implementation is a frozen dataclass.

    check: refuses, with `ExportError`, layers that the format cannot hold, before anything is written. dense: full names of linear layers
        in the blocks that stay as they are.
    tensors: a layer's tensors by the suffix of their name (`qweight`, `weight`, …).
    quantization_config: what goes into config.json, or `None`.
    """

    name: str

    def check(self, layouts: dict[str, WeightLayout], dense: list[str]) -> None: ...

    def tensors(self, name: str, result: LayerResult) -> dict[str, Tensor]: ...

    def quantization_config(self, layouts: dict[str, WeightLayout], dense: list[str], blocks: str) -> dict[str, Any] | None: ...


def write_model(decoder: Decoder, store: Store, form: Format, target: Path) -> Path:
    """Writes `target` in the given format from a finished store. Replaces an earlier export of the same name.

    Raises `ExportError` if the format cannot hold the result or the run is not finished, `RunError` if the disk is full.
    """
    if store.finished() < len(decoder.blocks):
        raise ExportError(f"{store.out} has {store.finished()} of {len(decoder.blocks)} blocks finished; run cloq quantize again to complete it")
    layouts = {name: summary.layout for name, summary in store.summaries().items()}
    dense = [name for name in decoder.all_linears() if name not in layouts]
    form.check(layouts, dense)
    with writing(target.parent), replaced_when_complete(target) as folder:
        _write_shards(_all_tensors(decoder, store, form, set(layouts)), folder)
        config = decoder.config.to_dict()
        config.pop("quantization_config", None)
        quantization = form.quantization_config(layouts, dense, decoder.prefix)
        if quantization is not None:
            config["quantization_config"] = quantization
        write_atomically(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        _copy_companions(decoder.folder, folder)
    return target


def _all_tensors(decoder: Decoder, store: Store, form: Format, quantized: set[str]) -> Iterator[tuple[str, Tensor]]:
    replaced = {f"{name}.weight" for name in quantized}
    tied = decoder.tied_names()
    for name in decoder.source_names:
        if name not in replaced and name not in tied:
            yield name, decoder.read(name)
    for index in range(len(decoder.blocks)):
        for name, result in store.read(index).items():
            for suffix, tensor in form.tensors(name, result).items():
                yield f"{name}.{suffix}", tensor


def _write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> None:
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal pending, size
        write_atomically(folder / f"shard-{len(shards)}", save(pending, {"format": "pt"}))
        shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > SHARD_BYTES:
            flush()
        pending[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True).encode())


def _copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, generation settings, licence: small files beside the weights. Never code."""
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.name not in _NOT_COPIED and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


class replaced_when_complete:
    """A folder beside the target that takes its name when the block ends well and vanishes when it doesn't."""

    def __init__(self, target: Path):
        self._target, self._work = target, target.with_name(f".{target.name}.part")

    def __enter__(self) -> Path:
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        return self._work

    def __exit__(self, kind, *exc: object) -> None:
        if kind is not None:
            shutil.rmtree(self._work, ignore_errors=True)
            return
        if self._target.exists():
            shutil.rmtree(self._target)
        self._work.rename(self._target)
