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
from typing import Any

from torch import Tensor

from cloq.errors import ExportError
from cloq.export import FORMATS
from cloq.export.dense import DTYPES, narrowed
from cloq.export.folder import experts_fused, kept_tensors, plain_config, write_folder
from cloq.export.peft import AdapterFolder
from cloq.export.read import read_config
from cloq.models import is_conv1d
from cloq.quantizers.regrid import onto_grid_of
from cloq.use.pairing import Layer, Pair

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
    pair = Pair.open(out, adapter, base, trust_remote_code)
    if dtype in PACKED or _is_quantized(to):
        raise _packed_refusal(pair)
    _refuse_content(to, out)
    layers: dict[str, MergedLayer] = {}
    initial = _initial(out, pair.adapter)

    def merged() -> Iterator[tuple[str, Tensor]]:
        for layer in pair.layers():
            rounded = narrowed(layer.merged, DTYPES[dtype], layer.name)
            layers[layer.name] = _measured(layer, rounded, initial)
            yield f"{layer.name}.weight", rounded.T if is_conv1d(pair.modules[layer.name]) else rounded
            if progress is not None:
                progress(len(layers), len(pair.modules))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from kept_tensors(pair.decoder, pair.modules, dtype)
        yield from experts_fused(pair.decoder, merged(), dtype)

    write_folder(tensors(), plain_config(pair.decoder, dtype), pair.base, to)
    return Merged(to, pair.base, pair.adapter.folder, dtype, layers)


def _packed_refusal(pair: Pair) -> ExportError:
    """Why not, what it would cost, and what to do instead."""
    if not pair.source.names:
        return ExportError(f"{pair.base} is not quantized, so there is nothing packed to merge into; merge with --dtype bfloat16")
    losses, sizes = [], []
    for layer in pair.layers():
        if layer.name in pair.source.names:
            again = onto_grid_of(pair.source.weight(layer.name), layer.merged).dequantize()
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


def _measured(layer: Layer, rounded: Tensor, initial: AdapterFolder | None) -> MergedLayer:
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


def _is_quantized(folder: Path) -> bool:
    return (folder / "config.json").is_file() and "quantization_config" in read_config(folder)


def _refuse_content(target: Path, out: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} exists already; choose a new or empty folder for the merged model")
    if target.resolve().parent == out.resolve() and target.name.split("-")[0] in ("model", "adapter", ".cloq"):
        raise ExportError(
            f"{target} is where the run keeps its own parts; choose another name for the merged model, such as {out / 'merged'}"
        )
