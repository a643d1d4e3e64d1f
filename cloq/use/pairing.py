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
from cloq.models import Decoder, is_linear, linear_shape, load_config, locate
from cloq.models.experts import experts_of
from cloq.models.skeleton import build_skeleton
from cloq.use.experts_apart import names_experts


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
        return cls(folder, source, decoder, factors, _fitting(factors, decoder))

    def layers(self) -> Iterator[Layer]:
        for name, module in self.modules.items():
            delta = self.adapter.delta(name)
            yield Layer(name, delta, self.decoder.weight(name, module) + delta)


def base_folder(out: Path, adapter: AdapterFolder) -> Path:
    """The run's own base, or where there is none the one that the adapter names, as after `cloq init`."""
    stated = adapter.config.get("base_model_name_or_path")
    if (out / "model" / "config.json").is_file() or not stated:
        return out / "model"
    return Path(stated)


@dataclass(frozen=True, eq=False)
class Fit:
    """How an adapter lies on a model, by its settings and the names and shapes of both.

    modules: the linear layers that PEFT puts factors on, by full name, in the model's order. missing: tensors that they lack. unused:
    tensors that PEFT would leave aside. strangers: layers with factors that are no linear layers of the model. misshapen: what is wrong,
    in words, with each layer whose factors have other shapes than the layer and the settings.
    """

    modules: dict[str, nn.Module]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    strangers: tuple[str, ...]
    misshapen: tuple[str, ...]


def fit(adapter: AdapterFolder, model: nn.Module) -> Fit:
    """The one rule for whether an adapter is for a model. The model needs no weights; values and scaling of the factors are not looked at.

    Raises `ExportError` for settings that PEFT cannot read.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    targets = adapter.targets(linears)
    keys = adapter.expected_keys(targets)
    missing = keys - adapter.keys
    whole = sorted(name for name in targets if not adapter.expected_keys([name]) & missing)
    return Fit(
        {name: module for name, module in linears.items() if name in targets},
        tuple(sorted(missing)),
        tuple(sorted(adapter.keys - keys - adapter.own_weights(targets))),
        tuple(sorted(adapter.names - linears.keys())),
        tuple(what for name in whole if (what := _misfit(adapter, name, linear_shape(linears[name])))),
    )


def _misfit(adapter: AdapterFolder, name: str, shape: tuple[int, int]) -> str:
    """What is wrong with a layer's factors, nothing if they fit."""
    found, (rank, _) = adapter.shapes(name), adapter.rank_and_alpha(name)
    fits = found == ((rank, shape[1]), (shape[0], rank))
    return "" if fits else f"{name} {shape} has A {found[0]} and B {found[1]} for rank {rank}"


# -- what does not fit -------------------------------------------------------------------------------------------------


NAME_THE_BASE = "name the base that it was trained on with --base"


def refuse_unfit(
    adapter: AdapterFolder, base: Path, out: Path | None, trust_remote_code: bool = False, advice: str = NAME_THE_BASE
) -> None:  # fmt: skip
    """Whether PEFT may put the adapter on the base, found out from their files alone. Raises `ExportError` if not.

    out: the run whose base it is; `None` where the user named the base, and so decided whose the adapter is. advice: what to do about an
    adapter of another base. Of adapters of other kinds than LoRA on whole modules, names and shapes are left to PEFT.
    """
    if out is not None:
        refuse_another_base(adapter, base, out, advice)
    if adapter.config.get("peft_type", "LORA") == "LORA" and not any(adapter.config.get(key) for key in _SHAPED_OTHERWISE):
        model = build_skeleton(load_config(base, trust_remote_code), torch.float32, trust_remote_code)
        refuse_misfit(adapter, base, model, names_experts([*adapter.names, *QuantizedFolder(base).names]))


_SHAPED_OTHERWISE = ("target_parameters", "layer_replication", "use_qalora", "use_bdlora")
"""Settings with which factors have other places or shapes than those of `A (rank, in)` and `B (out, rank)` on a layer."""


def refuse_another_base(adapter: AdapterFolder, base: Path, out: Path, advice: str = NAME_THE_BASE) -> None:
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
        raise ExportError(f"the adapter in {adapter.folder} says that it belongs to {stated}, not to {base}; {advice}")


def _same_content(one: Path, other: Path) -> bool:
    """Of a run that was copied."""
    try:
        return QuantizedFolder(one).fingerprint() == QuantizedFolder(other).fingerprint()
    except CloqError:
        return False


def refuse_misfit(adapter: AdapterFolder, base: Path, model: nn.Module, experts_apart: bool = True) -> Fit:
    """How the adapter lies on the model. Raises `ExportError` where file, settings and model differ. experts_apart: experts are layers of
    their own in the model that PEFT is given, as they are in this one."""
    found = fit(adapter, model)
    fused = set() if experts_apart else {f"{path}.{name}" for path, experts in experts_of(model).items() for name in experts.slots}
    where = _apart(adapter, base)
    for name in found.strangers:
        raise ExportError(f"{where}: it has factors for {name}, which is no linear layer of {type(model).__name__}")
    for name in sorted(found.modules.keys() - adapter.names - fused):
        raise ExportError(f"{where}: its settings put factors on {name}, but it has none for that layer")
    for key in sorted(set(found.missing) - adapter.expected_keys(fused)):
        raise ExportError(f"{adapter.folder} lacks {key}: save it again")
    for name in sorted(adapter.names - found.modules.keys()):
        raise ExportError(
            f"{adapter.folder} has factors for {name} that PEFT leaves aside, by the target_modules in its settings; mend those"
        )
    for what in found.misshapen:
        raise ExportError(f"{where}: {what}")
    return found


def _apart(adapter: AdapterFolder, base: Path) -> str:
    return f"the adapter in {adapter.folder} and the base in {base} do not belong together"


def _fitting(adapter: AdapterFolder, decoder: Decoder) -> dict[str, nn.Module]:
    """The layers that PEFT puts the factors on, in the model's order. Raises `ExportError` where file, settings and model differ, and for
    what a merge cannot do."""
    found = refuse_misfit(adapter, decoder.folder, decoder.model)
    for name in found.modules:
        _refuse_tied(decoder, name)
        own = adapter.base_weight(name)
        if own is not None and not torch.equal(own.float(), decoder.read(f"{name}.weight").float()):
            raise ExportError(f"{_apart(adapter, decoder.folder)}: it brings a weight of {name} with it, and the base has another")
    return found.modules


def _refuse_tied(decoder: Decoder, name: str) -> None:
    tied = decoder.tied_names()
    if f"{name}.weight" in {*tied, *tied.values()}:
        other = tied.get(f"{name}.weight") or next(key for key, value in tied.items() if value == f"{name}.weight")
        raise ExportError(
            f"the adapter changes {name}, whose weight is also that of {other.removesuffix('.weight')}: merged into one it would change "
            "both; train without this layer, or load base and adapter side by side with cloq.load"
        )
