"""The bases and factors that training starts from: ordinary runs of cloq, or another library's work (`rivals`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from quality.cells import Start
from quality.methods import METHODS, Method
from quality.protocol import Changes, Protocol, tag
from quality.rivals import gptqmodel_eora, peft_loftq

_OF_THE_BASE = ("group_size", "calib", "calib_samples", "calib_len", "calib_seed", "sequential")


_ONE = (("calib_samples", 1),)
_DATA_FREE = {"correction": 0.0, "propagate": "dense", "sequential": False}
"""For methods that see weights alone, rounded as they are: no layer is to know what the calibration text did to those before it."""


@dataclass(frozen=True)
class Pair:
    """Folders of a base and of an adapter on it."""

    base: Path
    adapter: Path


class Starts:
    """Makes what is missing in `runs` and continues what was interrupted, once per command. minutes: for another library's work."""

    def __init__(self, protocol: Protocol, runs: Path, minutes: float):
        self._protocol, self._runs, self._minutes = protocol, runs, minutes
        self._made: dict[tuple[object, ...], Pair | None] = {}

    def pair(self, start: Start) -> Pair | None:
        """`None` for the 16-bit model, which gets LoRA's usual start. Raises `rivals.Refused` where another library fails."""
        method = METHODS[start.method]
        key = (start.bits, method.base, method.init, method.settings, start.changes)
        if key not in self._made:
            self._made[key] = self._make(start, method)
        return self._made[key]

    def _make(self, start: Start, method: Method) -> Pair | None:
        protocol, changes = self._protocol.changed(start.changes), start.changes
        if method.base == "dense":
            return None
        if method.base == "gptqmodel":
            out = gptqmodel_eora(protocol, start.bits, self._runs / f"{start.bits}-gptqmodel-eora{tag(changes)}", self._minutes)
            return Pair(out / "model", out / "adapter")
        if method.base == "peft":
            out = peft_loftq(protocol, self._runs / f"{start.bits}-peft-loftq{tag(changes)}")
            return Pair(out / "model", out / "adapter")
        if method.base == "nf4":
            return self._run(protocol.changed(_ONE), f"4-nf4{tag(changes)}", bits=4, quantizer="nf4", init="zero", **_DATA_FREE)
        grid = {"bits": start.bits, "group_size": protocol.group_size or None, "sequential": protocol.sequential}
        extra = dict(method.settings)
        name = "-".join([method.init, *(str(value) for value in extra.values())])
        fitted = grid | extra | {"init": method.init, "propagate": protocol.propagate or "adapter"} | protocol.opened
        if method.init == "loftq":
            return self._run(protocol.changed(_ONE), f"{start.bits}-own-{name}{tag(changes)}", **fitted | _DATA_FREE)
        if method.base == "own":
            return self._run(protocol, f"{start.bits}-own-{name}{tag(changes)}", **fitted)
        fitted |= {"bits": int(start.bits), "correction": 0.0, "fisher": 0.0}  # of a base that is given, which has its own
        shared = self._shared_base(start, grid | {"correction": 0.0})
        if method.init == "zero" and not _beyond(changes):
            return shared
        return self._run(protocol, f"{start.bits}-gptq-{name}{tag(changes)}", quantized=str(shared.base), **fitted)

    def _shared_base(self, start: Start, grid: dict[str, object]) -> Pair:
        """The base that factors are fitted to. Rank and propagation are the factors', so points of those sweeps have it in common."""
        changes = tuple(change for change in start.changes if change[0] in _OF_THE_BASE)
        key = (start.bits, "shared", changes)
        if key not in self._made:
            name = f"{start.bits}-gptq{tag(changes)}"
            self._made[key] = self._run(self._protocol.changed(changes), name, init="zero", propagate="quantized", **grid)
        return self._made[key]

    def _run(self, protocol: Protocol, name: str, **settings: object) -> Pair:
        from cloq.api import run
        from cloq.specs import run_spec

        calibration = {"calib": protocol.calibration_text, "calib_samples": protocol.calib_samples, "seq_len": protocol.calib_len}
        spec = run_spec(model=protocol.model, rank=protocol.rank, seed=protocol.calib_seed, **calibration, **settings)
        made = run(spec, self._runs / name)
        return Pair(made.base, made.adapter)


def _beyond(changes: Changes) -> bool:
    """Whether the changes are of the factors too."""
    return any(setting not in _OF_THE_BASE for setting, _ in changes)


def trainable_model(protocol: Protocol, pair: Pair | None) -> nn.Module:
    """The base in float32 with its adapter, or with LoRA's usual one on the 16-bit model, as a `peft.PeftModel`."""
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

    from cloq.models import Decoder, locate

    if pair is None:
        model = _original(protocol)
        names = sorted({name.rsplit(".", 1)[-1] for name in Decoder(locate(protocol.model)).all_linears()})
        torch.manual_seed(0)  # of LoRA's random A, which the runs have fixed in their files
        usual = {"r": protocol.rank, "lora_alpha": protocol.rank, "lora_dropout": protocol.dropout}
        return get_peft_model(model, LoraConfig(target_modules=names, task_type="CAUSAL_LM", **usual))
    model = _original(protocol) if protocol.exact_base else _decoded(protocol, pair.base)
    config = PeftConfig.from_pretrained(pair.adapter)
    config.lora_dropout = protocol.dropout
    model = PeftModel.from_pretrained(model, pair.adapter, is_trainable=True, config=config)
    if protocol.exact_base:
        _leave_to_the_factors(model)
    return model


@torch.no_grad()
def _leave_to_the_factors(model: nn.Module) -> None:
    """Every weight `W` under factors becomes `W − B A`, so that base and adapter are what the model was."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.get_base_layer().weight -= layer.get_delta_weight(layer.active_adapters[0])


def _original(protocol: Protocol) -> nn.Module:
    """The 16-bit model in float32."""
    from transformers import AutoModelForCausalLM

    from cloq.models import locate

    return AutoModelForCausalLM.from_pretrained(locate(protocol.model), dtype=torch.float32)


def _decoded(protocol: Protocol, base: Path) -> nn.Module:
    """The 16-bit model with the base's decoded weights; a base that is stored decoded, as it is."""
    from transformers import AutoModelForCausalLM

    from cloq.export.read import QuantizedFolder
    from cloq.models import set_weight

    source = QuantizedFolder(base)
    model = _original(protocol) if source.names else AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name in source.names:
        set_weight(model.get_submodule(name), source.weight(name).dequantize())
    return model
