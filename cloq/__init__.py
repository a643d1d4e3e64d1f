"""cloq: quantize a causal LLM to 2–4 bits and start its LoRA adapters where they undo the most of the damage.

The names below are loaded when they are first used, so that `import cloq` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "quantize": "cloq.api",
    "load": "cloq.use.loading",
    "merge": "cloq.use.merging",
    "closed_form": "cloq.initializers",
    "train": "cloq.training",
    "TrainSpec": "cloq.training",
    "RunSpec": "cloq.specs",
    "QuantSpec": "cloq.specs",
    "LoraSpec": "cloq.specs",
    "CalibSpec": "cloq.specs",
    "Rule": "cloq.specs",
    "CloqError": "cloq.errors",
}

__all__ = [
    "CalibSpec",
    "CloqError",
    "LoraSpec",
    "QuantSpec",
    "Rule",
    "RunSpec",
    "TrainSpec",
    "__version__",
    "closed_form",
    "load",
    "merge",
    "quantize",
    "train",
]

if TYPE_CHECKING:
    from cloq.api import quantize
    from cloq.errors import CloqError
    from cloq.initializers import closed_form
    from cloq.specs import CalibSpec, LoraSpec, QuantSpec, Rule, RunSpec
    from cloq.training import TrainSpec, train
    from cloq.use.loading import load
    from cloq.use.merging import merge


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cloq' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
