"""What a computation costs, in units that do not depend on the machine, and how fast a machine is in each of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from cloq.quantizers.columns import fit_grid

_REACHED = 0.85  # products of real shapes run at this share of the fastest repetition of one that is in the cache
_SIDE = 768  # of the square matrices that are multiplied, 2.4 MB each
_LARGE = 1 << 22  # values in a tensor that no cache holds
_SMALL = 1 << 15  # values in a tensor that a core's own cache holds
_COLUMNS, _ROWS = 64, 1024  # of a group whose scale is searched


@dataclass(frozen=True)
class Work:
    """products: floating-point operations in float32 matrix products. wide: in float64 ones.
    streamed: bytes that elementwise operations on large tensors read and write. cached: bytes that they move within a cache.
    searched: weights that a group's scale is searched for. calls: operations so small that only their number counts.
    disk: bytes read or written."""

    products: float = 0.0
    wide: float = 0.0
    streamed: float = 0.0
    cached: float = 0.0
    searched: float = 0.0
    calls: float = 0.0
    disk: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    def __sub__(self, other: Work) -> Work:
        return self + -1.0 * other

    def __mul__(self, times: float) -> Work:
        return Work(**{name: value * times for name, value in asdict(self).items()})

    __rmul__ = __mul__

    def seconds(self, machine: Machine) -> float:
        """The sum over all units: nothing is taken to overlap."""
        return sum(value / getattr(machine, name) for name, value in asdict(self).items())


@dataclass(frozen=True)
class Machine:
    """How much of each unit of `Work` a device does in a second."""

    products: float
    wide: float
    streamed: float
    cached: float
    searched: float
    calls: float
    disk: float = 3e8

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def measure(device: str | torch.device = "cpu", clock: Callable[[], float] = time.perf_counter) -> Machine:
    """Measures a device in about half a second. disk is not measured: writing to find out would cost more than it is worth.

    Where a device has no float64 (mps), `wide` is float32's rate, as `lowrank` then computes in float32.
    """
    device = torch.device(device)
    wide = torch.float32 if device.type == "mps" else torch.float64
    single, double = (torch.full((_SIDE, _SIDE), 0.5, device=device, dtype=dtype) for dtype in (torch.float32, wide))
    large, small, tiny = (torch.ones(n, device=device) for n in (_LARGE, _SMALL, 16))
    into, group = torch.empty_like(small), torch.arange(_COLUMNS * _ROWS, device=device).sin().view(_COLUMNS, _ROWS)

    def rate(amount: float, run: Callable[[], object], repeat: int) -> float:
        return amount * repeat / _best(run, repeat, device, clock)

    return Machine(
        products=_REACHED * rate(2.0 * _SIDE**3, lambda: single @ single, 4),
        wide=_REACHED * rate(2.0 * _SIDE**3, lambda: double @ double, 2),
        streamed=rate(3.0 * large.nbytes, lambda: large * large, 2),
        cached=rate(3.0 * small.nbytes, lambda: torch.mul(small, small, out=into), 50),
        searched=rate(1.0 * group.numel(), lambda: fit_grid(group, 2, symmetric=False, search=True), 4),
        calls=rate(1.0, lambda: tiny + tiny, 500),
    )


def _best(run: Callable[[], object], repeat: int, device: torch.device, clock: Callable[[], float], rounds: int = 3) -> float:
    """Seconds of the fastest of a few rounds: what the machine can do when nothing else interferes."""
    run()
    found = []
    for _ in range(rounds):
        _finish(device)
        started = clock()
        for _ in range(repeat):
            run()
        _finish(device)
        found.append(clock() - started)
    return max(min(found), 1e-9)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
