"""Flags of the command line, made from the specs: every flat setting is one flag with the same name, type and default."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cloq.errors import SpecError
from cloq.specs import (
    ACTIVATIONS,
    EFFORTS,
    FLAT,
    INITIALIZER_NAMES,
    PROPAGATE,
    QUANTIZER_NAMES,
    SPLIT_NAMES,
    RunSpec,
    run_spec,
    union_members,
)

HELP = {
    "bits": "Bits per weight: 2, 3, 4 or 8; or a mean of 2, 3 and 4, such as 2.5, spent where the loss depends on it.",
    "mean_bits": "The same for a mean that is a whole number: 3 of 2, 3 and 4 bits.",
    "group_size": "Columns that share a scale: 32, 64, 128, or 'channel'.",
    "quantizer": f"{', '.join(QUANTIZER_NAMES)}.",
    "symmetric": "Symmetric grid, zero point in the middle.",
    "search": "Choose scales by their rounding error instead of the range.",
    "magr": "Shrink large weights before quantizing (MagR).",
    "magr_alpha": "Weight of MagR's penalty.",
    "damping": "GPTQ: added to the Gram matrix's diagonal, relative to its mean.",
    "act_order": "GPTQ: columns in order of falling activation energy.",
    "static_groups": "GPTQ: scales from the original weight, in the original order.",
    "init": f"How the factors are found: {', '.join(INITIALIZER_NAMES)}.",
    "rank": "Rank of the factors.",
    "adaptive_rank": "CLoQ: the rank is a mean, spent where the loss depends on it; as many parameters in all.",
    "split": f"How the product is split into A and B: {', '.join(SPLIT_NAMES)}.",
    "rounds": "CLoQ: how often codes are chosen for what the factors will undo, and factors for the codes; 0 is the paper's method.",
    "loftq_iterations": "Rounds of LoftQ's alternation.",
    "calib": "Calibration text: demo, self, c4, wikitext2, pile, a hub data set, a file or folder, or a mixture a:0.5,b:0.5.",
    "calib_samples": "Calibration sequences.",
    "calib_column": "Column of the data set that holds the text.",
    "seq_len": "Tokens per sequence.",
    "heldout": "Further sequences for the held-out error, as a share of the samples.",
    "seed": "Of the choice of sequences.",
    "only": "Quantize only layers that match (repeatable): q_proj, 'mlp.*', '*.layers.0.*'.",
    "skip": "Leave layers that match as they are (repeatable).",
    "propagate": f"What later layers are calibrated on: {', '.join(PROPAGATE)} outputs.",
    "sequential": "Inside a block, calibrate later layers on the earlier ones already quantized.",
    "correction": "Share of the earlier layers' error that each layer makes up for, chosen for each on held-out text if not given; 0 is "
    "the published method.",
    "fisher": "CLoQ: share of what an output counts that is how much the loss depends on it; 0 is the published method.",
    "device": "auto, cpu, cuda, cuda:1, mps.",
    "batch_tokens": "Tokens per forward.",
    "activations": f"Where activations wait for the next forward: {', '.join(ACTIVATIONS)} (auto: the first with room).",
    "revision": "Of the hub id.",
    "trust_remote_code": "Run Python code that comes with the model.",
}


@dataclass(frozen=True)
class Flag:
    """One setting as a flag of the command line. kind: type of its value. shown: its default, for the help. hidden: from the help."""

    name: str
    kind: type
    help: str
    shown: str | bool = False
    panel: str = "Run"
    hidden: bool = False

    def parameter(self) -> inspect.Parameter:
        flag = "--" + self.name.replace("_", "-")
        if self.kind is bool:
            flag = f"{flag}/--no-{flag.removeprefix('--')}"
        option = typer.Option(flag, help=self.help, show_default=self.shown, rich_help_panel=self.panel, hidden=self.hidden)
        kind = Annotated[self.kind | None, option]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def with_flags(flags: list[Flag], convert: Callable[[str, Any], Any]) -> Callable[[Callable], Callable]:
    """Gives a command these flags. Its `settings` argument receives those that were given on the command line, converted."""

    def decorate(command: Callable) -> Callable:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "settings"]

        @functools.wraps(command)
        def wrapper(**arguments: Any):
            settings = {flag.name: arguments.pop(flag.name) for flag in flags}
            given = {name: convert(name, value) for name, value in settings.items() if value is not None and value != []}
            return command(**arguments, settings=given)

        hints = typing.get_type_hints(command, include_extras=True)
        parameters = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        wrapper.__signature__ = inspect.Signature([*parameters, *(flag.parameter() for flag in flags)])
        wrapper.__annotations__ = {p.name: p.annotation for p in wrapper.__signature__.parameters.values()}
        return wrapper

    return decorate


def _flag(name: str) -> Flag:
    section, key = FLAT[name]
    owner = getattr(RunSpec(), section) if section else RunSpec()
    value = getattr(owner, key)
    kind, shown = next(kind for kind in union_members(typing.get_type_hints(type(owner))[key]) if kind is not type(None)), str(value)
    if name == "bits":
        kind = float
    elif name == "group_size":
        kind = str
    elif isinstance(value, tuple):
        kind, shown = list[str], False
    elif value is None:
        shown = False
    return Flag(name, kind, HELP[name], shown, _PANELS[section])


_PANELS = {"quant": "Quantization", "lora": "Factors", "calib": "Calibration", "": "Run"}


def _converted(name: str, value: Any) -> Any:
    if name == "group_size":
        if value in ("channel", "-1"):
            return None
        if not value.isdigit():
            raise SpecError(f"--group-size is {value!r}; allowed: 32, 64, 128, channel")
        return int(value)
    return tuple(value) if isinstance(value, list) else value


_EFFORT = Flag("effort", str, f"What the run may cost: {', '.join(EFFORTS)}. Other flags win over it.", "default")

with_settings = with_flags([_EFFORT, *map(_flag, HELP)], _converted)
"""Gives a command every setting of a run."""


def _quantizes(name: str) -> bool:
    return (name in FLAT and FLAT[name][0] == "quant") or name in ("rounds", "mean_bits")


def _refuse_quantizing(name: str, value: Any) -> None:
    """Raises `SpecError` for a flag that would be ignored where the base is given."""
    if _quantizes(name):
        flag = ("no-" if value is False else "") + name.replace("_", "-")
        raise SpecError(f"--{flag} says how to quantize, but the base is given and stays as it is; leave it out")


def _converted_for_given(name: str, value: Any) -> Any:
    _refuse_quantizing(name, value)
    return _converted(name, value)


with_settings_of_factors = with_flags([_EFFORT, *(replace(_flag(name), hidden=_quantizes(name)) for name in HELP)], _converted_for_given)
"""Gives a command every setting of a run on a base that is given. Those of the quantization are refused, with the reason."""


def resolve(model: str | None, config: Path | None, settings: dict[str, Any]) -> RunSpec:
    """The run's spec: from the run file if there is one, then the flags that were given. Raises `SpecError` for a flag that the run file's
    base, given as it is, would ignore."""
    from cloq.api import read_run_file

    base = read_run_file(config) if config else RunSpec()
    for name, value in settings.items() if base.quantized else ():
        _refuse_quantizing(name, value)
    return run_spec(base, **({"model": model} if model else {}), **settings)


def default_out(spec: RunSpec) -> Path:
    """`./<model>-<bits>bit-<init>`, where no folder was named, or `./<base>-<init>` for a base that is given."""
    if spec.quantized:
        return Path(f"{Path(spec.quantized).name.lower()}-{spec.lora.init}")
    bits = spec.quant.bits if spec.mean_bits is None else spec.mean_bits
    return Path(f"{Path(spec.model).name.lower()}-{bits:g}bit-{spec.lora.init}")


__all__ = ["HELP", "Flag", "default_out", "resolve", "with_flags", "with_settings", "with_settings_of_factors"]
