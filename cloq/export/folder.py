"""Writes a quantized model as an ordinary Hugging Face folder, shard by shard, whatever the format of its linear layers.

What is not quantized is copied tensor by tensor from the original; what is comes block by block from the store. The folder
appears under its name only when it is complete. Equal runs write equal bytes. `write_folder` is the part that knows no store.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cloq.errors import ExportError
from cloq.export.dense import DTYPES, narrowed
from cloq.export.format import Contents, Format
from cloq.export.read import read_config, reader_of
from cloq.models import Decoder, is_conv1d
from cloq.store import Store, write_atomically, write_tensors, writing
from cloq.types import WeightLayout

SHARD_BYTES = 1 << 30

_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*", "*.tiktoken")
_NOT_COPIED = ("config.json", "*.index.json", "adapter_config.json", "quantize_config.json", "trainer_state.json")


def write_model(decoder: Decoder, store: Store, form: Format, target: Path) -> Path:
    """Writes `target` in the given format from a finished store. Replaces an earlier export of the run, and nothing else.

    Raises `ExportError` if the format cannot hold the result, the run is not finished, or `target` has other content; `RunError`
    if the disk is full.
    """
    finished, total = store.finished(), len(decoder.blocks)
    if finished < total:
        raise ExportError(f"{store.out} has {finished} of {total} blocks finished; run cloq quantize again to complete it")
    _refuse_other_content(target, store.out)
    config, contents = _checked(decoder, {name: summary.layout for name, summary in store.summaries().items()}, form)
    return write_folder(_all_tensors(decoder, store, form, contents), config, decoder.folder, target)


def write_folder(tensors: Iterable[tuple[str, Tensor]], config: dict[str, Any], companions: Path, target: Path) -> Path:
    """Writes named tensors as they come, at most a shard of them in memory, with a config.json and what lies beside the weights in
    the folder `companions`. `target` is replaced when all of it is there; `RunError` if the disk is full."""
    with writing(target.parent), replaced_when_complete(target) as folder:
        _write_shards(tensors, folder)
        write_atomically(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        _copy_companions(companions, folder, code="auto_map" in config)
    return target


def check_format(decoder: Decoder, layouts: dict[str, WeightLayout], form: Format) -> None:
    """Raises `ExportError` if the format cannot hold layers of these layouts: to be asked before the work, not after it."""
    _checked(decoder, layouts, form)


def _checked(decoder: Decoder, layouts: dict[str, WeightLayout], form: Format) -> tuple[dict[str, Any], Contents]:
    """The config.json and the contents of the folder to be."""
    config = plain_config(decoder, form.dtype)
    contents = _contents(decoder, layouts, config["dtype"])
    form.check(contents)
    quantization = form.quantization_config(contents)
    if quantization is not None:
        config["quantization_config"] = quantization
        _check_agreement(decoder.model, quantization, contents, form.name)
    return config, contents


def _contents(decoder: Decoder, layouts: dict[str, WeightLayout], dtype: str) -> Contents:
    linears = {name: m for name, m in decoder.model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)}
    conv1d = frozenset(name for name, module in linears.items() if is_conv1d(module))
    fused = tuple(name for name, origin in decoder.source_names.items() if origin.converter is not None)
    return Contents(layouts, tuple(name for name in linears if name not in layouts), decoder.prefix, dtype, conv1d, fused)


def plain_config(decoder: Decoder, dtype: str | None) -> dict[str, Any]:
    """The original's config.json, without its quantization, with the dtype that the folder will have, or the original's own."""
    config = read_config(decoder.folder)
    config.pop("quantization_config", None)
    stated = config.pop("torch_dtype", None)
    config["dtype"] = dtype or config.get("dtype") or stated or _commonest_dtype(decoder)
    config.setdefault("architectures", [type(decoder.model).__name__])
    return config


def _commonest_dtype(decoder: Decoder) -> str:
    """Of the stored tensors of the first block; without it transformers would take the dtype of some scale for the model's."""
    names = [name for name in decoder.source_names if name.startswith(decoder.block_name(0) + ".")]
    found = Counter(str(t.dtype).removeprefix("torch.") for t in map(decoder.read, names) if t.is_floating_point())
    return found.most_common(1)[0][0]


def _check_agreement(model: nn.Module, quantization: dict[str, Any], contents: Contents, form: str) -> None:
    """The library that will load the folder must look for exactly the layers that are in it: it finds them by rules of its
    own."""
    reader, written = reader_of(quantization), set(contents.layouts)
    other = "dense" if contents.conv1d else "compressed-tensors or dense"
    remedy = f"use --format {other}, or leave such layers dense with --skip"
    for name in sorted(written ^ reader.layers(model)):
        kind = type(model.get_submodule(name)).__name__
        what = f"takes {name}, a {kind}, for dense" if name in written else f"looks for codes of {name}, a {kind}"
        raise ExportError(f"transformers {what}, so --format {form} cannot hold this model; {remedy}")
    obstacle = reader.obstacle(model, written)
    if obstacle:
        raise ExportError(f"--format {form} cannot hold this model: {obstacle}; {remedy}")


def _all_tensors(decoder: Decoder, store: Store, form: Format, contents: Contents) -> Iterator[tuple[str, Tensor]]:
    yield from kept_tensors(decoder, contents.layouts, form.dtype)
    for index in range(len(decoder.blocks)):
        for name, result in store.read(index).items():
            for suffix, tensor in form.tensors(name, result.weight, contents).items():
                yield f"{name}.{suffix}", tensor


def kept_tensors(decoder: Decoder, replaced: Iterable[str], dtype: str | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model by the name that it has in the files, but for the weights of the layers that are replaced and for
    the second of two tied ones. dtype: that floating-point tensors are converted to; `None` leaves them as they are."""
    left_out = {f"{name}.weight" for name in replaced} | decoder.tied_names().keys()
    written: set[str] = set()
    for name, origin in decoder.source_names.items():
        if name in left_out:
            continue
        if origin.converter is None:
            yield _kept_name(name, origin.sources[0][1]), _converted(decoder.read(name), dtype, name)
            continue
        for _, source in origin.sources:  # stored in pieces, such as experts: they stay in pieces, under their own names
            if source not in written:
                written.add(source)
                yield source, _converted(decoder.checkpoint.read(source), dtype, source)


def _kept_name(name: str, source: str) -> str:
    """A tensor that the model calls something else keeps its name in the files; one that only lacked the model's prefix gets it."""
    return name if name.endswith(source) or source.endswith(name) else source


def _converted(tensor: Tensor, dtype: str | None, name: str) -> Tensor:
    return narrowed(tensor, DTYPES[dtype], name) if dtype and tensor.is_floating_point() else tensor


def _write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal pending, size
        write_tensors(folder / f"shard-{len(shards)}", pending, {"format": "pt"})
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


def _copy_companions(source: Path, target: Path, code: bool) -> None:
    """Tokenizer, generation settings, licence: small files beside the weights. code: also the model's own Python files, which its
    configuration names; nothing runs them here."""
    for pattern in (*_COMPANIONS, *(["*.py"] if code else [])):
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not any(path.match(other) for other in _NOT_COPIED):
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


def _refuse_other_content(target: Path, out: Path) -> None:
    """An export may take the place of an earlier one in the run's folder (`model`, `model-nf4`), of an empty folder, or of
    nothing."""
    own = target.resolve().parent == out.resolve() and target.name.split("-")[0] == "model"
    if target.exists() and not own and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} exists already; choose a new or empty folder for the export")


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
        os.replace(self._work, self._target)
