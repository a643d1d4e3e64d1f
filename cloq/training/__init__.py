"""Fine-tuning from a finished run: the packed base stays as it is, the factors go on from where CLoQ put them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloq.training.recipes import FAMILIES
from cloq.training.spec import TrainSpec, train_spec

if TYPE_CHECKING:
    from cloq.training.run import TrainResult

__all__ = ["TrainResult", "TrainSpec", "resolve", "train", "train_spec"]


def train(
    run: str | Path, *, to: str | Path | None = None, restart: bool = False, emit: Callable[[str, dict[str, Any]], None] | None = None,
    **settings: Any,
) -> TrainResult:  # fmt: skip
    """Fine-tunes the adapter of a finished run: `cloq.train("llama-2bit", data="rows.jsonl", recipe="gsm8k")`.

    to: folder of the result, `RUN/trained` by default; a run that was killed continues there. settings: the fields of `TrainSpec`. Raises a
    `CloqError` for anything that a user can mend.
    """
    from cloq.training.run import run as execute

    return execute(resolve(run, None, settings), to, restart=restart, emit=emit)


def resolve(run: str | Path | None, config: Path | None, settings: dict[str, Any]) -> TrainSpec:
    """The spec of a training: from the file of an earlier one where there is any, then the recipe, then the settings that were given."""
    from cloq.api import read_settings
    from cloq.training.start import lowest_width

    base = read_settings(config, TrainSpec, "cloq train") if config else TrainSpec()
    settings = ({"run": str(run)} if run else {}) | settings
    places = {name: settings[name] for name in ("run", "base", "adapter") if settings.get(name)}
    bits = lowest_width(base.replace(**places)) if settings.get("recipe") in FAMILIES else None
    return train_spec(base, bits=bits, **settings)


def __getattr__(name: str):
    if name != "TrainResult":
        raise AttributeError(f"module 'cloq.training' has no attribute {name!r}")
    return getattr(import_module("cloq.training.run"), name)
