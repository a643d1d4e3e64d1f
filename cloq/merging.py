"""A base and its adapter → one dense model: `Q + B A` in place of every layer that has factors.

The base is read as its files decode, layer by layer, with PEFT's own scaling and its own rule for which layers an adapter is on. Sums
are done in float32 and rounded once; never more than a shard is in memory. Base and adapter are all that is needed, and either may
be someone else's.

Into a packed base nothing can be merged: its grid does not hold `Q + B A`, and rounding to the grid takes away what the adapter put
there. `merge` refuses it with the size of that loss.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cloq.errors import ExportError
from cloq.export import FORMATS
from cloq.export.dense import DTYPES, narrowed
from cloq.export.folder import kept_tensors, plain_config, write_folder
from cloq.export.peft import AdapterFolder
from cloq.export.read import QuantizedFolder, read_config
from cloq.loading import base_folder
from cloq.models import Decoder, is_conv1d, is_linear, linear_shape, locate
from cloq.quantizers.regrid import onto_grid_of

PACKED = ("packed", *(name for name in FORMATS if name != "dense"))
"""Names of what a merge is refused into."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MergedLayer:
    """Sizes of what one layer is made of, each relative to its merged weight `W = Q + B A`, in the Frobenius norm.

    adapter: `‖B A‖ / ‖W‖`. rounding: `‖round(W) − W‖ / ‖W‖`. trained: `‖B A − B₀ A₀‖ / ‖W‖` with the run's initial factors, where
    another adapter than those was merged.
    """

    adapter: float
    rounding: float
    trained: float | None = None


@dataclass(frozen=True)
class Merged:
    """A written model: its folder, what it was made of, and by full name every layer that the adapter changed."""

    target: Path
    base: Path
    adapter: Path
    dtype: str
    layers: dict[str, MergedLayer]

    def lines(self) -> list[str]:
        """For people: what was written, and whether the rounding is small beside what it must not lose."""
        adapter, rounding, trained = (self.mean(what) or 0.0 for what in ("adapter", "rounding", "trained"))
        said = [
            f"merged    {self.target}  ({self.dtype}, {len(self.layers)} layers changed)",
            f"base      {self.base}",
            f"adapter   {self.adapter}",
            f"relative size of its product BA in a merged weight {adapter:.2%}, mean over the layers",
            f"relative error of a weight by rounding to {self.dtype} {rounding:.2%}, which is {_share(rounding, adapter)} of the adapter",
        ]
        if self.mean("trained") is None:
            return said
        said.append(f"relative size of what training changed {trained:.2%}; the rounding is {_share(rounding, trained)} of that")
        if rounding > trained / 2:
            finer = "float16 or float32" if self.dtype == "bfloat16" else "float32"
            said.append(f"that is of the size of the rounding: --dtype {finer} keeps more of it")
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        paths = {name: str(getattr(self, name)) for name in ("target", "base", "adapter")}
        means = {what: self.mean(what) for what in ("adapter", "rounding", "trained")}
        layers = {name: asdict(layer) for name, layer in self.layers.items()}
        return {**paths, "dtype": self.dtype, "mean": means, "layers": layers}

    def mean(self, what: str) -> float | None:
        """Mean over the layers of one of `MergedLayer`'s sizes; `None` where it is not known."""
        values = [value for layer in self.layers.values() if (value := getattr(layer, what)) is not None]
        return statistics.fmean(values) if values else None


def merge(
    out: str | Path, to: str | Path, *, adapter: str | Path | None = None, base: str | Path | None = None, dtype: str = "bfloat16",
    trust_remote_code: bool = False, progress: Progress | None = None,
) -> Merged:  # fmt: skip
    """Writes the dense model that a finished run's base and adapter amount to, an ordinary Hugging Face folder, into `to`.

    adapter, base: other folders than those of the run, as for `cloq.load`. dtype: bfloat16, float16 or float32, of the whole model.

    Raises `ExportError` if the two do not belong together, the adapter is more than a plain LoRA of linear layers, `to` is not a new
    or empty folder, or `dtype` names a packed format: then with the error that rounding back to the base's grid would bring.
    """
    out, to = Path(out), Path(to)
    if dtype not in (*DTYPES, *PACKED):
        raise ExportError(f"dtype is {dtype!r}; a merged model takes {', '.join(DTYPES)}")
    pair = _Pair.open(out, adapter, base, trust_remote_code)
    if dtype in PACKED or _is_quantized(to):
        raise pair.packed_refusal()
    _refuse_content(to, out)
    layers: dict[str, MergedLayer] = {}
    initial = _initial(out, pair.adapter)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from kept_tensors(pair.decoder, pair.modules, dtype)
        for layer in pair.layers():
            rounded = narrowed(layer.merged, DTYPES[dtype], layer.name)
            layers[layer.name] = _measured(layer, rounded, initial)
            yield f"{layer.name}.weight", rounded.T if is_conv1d(pair.modules[layer.name]) else rounded
            if progress is not None:
                progress(len(layers), len(pair.modules))

    write_folder(tensors(), plain_config(pair.decoder, dtype), pair.base, to)
    return Merged(to, pair.base, pair.adapter.folder, dtype, layers)


class _Layer(NamedTuple):
    """delta: what the adapter adds. merged: the sum. Both `(out, in)` float32."""

    name: str
    delta: Tensor
    merged: Tensor


@dataclass(frozen=True, eq=False)
class _Pair:
    """A base and an adapter that were found to fit. modules: the layers with factors, by full name, without weights."""

    base: Path
    source: QuantizedFolder
    decoder: Decoder
    adapter: AdapterFolder
    modules: dict[str, nn.Module]

    @classmethod
    def open(cls, out: Path, adapter: str | Path | None, base: str | Path | None, trust_remote_code: bool) -> _Pair:
        factors = AdapterFolder(adapter or out / "adapter")
        folder = locate(str(base or base_folder(out, factors)))
        if base is None:
            _refuse_another_base(factors, folder, out)
        _refuse_more_than_lora(factors)
        source = QuantizedFolder(folder)
        decoder = source.decoder(trust_remote_code=trust_remote_code)
        return cls(folder, source, decoder, factors, _adapted(factors, decoder))

    def layers(self) -> Iterator[_Layer]:
        for name, module in self.modules.items():
            delta = self.adapter.delta(name)
            yield _Layer(name, delta, self.decoder.weight(name, module) + delta)

    def packed_refusal(self) -> ExportError:
        """Why not, what it would cost, and what to do instead."""
        if not self.source.names:
            return ExportError(f"{self.base} is not quantized, so there is nothing packed to merge into; merge with --dtype bfloat16")
        losses, sizes = [], []
        for layer in self.layers():
            if layer.name in self.source.names:
                again = onto_grid_of(self.source.weight(layer.name), layer.merged).dequantize()
                losses.append(_relative(again - layer.merged, layer.merged))
                sizes.append(_relative(layer.delta, layer.merged))
        return ExportError(
            "an adapter cannot be merged into a packed base, whose grid does not hold Q + BA: plain rounding back to the base's own scales "
            f"and zero points (no data, no GPTQ) would change the weights by {statistics.fmean(losses):.1%} (relative error, mean over "
            f"{len(losses)} layers), where the adapter itself is {statistics.fmean(sizes):.1%} of them. Merge into a dense model with "
            "--dtype bfloat16, and quantize that with cloq quantize, which calibrates and fits new factors"
        )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole > 0 else "all"


def _measured(layer: _Layer, rounded: Tensor, initial: AdapterFolder | None) -> MergedLayer:
    trained = None
    if initial is not None and layer.name in initial.names and initial.read(layer.name).delta().shape == layer.delta.shape:
        trained = _relative(layer.delta - initial.delta(layer.name), layer.merged)
    return MergedLayer(_relative(layer.delta, layer.merged), _relative(rounded.float() - layer.merged, layer.merged), trained)


def _relative(part: Tensor, whole: Tensor) -> float:
    norm = float(whole.norm())
    return float(part.norm()) / norm if norm > 0 else 0.0


def _initial(out: Path, adapter: AdapterFolder) -> AdapterFolder | None:
    """The run's own factors, where others are merged."""
    own = out / "adapter"
    if not own.is_dir() or own.resolve() == adapter.folder.resolve():
        return None
    return AdapterFolder(own)


# -- what does not fit -------------------------------------------------------------------------------------------------


def _is_quantized(folder: Path) -> bool:
    return (folder / "config.json").is_file() and "quantization_config" in read_config(folder)


def _refuse_content(target: Path, out: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} exists already; choose a new or empty folder for the merged model")
    if target.resolve().parent == out.resolve() and target.name.split("-")[0] in ("model", "adapter", ".cloq"):
        raise ExportError(
            f"{target} is where the run keeps its own parts; choose another name for the merged model, such as {out / 'merged'}"
        )


def _refuse_another_base(adapter: AdapterFolder, base: Path, out: Path) -> None:
    """An adapter that names a base which is neither this one nor another export of the run is not for this one. A run that has moved
    since names a folder that is gone; a hub id never is."""
    stated = adapter.config.get("base_model_name_or_path")
    if not stated:
        return
    named = Path(stated)
    if (named / "config.json").is_file():
        ours = named.resolve() == base.resolve() or named.resolve().parent == out.resolve()
    else:
        ours = named.is_absolute() or named.name == base.name
    if not ours:
        raise ExportError(
            f"the adapter in {adapter.folder} says that it belongs to {stated}, not to {base}; name the base that it was trained on "
            "with --base"
        )


_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others take something out of the base when loaded
}
_EXTRAS = (
    "use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip


def _refuse_more_than_lora(adapter: AdapterFolder) -> None:
    config = adapter.config
    odd = [f"{key} is {config[key]!r}" for key, plain in _PLAIN.items() if config.get(key, plain[0]) not in plain]
    odd += [f"{key} is {config[key]!r}" for key in _EXTRAS if config.get(key)]
    odd += adapter.other_keys()
    if odd:
        raise ExportError(
            f"the adapter in {adapter.folder} is more than a plain LoRA of linear layers ({odd[0]}), which B A alone does not give; "
            "merge it with PEFT: export the base with cloq export --format dense, then merge_and_unload()"
        )


def _adapted(adapter: AdapterFolder, decoder: Decoder) -> dict[str, nn.Module]:
    """The layers that PEFT puts the factors on, in the model's order. Raises `ExportError` where file, settings and model differ."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    linears = {name: module for name, module in decoder.model.named_modules() if is_linear(module)}
    config = LoraConfig.from_pretrained(str(adapter.folder))
    targets = {name for name in linears if config.target_modules and check_target_module_exists(config, name)}
    where = f"the adapter in {adapter.folder} and the base in {decoder.folder} do not belong together"
    for name in sorted(adapter.names - linears.keys()):
        raise ExportError(f"{where}: it has factors for {name}, which is no linear layer of {type(decoder.model).__name__}")
    for name in sorted(targets - adapter.names):
        raise ExportError(f"{where}: its settings put factors on {name}, but it has none for that layer")
    for name in sorted(adapter.names - targets):
        raise ExportError(
            f"{adapter.folder} has factors for {name} that PEFT leaves aside, by the target_modules in its settings; mend those"
        )
    for name in sorted(targets):
        _refuse_misfit(adapter, name, linear_shape(linears[name]), where)
        _refuse_tied(decoder, name)
        own = adapter.base_weight(name)
        if own is not None and not torch.equal(own.float(), decoder.read(f"{name}.weight").float()):
            raise ExportError(f"{where}: it brings a weight of {name} with it, and the base has another")
    return {name: module for name, module in linears.items() if name in targets}


def _refuse_misfit(adapter: AdapterFolder, name: str, shape: tuple[int, int], where: str) -> None:
    factors, (rank, _) = adapter.read(name), adapter.rank_and_alpha(name)
    found = (factors.B.shape[0], factors.A.shape[1])
    if found != shape:
        raise ExportError(f"{where}: its factors for {name} are for a layer of shape {found} (out, in), the base has {shape}")
    if factors.rank != rank:
        raise ExportError(
            f"{adapter.folder} has factors of rank {factors.rank} for {name}, and its configuration says {rank}: save it again"
        )


def _refuse_tied(decoder: Decoder, name: str) -> None:
    tied = decoder.tied_names()
    if f"{name}.weight" in {*tied, *tied.values()}:
        other = tied.get(f"{name}.weight") or next(key for key, value in tied.items() if value == f"{name}.weight")
        raise ExportError(
            f"the adapter changes {name}, whose weight is also that of {other.removesuffix('.weight')}: merged into one it would change "
            "both; train without this layer, or load base and adapter side by side with cloq.load"
        )
