"""`cloq check`: does what lies on disk hold together, and is it what was fitted? Found out from the files alone, without loading
the model and without the libraries that load it. Every finding says what was looked at; a failed one also says what to do.

A tensor that is missing from a packed base makes `from_pretrained` abort the process, so `cloq.load` asks `check_base` first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cloq.algebra import packing
from cloq.algebra.linalg import all_finite
from cloq.errors import CloqError
from cloq.export.gptq import GptqReader
from cloq.export.peft import AdapterFolder
from cloq.export.read import QuantizedFolder
from cloq.models import Decoder, load_config
from cloq.models.checkpoint import INDEX, SINGLE
from cloq.models.skeleton import build_skeleton
from cloq.streaming.store import Store
from cloq.types import LayerResult, LoraFactors
from cloq.use.pairing import fit

PROBES = 4
_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """ok: whether it is as it should be. what: what was looked at, and for a failure what is wrong and what to do."""

    ok: bool
    what: str


def check(out: str | Path) -> list[Finding]:
    """Everything about a finished run: its base (also other exports beside it), its adapter, and both against the stored
    blocks."""
    out, store = Path(out), Store(out)
    try:
        adapter = AdapterFolder(out / "adapter")
    except CloqError as error:
        return [Finding(False, str(error))]
    base = out / "model" if (out / "model").is_dir() else Path(str(adapter.config.get("base_model_name_or_path")))
    exports = sorted(path for path in out.glob("model-*") if (path / "config.json").is_file())
    findings = []
    for folder in (base, *exports):
        of_folder = check_base(folder)
        fine = all(finding.ok for finding in of_folder)
        findings += of_folder + (_gathered(_against_store(store, folder), folder.name) if fine else [])
    return findings + _gathered(_check_adapter(adapter, base, store), "adapter") + _gathered(_check_store(store), "stored blocks")


def _check_store(store: Store) -> Iterator[Finding]:
    if store.finished():
        damage = store.damage()
        yield Finding(damage is None, damage.message if damage else f"stored blocks: all {store.finished()} are as they were written")


def _gathered(findings: Iterator[Finding], about: str) -> list[Finding]:
    """All of them, up to an error that ends the search and is a failure itself."""
    found = []
    try:
        for finding in findings:
            found.append(finding)
    except CloqError as error:
        found.append(Finding(False, f"{about}: {error}"))
    except Exception as error:  # what is looked into may be damaged in any way; that it cannot be looked into is the finding
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        found.append(Finding(False, f"{about}: cannot be looked into ({reason}); make it again: run the same cloq quantize command"))
    return found


# -- the base ----------------------------------------------------------------------------------------------------------


def check_base(folder: str | Path, trust_remote_code: bool = False) -> list[Finding]:
    """A model folder: files, configuration, and every tensor's presence, shape, dtype and range. Reads headers, scales and zero
    points."""
    folder = Path(folder)
    return _gathered(_check_base(folder, trust_remote_code), folder.name)


def _check_base(folder: Path, trust_remote_code: bool) -> Iterator[Finding]:
    source = QuantizedFolder(folder)
    decoder = source.decoder(trust_remote_code=trust_remote_code)
    name, again = folder.name, "export it again: run the same cloq quantize command, or cloq export"
    headers = _headers(folder)
    yield Finding(True, f"{name}: {len(headers)} tensors, of which the model finds all that it needs, in their shapes")
    used = {file for origin in decoder.source_names.values() for _, file in origin.sources}
    extra = sorted(file for file in headers if file not in used and file not in source.own_tensors())
    yield _finding(
        f"{name}: no tensor that nothing asks for",
        extra,
        f"not part of the model: another model's files may be mixed in; {again}",
    )
    if source.reader is None:
        return
    expected = source.reader.layers(decoder.model)
    wrong = sorted(expected ^ source.names)
    yield _finding(
        f"{name}: the {len(expected)} layers that transformers takes for quantized are the ones with codes",
        wrong,
        f"differ; {again}",
    )
    obstacle = source.reader.obstacle(decoder.model, expected)
    yield Finding(not obstacle, f"{name}: {obstacle or 'transformers can build the model around packed layers'}")
    if isinstance(source.reader, GptqReader) and source.reader.dynamic:
        yield Finding(True, f"{name}: layers of several widths, which cloq.load and GPTQModel load, plain transformers does not")
    if not source.names.isdisjoint(decoder.expert_layers):
        yield Finding(True, f"{name}: holds packed experts, for cloq.load or GPTQModel; plain transformers would fill in random ones")
    bad = sorted(_wrong_tensors(source, headers))
    yield _finding(f"{name}: every packed tensor is there, in the shape and dtype of its format", bad, again)
    if not wrong and not bad:
        yield _zero_format(name, source)
        yield from _check_values(name, source)


def _headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor, from the files' headers. The files themselves have been opened before."""
    index = folder / INDEX
    shards = sorted(set(json.loads(index.read_text("utf8"))["weight_map"].values())) if index.exists() else [SINGLE]
    found = {}
    for shard in shards:
        with (folder / shard).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found |= {name: (about["dtype"], tuple(about["shape"])) for name, about in header.items() if name != "__metadata__"}
    return found


_DTYPES = {
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8",
}  # fmt: skip


def _wrong_tensors(source: QuantizedFolder, headers: dict) -> Iterator[str]:
    for layer in source.names:
        specs = source.reader.specs(layer, source.shape(layer))
        for suffix, spec in specs.items():
            dtype, shape = headers.get(f"{layer}.{suffix}", (None, None))
            if dtype is None:
                yield f"{layer}.{suffix} is missing"
            elif dtype not in {_DTYPES[d] for d in spec.dtypes} or (spec.shape is not None and shape != spec.shape):
                yield f"{layer}.{suffix} is {dtype} {list(shape)}"


def _zero_format(name: str, source: QuantizedFolder) -> Finding:
    """v1 stores zero − 1: a symmetric grid survives that, an asymmetric zero point of 0 doesn't."""
    config = source.quantization_config
    if config.get("quant_method") != "gptq":
        return Finding(True, f"{name}: zero points need no version in {config.get('quant_method', 'bitsandbytes')}")
    if source.reader.version == 2:
        return Finding(True, f"{name}: zero points are stored as they are (gptq_v2)")
    if config.get("sym", True):
        return Finding(True, f"{name}: zero points are stored minus one (gptq v1), which a symmetric grid survives")
    return Finding(
        False,
        f"{name}: an asymmetric grid with zero points stored minus one (gptq v1), where a zero of 0 has no code; a v2 base was "
        "probably loaded and saved again: export it again with cloq export --format gptq",
    )


def _check_values(name: str, source: QuantizedFolder) -> Iterator[Finding]:
    """Scales of all layers, zero points where the configuration promises a symmetric grid, codes of a few layers."""
    names = sorted(source.names)
    bad = [layer for layer in names if not _finite(source, layer)]
    yield _finding(f"{name}: all scales are finite", bad, "the files are damaged: export it again")
    if source.quantization_config.get("quant_method") == "gptq" and source.quantization_config.get("sym"):
        skewed = [layer for layer in names if not _symmetric(source, layer)]
        what = "have other zero points, which servers ignore: set sym to false in config.json"
        yield _finding(f"{name}: config.json says symmetric, and every zero point is in the middle", skewed, what)
    for layer in _probes(names):
        weight = source.weight(layer)
        if not all_finite(weight.dequantize()):
            yield Finding(False, f"{name}: {layer} does not decode to finite values; export it again")
    yield Finding(True, f"{name}: {len(_probes(names))} layers decode ({', '.join(_probes(names)[:_SHOWN])}, …)")


def _finite(source: QuantizedFolder, layer: str) -> bool:
    tensors = source.small_tensors(layer)
    return all(all_finite(t) for t in tensors.values() if t.is_floating_point())


def _symmetric(source: QuantizedFolder, layer: str) -> bool:
    reader, tensors = source.reader, source.small_tensors(layer)
    bits, _ = reader.grid(layer)
    zero = packing.unpack(tensors["qzeros"], bits, tensors["scales"].shape[1])
    middle = 2 ** (bits - 1) - (1 if reader.version == 1 else 0)
    return bool((zero == middle).all())


# -- the adapter -------------------------------------------------------------------------------------------------------


def check_adapter(adapter: AdapterFolder, base: Path) -> list[Finding]:
    """An adapter on a base: settings, and the names, shapes and values of its factors. Whether it was made for this base or for another one
    of the same shapes, the files do not say."""
    return _gathered(_fits(adapter, base), "adapter")


def _check_adapter(adapter: AdapterFolder, base: Path, store: Store) -> Iterator[Finding]:
    yield _belongs(adapter.config.get("base_model_name_or_path"), base)
    findings = list(_fits(adapter, base))
    yield from findings
    if all(finding.ok for finding in findings):
        yield _not_initialized_again(adapter, adapter.names, store, _AGAIN)
        yield _as_fitted(adapter, store)


_AGAIN = "write it again by running the same cloq quantize command"


def _fits(adapter: AdapterFolder, base: Path) -> Iterator[Finding]:
    yield from _check_settings(adapter.config)
    if not adapter.of_one_rank:
        yield Finding(
            True, "adapter: layers of several ranks (rank_pattern), which PEFT reads; for servers that do not: cloq export --one-rank"
        )
    found = fit(adapter, build_skeleton(load_config(base), torch.float32))
    yield _finding("adapter: factors for every layer that PEFT will put some on", found.missing, f"missing; {_AGAIN}")
    yield _finding("adapter: no factors that PEFT would leave aside", found.unused, f"not used; {_AGAIN}")
    bare = sorted(QuantizedFolder(base).names - adapter.names)
    yield _finding("adapter: factors for every quantized layer", bare, "without; use the base it was made for")
    yield _finding("adapter: factors in the shapes of their layers", found.misshapen, _AGAIN)
    if not found.missing and not found.misshapen:
        yield _finding(
            "adapter: factors finite, multiplied by what they were made for", sorted(_changed_product(adapter, found.modules)), _AGAIN
        )


def _belongs(stated: str | None, base: Path) -> Finding:
    if stated is not None and Path(stated).resolve() == base.resolve():
        return Finding(True, f"adapter: belongs to the base in {base}")
    return Finding(
        False,
        f"adapter: says that it belongs to {stated}, which is not {base.resolve()}: set base_model_name_or_path in "
        "adapter_config.json, or name the base when loading (cloq.load does)",
    )


def _not_initialized_again(adapter: AdapterFolder, targets: Iterable[str], store: Store, again: str) -> Finding:
    """QLoRA's B is zero; any other that is has been through PEFT's own initialisation."""
    known = (store.folder / "manifest.json").is_file()
    if known and store.manifest()["settings"]["lora"]["init"] == "zero":
        return Finding(True, "adapter: B is zero where the run asked for that (--init zero)")
    zero = sorted(name for name in targets if not bool(adapter.read(name).B.any()))
    remedy = f"have a B of zeros, as get_peft_model leaves it; {again}, and load it with PeftModel.from_pretrained"
    return _finding("adapter: not initialised again", zero, remedy)


def _as_fitted(adapter: AdapterFolder, store: Store) -> Finding:
    probes = list(_stored_probes(store))
    if not probes:
        return Finding(True, "adapter: no stored blocks (.cloq) left to compare with")
    differing = [name for name, result in probes if not _equal(adapter.read(name), result.factors, adapter.scale(name))]
    remedy = "differ from the run's: trained since, or of another run; for the initial ones run the same cloq quantize command"
    return _finding(f"adapter: factors of {len(probes)} layers are the fitted ones", differing, remedy)


def _equal(one: LoraFactors, other: LoraFactors, scale: float) -> bool:
    """Whether one's product times scale, which its factors share, is the other's."""
    return all(torch.equal(x * scale**0.5, y) for x, y in ((one.A, other.A), (one.B, other.B)))


def _check_settings(config: dict[str, Any]) -> Iterator[Finding]:
    off = ("use_rslora", "use_dora", "lora_bias", "modules_to_save", "layers_to_transform")
    wanted = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}
    wrong = [f"{key} is {config[key]!r}, not {value!r}" for key, value in wanted.items() if config.get(key, value) != value]
    wrong += [f"{key} is {config[key]!r}" for key in off if config.get(key)]
    yield _finding("adapter: settings that leave the fitted product as it is", wrong, "set them in adapter_config.json")


def _changed_product(adapter: AdapterFolder, names: Iterable[str]) -> Iterator[str]:
    """Layers that compute with something else than the product that was fitted."""
    fitted = adapter.fitted_scale
    for name in names:
        factors, (rank, alpha) = adapter.read(name), adapter.rank_and_alpha(name)
        if fitted not in (None, alpha / rank):
            yield f"{name} is multiplied by alpha / r = {alpha} / {rank}, not by {fitted:g}"
        elif not (all_finite(factors.A) and all_finite(factors.B)):
            yield f"{name} holds NaN or Inf"


# -- against the stored blocks -----------------------------------------------------------------------------------------


def _against_store(store: Store, folder: Path) -> Iterator[Finding]:
    """A few layers, decoded from the folder's files, equal what was fitted, bit by bit."""
    probes = list(_stored_probes(store))
    if not probes:
        yield Finding(True, f"{folder.name}: no stored blocks (.cloq) left to compare with")
        return
    decoder = QuantizedFolder(folder).decoder()
    differing = [name for name, result in probes if not _decodes_to(decoder, name, result)]
    remedy = "decode to something else than was fitted; export it again with cloq export"
    yield _finding(f"{folder.name}: {len(probes)} layers decode to what was fitted, bit by bit", differing, remedy)


def _stored_probes(store: Store) -> Iterator[tuple[str, LayerResult]]:
    """One layer of each of a few blocks, another one each time."""
    blocks = _probes(range(store.finished()))
    for turn, index in enumerate(blocks):
        results = store.read(index)
        names = list(results)
        if names:
            name = names[turn * len(names) // len(blocks)]
            yield name, results[name]


def _decodes_to(decoder: Decoder, name: str, result: LayerResult) -> bool:
    """A dense export has rounded the decoded weight to its own precision; decoding of packed layers gives float32."""
    precision = decoder.read(f"{name}.weight").dtype
    return torch.equal(decoder.weight(name, decoder.model.get_submodule(name)), result.weight.dequantize().to(precision).float())


def _probes(items):
    """At most `PROBES` of them, the first and the last included, evenly spread."""
    items = list(items)
    count = min(PROBES, len(items))
    return [items[i * (len(items) - 1) // max(1, count - 1)] for i in range(count)]


def _finding(what: str, wrong: Sequence[str], remedy: str) -> Finding:
    if not wrong:
        return Finding(True, what)
    shown = ", ".join(wrong[:_SHOWN]) + (f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else "")
    return Finding(False, f"{what}: NO: {shown}: {remedy}")
