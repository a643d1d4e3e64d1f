"""Writes a quantized model as an ordinary Hugging Face folder, shard by shard, whatever the format of its linear layers.

What is not quantized is copied tensor by tensor from the original; what is comes block by block from the store. The folder
appears under its name only when it is complete. Equal runs write equal bytes. `write_folder` is the part that knows no store.
"""

from __future__ import annotations

import itertools
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
from cloq.models.experts import fuse
from cloq.streaming.store import Store, resumed, write_atomically, write_tensors, writing
from cloq.types import WeightLayout

SHARD_BYTES = 1 << 30

ANOTHER_TARGET = "make room or choose another --to, and run the same command again"
"""The remedy of commands that write one folder."""
_COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*", "*.tiktoken")
_NOT_COPIED = ("config.json", "*.index.json", "adapter_config.json", "quantize_config.json", "trainer_state.json")


def write_model(decoder: Decoder, store: Store, form: Format, target: Path, remedy: str = resumed("--out")) -> Path:
    """Writes `target` in the given format from a finished store. Replaces an earlier export of the run, and nothing else.

    Raises `ExportError` if the format cannot hold the result, the run is not finished, or `target` has other content; `RunError`
    with the remedy if the disk is full.
    """
    finished, total = store.finished(), len(decoder.blocks)
    if finished < total:
        raise ExportError(f"{store.out} has {finished} of {total} blocks finished; run cloq quantize again to complete it")
    refuse_other_content(target, target.resolve().parent == store.out.resolve() and target.name.split("-")[0] == "model")
    config, contents = _checked(decoder, {name: summary.layout for name, summary in store.summaries().items()}, form)
    return write_folder(_all_tensors(decoder, store, form, contents), config, decoder.folder, target, remedy)


def write_folder(
    tensors: Iterable[tuple[str, Tensor]], config: dict[str, Any], companions: Path, target: Path, remedy: str = ANOTHER_TARGET
) -> Path:  # fmt: skip
    """Writes named tensors as they come, at most a shard of them in memory, with a config.json and what lies beside the weights in
    the folder `companions`. `target` is replaced when all of it is there; `RunError` with the remedy if the disk is full."""
    with writing(target.parent, remedy), replaced_when_complete(target) as folder:
        _write_shards(tensors, folder)
        write_atomically(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        _copy_companions(companions, folder, code="auto_map" in config)
    return target


def check_format(decoder: Decoder, layouts: dict[str, WeightLayout], form: Format) -> None:
    """Raises `ExportError` if the format cannot hold layers of these layouts, or a file beside the weights may not be copied: to be asked
    before the work, not after it."""
    config, _ = _checked(decoder, layouts, form)
    _companions(decoder.folder, "auto_map" in config)


def _checked(decoder: Decoder, layouts: dict[str, WeightLayout], form: Format) -> tuple[dict[str, Any], Contents]:
    """The config.json and the contents of the folder to be."""
    config = plain_config(decoder, form.dtype)
    contents = _contents(decoder, layouts, config["dtype"])
    _check_experts(decoder, layouts, form)
    form.check(contents)
    quantization = form.quantization_config(contents)
    if quantization is not None:
        config["quantization_config"] = quantization
        _check_agreement(decoder.model, quantization, contents, form.name)
    return config, contents


def _check_experts(decoder: Decoder, layouts: dict[str, WeightLayout], form: Format) -> None:
    expert = next((name for name in layouts if name in decoder.expert_layers), None)
    if expert is not None and form.experts == "refused":
        raise ExportError(
            f"{expert} is one of {type(decoder.model).__name__}'s experts, and packed experts are not loaded from --format {form.name}; "
            "use --format gptq or container (integers), or dense, or leave them as they are with --skip 'experts.*'"
        )


def _contents(decoder: Decoder, layouts: dict[str, WeightLayout], dtype: str) -> Contents:
    linears = {name: m for name, m in decoder.model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)}
    conv1d = frozenset(name for name, module in linears.items() if is_conv1d(module))
    fused = tuple(dict.fromkeys(_in_pieces(decoder)))
    return Contents(layouts, tuple(name for name in linears if name not in layouts), decoder.prefix, dtype, conv1d, fused)


def _in_pieces(decoder: Decoder) -> Iterator[str]:
    """Names of the tensors that transformers would make of several in the files."""
    for name, origin in decoder.source_names.items():
        layer = decoder.expert_layers.get(name.rpartition(".")[0])
        if layer is None and not origin.direct:
            yield name
        elif layer is not None and (origin.direct or origin.fused.converter is not None):
            yield f"{layer.experts}.{'down_proj' if layer.inner else 'gate_up_proj'}"


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
    apart = form.experts == "apart"
    yield from kept_tensors(decoder, contents.layouts, form.dtype, experts_apart=apart)
    replaced = _replaced_tensors(decoder, store, form, contents)
    yield from replaced if apart else experts_fused(decoder, replaced, form.dtype)


def _replaced_tensors(decoder: Decoder, store: Store, form: Format, contents: Contents) -> Iterator[tuple[str, Tensor]]:
    for index in range(len(decoder.blocks)):
        for name, result in store.read(index).items():
            for suffix, tensor in form.tensors(name, result.weight, contents).items():
                yield f"{name}.{suffix}", tensor


def kept_tensors(
    decoder: Decoder, replaced: Iterable[str], dtype: str | None, *, experts_apart: bool = False
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Every tensor of the model by the name that it has in the files, but for the weights of the layers that are replaced and for
    the second of two tied ones. dtype: that floating-point tensors are converted to; `None` leaves them as they are.

    experts_apart: where experts are among what is replaced. The folder then holds a model that transformers has no rules for, and every
    tensor has the name that it has in that model. Otherwise what else these experts have is left to `experts_fused`.
    """
    left_out = {f"{name}.weight" for name in replaced} | decoder.tied_names().keys()
    touched = {layer.experts for name in replaced if (layer := decoder.expert_layers.get(name))}
    written: set[str] = set()
    for name, origin in decoder.source_names.items():
        layer = decoder.expert_layers.get(name.rpartition(".")[0])
        if name in left_out or (layer and layer.experts in touched and not experts_apart):
            continue
        if touched and experts_apart:
            yield name, _converted(decoder.read(name), dtype, name)
            continue
        if origin.direct:
            yield _kept_name(name, origin.sources[0][1]), _converted(decoder.read(name), dtype, name)
            continue
        for _, source in origin.sources:  # stored in pieces or together, such as experts: they stay so, under their own names
            if source not in written:
                written.add(source)
                yield source, _converted(decoder.checkpoint.read(source), dtype, source)


def experts_fused(decoder: Decoder, tensors: Iterable[tuple[str, Tensor]], dtype: str | None) -> Iterator[tuple[str, Tensor]]:
    """Dense tensors as they come, those of experts under the names and in the shapes that plain transformers saves and loads.

    Of experts that have any tensor here the others are read from the decoder. The tensors of one layer's experts come one after the other.
    """
    from transformers.core_model_loading import revert_weight_conversion

    def experts(named: tuple[str, Tensor]) -> str | None:
        layer = decoder.expert_layers.get(named[0].rpartition(".")[0])
        return layer.experts if layer else None

    for path, group in itertools.groupby(tensors, experts):
        if path is None:
            yield from group
            continue
        own = dict(group)

        def tensor(layer: str, kind: str, path: str = path, own: dict[str, Tensor] = own) -> Tensor:
            name = f"{path}.{layer}.{kind}"
            return own[name] if name in own else _converted(decoder.read(name), dtype, name)

        fused = {f"{path}.{leaf}": value for leaf, value in fuse(decoder.model.get_submodule(path), tensor).items()}
        for name, value in revert_weight_conversion(decoder.model, fused).items():
            yield name, value.clone()  # views of one tensor, which a file does not take


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
    for path in _companions(source, code):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _companions(source: Path, code: bool) -> list[Path]:
    """Raises `ExportError` for one that is a link to somewhere else: a copy of it, in a folder that may be published, could be of any file
    that the user can read. The hub's cache links to the blobs beside its snapshots."""
    patterns = (*_COMPANIONS, *(["*.py"] if code else []))
    found = [path for pattern in patterns for path in sorted(source.glob(pattern)) if path.is_file()]
    found = [path for path in found if not any(path.match(other) for other in _NOT_COPIED)]
    here = source.resolve()
    home = here.parents[1] if here.parent.name == "snapshots" else here
    for path in found:
        if not path.resolve().is_relative_to(home):
            raise ExportError(
                f"{path} is a link to {path.resolve()}, outside of the model's folder, and would be copied into the export; "
                "put the file itself there, or remove the link"
            )
    return found


def refuse_other_content(target: Path, own: bool) -> None:
    """An export may take the place of an earlier one of its run (`own`), of an empty folder, or of nothing. Raises `ExportError`."""
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
