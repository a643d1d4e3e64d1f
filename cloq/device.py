"""The device that a run is asked to use."""

from __future__ import annotations

import torch

from cloq.errors import SpecError
from cloq.specs import shown


def resolve_device(name: str) -> str:
    """`auto` → `cuda` where there is one, else `cpu`; a GPU that was asked for and is not there is a `SpecError`."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind, number = torch.device(name).type, torch.device(name).index or 0
    except RuntimeError as error:
        raise SpecError(f"device is {shown(name)}; allowed: auto, cpu, cuda, cuda:1, mps") from error
    available = {"cpu": True, "cuda": number < torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind, False):
        have = ", ".join(k for k, ok in available.items() if ok)
        raise SpecError(f"device {name!r} is not available here (there is: {have}); use --device auto, or install the torch build for it")
    return name
