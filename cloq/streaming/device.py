"""The device that a run is asked to use, and where its activations are."""

from __future__ import annotations

from pathlib import Path

import torch

from cloq.errors import SpecError
from cloq.models import InHostMemory, OnDisk, Waiting
from cloq.specs import RunSpec, shown
from cloq.streaming.memory import has_room


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


def place_to_wait(spec: RunSpec, device: torch.device, size: int, processes: int = 1) -> str:
    """`device`, `host` or `disk`: where activations of so many bytes are between forwards, as the run asks for, or the first with enough
    room. processes: of the run on this machine."""
    if spec.activations != "auto":
        return spec.activations
    if has_room(size, device, processes):
        return "device"
    return place_aside(spec, size, processes) if elsewhere(device) == "host" else "disk"


def place_aside(spec: RunSpec, size: int, processes: int = 1) -> str:
    """`host` or `disk`: the same of what never waits on a GPU."""
    if spec.activations != "auto":
        return "disk" if spec.activations == "disk" else "host"
    return "host" if has_room(size, torch.device("cpu"), processes) else "disk"


def elsewhere(device: torch.device) -> str:
    """The next place to wait, for what the device has too little memory for."""
    return "host" if device.type == "cuda" else "disk"


def waiting_in(place: str, folder: Path) -> Waiting:
    """folder: for files, where activations wait on disk."""
    if place == "disk":
        return OnDisk(folder)
    return InHostMemory() if place == "host" else Waiting()
