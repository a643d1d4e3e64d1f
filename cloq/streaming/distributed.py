"""Several processes as one run: what is shared out, summed and exchanged, and how they end together. On one, all of it is the identity.

    processes = Processes.start()          one value for all that follows; alone unless torchrun started several
    with processes.together():             an error in any of them ends this on all of them, with the same message
        text = processes.on_first(read)    one does it, all have it
        processes.add([gram])              the sum over all processes, in place
        results = processes.exchange(own)  everyone's results, on every process

Every verb first asks all processes whether one of them has failed, and only then moves data. A process that fails anywhere inside of
`together` answers the next such question with its error. So the order of collectives is the same everywhere whatever happens, nobody waits
for a process that has given up, and a failed attempt can be repeated by all. A process that vanishes closes its connections, which the
others notice in the same questions.

The questions and all that lies in host memory go through gloo, tensors on GPUs through nccl.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from cloq.errors import CloqError, ProcessError, RunError, SpecError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cloq.types import LayerResult

T = TypeVar("T")

LONGEST_WAIT = timedelta(hours=24)
"""For a process that is alive and busy: the first one may have a model to download or to write. One that is gone is noticed at once."""

ALIGNMENT = 64
"""Bytes. Where tensors begin in what is sent, so that the same products of them have the same bits wherever they are."""

ELEMENTWISE = 5000
"""What the work on single weights comes to in `solve_cost`, in multiply-adds for each weight."""


def is_first() -> bool:
    """Whether this process is the first one, as `torchrun` and `accelerate launch` number them."""
    return os.environ.get("RANK", "0") == "0"


class Failure(NamedTuple):
    """How a process failed. again: the attempt may be repeated, by all."""

    again: bool
    rank: int
    message: str


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them: it is number `rank` of `size`."""

    rank: int = 0
    size: int = 1
    _ended: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    @classmethod
    def start(cls) -> Processes:
        """Those that `torchrun` started, connected on the first call; alone without it. To be called by all of them, in the same order."""
        if os.environ.get("WORLD_SIZE", "1") == "1" and not _is_connected():
            return cls()
        _connect()
        import torch.distributed as dist

        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def here(self) -> int:
        """How many of them run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    def device(self, name: str) -> str:
        """This process's own device of a kind: `cuda` → `cuda:1`. Raises `SpecError` where there is none for each process."""
        import torch

        here, local = self.here, int(os.environ.get("LOCAL_RANK", self.rank))
        if self.size == 1 or name == "cpu":
            return name
        if name != "cuda":
            raise SpecError(f"device {name!r} is one for {here} processes; use --device cuda for a GPU each, or --device cpu")
        if here > torch.cuda.device_count():
            raise SpecError(f"{here} processes run on this machine, which has {torch.cuda.device_count()} GPUs; start one for each")
        torch.cuda.set_device(local)
        return f"cuda:{local}"

    # -- ending together -----------------------------------------------------------------------------------------------

    @contextmanager
    def together(self, again: Callable[[BaseException], bool] = lambda error: False) -> Iterator[None]:
        """What is inside ends on all processes or on none. Verbs may only be used inside.

        The process that failed raises its own error. The others, at their next verb, raise `ProcessError` with its message, as does it
        where it is not the first, so that the first one alone has something to tell. again: whether the attempt may be repeated after an
        error; then the others raise `MemoryError`, the one error that is. May be nested, on all processes alike.
        """
        try:
            yield
            self._agree()
        except Exception as error:
            if self.size == 1 or self._ended.is_set() or _is_of_others(error):
                raise
            self._agree(_failure(error, self.rank, again))
            if self.first or not isinstance(error, CloqError):
                raise
            raise ProcessError(str(error)) from error

    def _agree(self, failure: Failure | None = None) -> None:
        """Asks all processes for their failures. Raises the one that counts, unless it is this process's own: an error that ends the run
        before one that does not, then that of the lowest rank. On return there was none, or this process's own."""
        if self.size == 1:
            return
        import torch

        with self._talking():
            failed = torch.tensor([int(failure is not None)])
            _dist().all_reduce(failed, group=_control())
            if not failed.item():
                return
        worst = min(found for found in self._gathered(failure) if found is not None)
        if not worst.again:
            self._ended.set()
        if worst.rank != self.rank:
            where = f"{worst.message} (process {worst.rank} of {self.size})" if worst.rank else worst.message
            raise _OutOfMemoryElsewhere(where) if worst.again else ProcessError(where)

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """An error while data move leaves the processes out of step. It ends the run, and the others notice that this process is gone."""
        from cloq.streaming.memory import is_out_of_memory

        try:
            yield
        except (RuntimeError, MemoryError) as error:
            self._ended.set()
            kept = "Finished blocks are kept; run the same command again"
            if is_out_of_memory(error):
                here = f"process {self.rank} of {self.size}"
                raise RunError(f"out of memory in {here} while data were exchanged ({_first_line(error)}). {kept}") from error
            broke = f"the connection between the {self.size} processes broke ({_first_line(error)})"
            raise ProcessError(f"{broke}: one of them has ended. {kept}") from error
        except BaseException:
            self._ended.set()
            raise

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def on_first(self, action: Callable[[], T]) -> T:
        """What the action returns, a small value, which only the first process executes."""
        value = action() if self.first else None
        if self.size == 1:
            return value
        self._agree()
        with self._talking():
            held = [value]
            _dist().broadcast_object_list(held, src=0, group=_control())
        return held[0]

    def after_first(self, action: Callable[[], T]) -> T:
        """What the action returns, which all execute, the first process before the others: what it downloads is there for them."""
        value = action() if self.first else None
        self._agree()
        return value if self.first else action()

    def gather(self, value: T) -> list[T]:
        """Everyone's small value, by rank."""
        self._agree()
        return self._gathered(value)

    def _gathered(self, value: T) -> list[T]:
        if self.size == 1:
            return [value]
        with self._talking():
            found: list[Any] = [None] * self.size
            _dist().all_gather_object(found, value, group=_control())
        return found

    def total(self, counts: dict[str, int]) -> dict[str, int]:
        """Sums by name. The names are the same on all processes."""
        if self.size == 1:
            return counts
        import torch

        numbers = torch.tensor(list(counts.values()), dtype=torch.int64)
        self.add([numbers])
        return dict(zip(counts, numbers.tolist(), strict=True))

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Sums each tensor over all processes, in place and to the same bits on each; shapes and order are the same on all. A tensor is
        done when the next one is asked for."""
        if self.size == 1:
            return
        self._agree()
        with self._talking():
            for tensor in tensors:
                _dist().all_reduce(tensor, group=_group_for(tensor))

    def share(self, rows: Tensor, last_first: bool = False) -> Tensor:
        """This process's rows: a run of them, for the first processes one more where they do not divide; for the last ones if
        `last_first`. None for some where there are fewer rows than processes."""
        return rows.tensor_split(self.size)[self.size - 1 - self.rank if last_first else self.rank]

    def exchange(self, own: dict[str, LayerResult], device: torch.device) -> dict[str, LayerResult]:
        """Everyone's results on all processes, as a stored block holds them: packed codes travel, bit for bit. device: of all tensors."""
        if self.size == 1:
            return own
        from cloq.streaming.store import from_tensors, to_tensors

        packed = {name: to_tensors(result) for name, result in own.items()}
        announced = self.gather({name: (described, _shapes(tensors)) for name, (tensors, described) in packed.items()})
        found = {}
        with self._talking():
            for rank, layers in enumerate(announced):
                for name, (described, shapes) in layers.items():
                    sent = _flattened(packed.pop(name)[0], device) if rank == self.rank else _empty(shapes, device)
                    _dist().broadcast(sent, src=rank, group=_group_for(sent))
                    found[name] = from_tensors(_unflattened(sent, shapes).__getitem__, described)
        return found


ALONE = Processes()
"""One process, for which every verb is the identity."""


def shared_out(groups: Sequence[Sequence[str]], shapes: dict[str, tuple[int, int]], processes: int) -> dict[str, int]:
    """Which process solves which layer: the longest first, each to the process that is then done the soonest, the lowest of equals.

    groups: of layers that share an input, and what is found from its statistics. They stay together unless a group is more than a process's
    share of all the work.
    """
    cost = {name: solve_cost(*shapes[name]) for group in groups for name in group}
    share = sum(cost.values()) / processes
    parts = [part for group in groups for part in ([group] if sum(map(cost.get, group)) <= share else [[name] for name in group])]
    busy, owner = [0.0] * processes, {}
    for part in sorted(parts, key=lambda part: -sum(map(cost.get, part))):  # stable: equal ones in their order
        rank = busy.index(min(busy))
        busy[rank] += sum(map(cost.get, part))
        owner |= dict.fromkeys(part, rank)
    return owner


def solve_cost(out: int, columns: int) -> float:
    """How long a layer takes, in a unit of no meaning: `in² (out + in)` for the products with its Gram matrix and the factorizations of
    that, and a constant for each weight. Within some 20 % of what GPTQ with CLoQ's rounds took on one core; no clock is looked at, so that
    every run shares out alike."""
    return columns**2 * float(out + columns) + ELEMENTWISE * float(out * columns)


# -- the connection ----------------------------------------------------------------------------------------------------


def _dist():
    import torch.distributed

    return torch.distributed


def _is_connected() -> bool:
    """Whether processes are connected already: by cloq itself, or by the program that calls it, which has imported torch then."""
    import sys

    return "torch" in sys.modules and _dist().is_available() and _dist().is_initialized()


def _connect() -> None:
    """By nccl where there are GPUs; does nothing where that has happened. Raises `RunError` where the launcher did not say how."""
    import torch

    try:
        if not _dist().is_initialized():
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":  # gloo of torch 2.13 would wait for those of before, and for long
                raise RuntimeError("they were restarted, after which torch does not connect them: leave out --max-restarts")
            _dist().init_process_group("nccl" if torch.cuda.is_available() and _dist().is_nccl_available() else "gloo")
        _control()
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"the {os.environ.get('WORLD_SIZE')} processes of WORLD_SIZE cannot be connected ({_first_line(error)}); start them with "
            "torchrun, or unset WORLD_SIZE for one process"
        ) from error


@functools.cache
def _control():
    """The group for questions and host memory: one whose members may be kept waiting for as long as the first one is busy."""
    return _dist().new_group(backend="gloo", timeout=LONGEST_WAIT)


def _group_for(tensor: Tensor):
    return None if tensor.is_cuda else _control()


class _OutOfMemoryElsewhere(MemoryError):
    """Another process ran out of memory, and all of them are to try again."""


def _is_of_others(error: BaseException) -> bool:
    return isinstance(error, (_OutOfMemoryElsewhere, ProcessError))


def _failure(error: Exception, rank: int, again: Callable[[BaseException], bool]) -> Failure:
    if isinstance(error, CloqError):
        return Failure(False, rank, str(error))
    if again(error):
        return Failure(True, rank, _first_line(error))
    return Failure(False, rank, f"a process failed with {type(error).__name__}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    """The first sentence of the message, without the place in gloo's source that it begins with."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". ")[0][:200]


# -- tensors on their way ----------------------------------------------------------------------------------------------

Shapes = list[tuple[str, Any, tuple[int, ...]]]
"""Names, types and shapes of tensors that are sent as one."""


def _shapes(tensors: dict[str, Tensor]) -> Shapes:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def _places(shapes: Shapes) -> Iterator[tuple[str, Any, tuple[int, ...], slice]]:
    start = 0
    for name, dtype, shape in shapes:
        length = functools.reduce(int.__mul__, shape, dtype.itemsize)
        yield name, dtype, shape, slice(start, start + length)
        start += -(-length // ALIGNMENT) * ALIGNMENT


def _empty(shapes: Shapes, device: torch.device) -> Tensor:
    import torch

    ends = [place.stop for *_, place in _places(shapes)]
    return torch.empty(max(ends, default=0), dtype=torch.uint8, device=device)


def _flattened(tensors: dict[str, Tensor], device: torch.device) -> Tensor:
    import torch

    shapes = _shapes(tensors)
    flat = _empty(shapes, device)
    for name, _, _, place in _places(shapes):
        flat[place] = tensors[name].contiguous().flatten().view(torch.uint8)
    return flat


def _unflattened(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    return {name: flat[place].view(dtype).reshape(shape) for name, dtype, shape, place in _places(shapes)}
