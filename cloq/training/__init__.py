"""Fine-tuning from a finished run: the packed base stays as it is, the factors go on from where CLoQ put them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    base = read_settings(config, TrainSpec, "cloq train") if config else TrainSpec()
    bits = _bits(Path(settings.get("base") or base.base or Path(run or base.run) / "model")) if settings.get("recipe") else None
    return train_spec(base, bits=bits, **({"run": str(run)} if run else {}), **settings)


def _bits(base: Path) -> int | None:
    """The lowest width of a base's layers, as its format has them; `None` for a base that is not quantized, or not there."""
    from cloq.export.read import read_config, reader_of

    if not (base / "config.json").is_file():
        return None
    quantization = read_config(base).get("quantization_config")
    return min(reader_of(quantization).widths) if quantization else None


def __getattr__(name: str):
    if name != "TrainResult":
        raise AttributeError(f"module 'cloq.training' has no attribute {name!r}")
    return getattr(import_module("cloq.training.run"), name)
