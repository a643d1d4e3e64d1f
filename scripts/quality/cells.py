"""One training run: what it is called, and its result as it is kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality.methods import METHODS
from quality.protocol import Changes, Protocol, Sweep, tag


@dataclass(frozen=True)
class Start:
    """What training starts from; cells of all rates and seeds share it. changes: to the protocol, at a point of a sweep."""

    bits: float
    method: str
    changes: Changes = ()

    @property
    def name(self) -> str:
        return f"{self.bits}-{self.method}{tag(self.changes)}"

    def cell(self, lr: float, seed: int) -> Cell:
        return Cell(self.bits, self.method, lr, seed, self.changes)


@dataclass(frozen=True)
class Cell:
    """One training run."""

    bits: float
    method: str
    lr: float
    seed: int
    changes: Changes = ()

    @property
    def name(self) -> str:
        return f"{self.bits}-{self.method}-lr{self.lr:g}-seed{self.seed}{tag(self.changes)}"

    @property
    def start(self) -> Start:
        return Start(self.bits, self.method, self.changes)


def starts(protocol: Protocol, bits: list[float], methods: Sequence[str], sweeps: Sequence[Sweep]) -> list[Start]:
    """Every method at every width it has, as the protocol says and at every point of the sweeps that it is moved by."""
    points = [(), *(sweep.changes(protocol, value) for sweep in sweeps for value in sweep.values)]
    found = [Start(width, name, applied(name, point)) for point in points for name in methods for width in METHODS[name].widths(bits)]
    return list(dict.fromkeys(found))


def applied(method: str, changes: Changes) -> Changes:
    """Those of the changes that mean something to the method."""
    return tuple(change for change in changes if change[0] in METHODS[method].moved_by)


def grid(points: Iterable[Start], lrs: Sequence[float], seeds: Sequence[int]) -> Iterator[Cell]:
    """Seed after seed, so that what is there when time is up compares all methods."""
    for seed, lr, start in itertools.product(seeds, lrs, list(points)):
        yield start.cell(lr, seed)


class Kept:
    """A folder of results, each with the protocol that it was made with."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, protocol: Protocol) -> dict[str, Any] | None:
        """`None` if it has not been made. Raises `SystemExit` for one that was made with another protocol."""
        path = self._folder / f"{name}.json"
        if not path.exists():
            return None
        kept, wanted = json.loads(path.read_text("utf8")), protocol.record()
        if kept["protocol"] != wanted:
            differing = [key for key in {**kept["protocol"], **wanted} if kept["protocol"].get(key) != wanted.get(key)]
            said = ", ".join(f"{key} {kept['protocol'].get(key)!r} instead of {wanted.get(key)!r}" for key in differing)
            raise SystemExit(f"{path} was made with other settings ({said}); use another --out")
        return kept["result"]

    def put(self, name: str, protocol: Protocol, result: dict[str, Any]) -> None:
        """Whole or not at all: a killed command leaves no half of a file."""
        path = self._folder / f"{name}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"name": name, "protocol": protocol.record(), "result": result}, indent=1), "utf8")
        partial.replace(path)
