"""A base and an adapter, found to belong together: the layers with factors, each with its decoded weight and what PEFT adds to it.

What does not fit is refused before anything is done with it: another base, another model's factors, factors that PEFT would leave
aside or miss, and adapters that are more than `B A` on linear layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cloq.errors import CloqError, ExportError
from cloq.export.peft import AdapterFolder
from cloq.export.read import QuantizedFolder
from cloq.loading import base_folder
from cloq.models import Decoder, is_linear, linear_shape, locate


class Layer(NamedTuple):
    """delta: what the adapter adds. merged: the sum. Both `(out, in)` float32."""

    name: str
    delta: Tensor
    merged: Tensor


@dataclass(frozen=True, eq=False)
class Pair:
    """A base and an adapter that were found to fit. modules: the layers with factors, by full name, without weights."""

    base: Path
    source: QuantizedFolder
    decoder: Decoder
    adapter: AdapterFolder
    modules: dict[str, nn.Module]

    @classmethod
    def open(cls, out: Path, adapter: str | Path | None, base: str | Path | None, trust_remote_code: bool) -> Pair:
        """Those of a finished run, or others. Raises `ExportError` for what does not fit, `ModelError` for a damaged base."""
        factors = AdapterFolder(adapter or out / "adapter")
        folder = locate(str(base or base_folder(out, factors)))
        if base is None:
            refuse_another_base(factors, folder, out)
        factors.refuse_more_than_lora()
        source = QuantizedFolder(folder)
        decoder = source.decoder(trust_remote_code=trust_remote_code)
        return cls(folder, source, decoder, factors, _adapted(factors, decoder))

    def layers(self) -> Iterator[Layer]:
        for name, module in self.modules.items():
            delta = self.adapter.delta(name)
            yield Layer(name, delta, self.decoder.weight(name, module) + delta)


# -- what does not fit -------------------------------------------------------------------------------------------------


def refuse_another_base(adapter: AdapterFolder, base: Path, out: Path) -> None:
    """An adapter that names a base which is neither this one, nor a copy of it, nor another export of the run is not for this one. A
    run that has moved since names a folder that is gone; a hub id is another model."""
    stated = adapter.config.get("base_model_name_or_path")
    if not stated:
        return
    named = Path(stated)
    if (named / "config.json").is_file():
        ours = named.resolve() == base.resolve() or named.resolve().parent == out.resolve() or _same_content(named, base)
    else:
        ours = named.is_absolute() or named.name == base.name
    if not ours:
        raise ExportError(
            f"the adapter in {adapter.folder} says that it belongs to {stated}, not to {base}; name the base that it was trained on "
            "with --base"
        )


def _same_content(one: Path, other: Path) -> bool:
    """Of a run that was copied."""
    try:
        return QuantizedFolder(one).fingerprint() == QuantizedFolder(other).fingerprint()
    except CloqError:
        return False


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
