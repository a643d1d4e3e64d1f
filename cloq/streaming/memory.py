"""How much memory a process took, and when it runs out: the same again with less of it, which is said.

First nothing is kept any more that can be computed again or wait elsewhere, which changes no result. Then, in a forward, half as many
sequences at a time: what it needs grows with its micro-batch. The result is the same but for the order in which floats are summed. So that
a run still has one result, the size that was found is stored with its blocks, and every continuation starts with it.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from cloq.errors import RunError
from cloq.streaming.cgroups import memory_left

SPARE = 0.25
"""Share of the memory that is free which a run may fill with what it would otherwise compute again."""

WAITING = 0.4
"""Share of a device's free memory that activations may take; more than that waits for its forwards elsewhere."""

_SAID_BY_ALLOCATORS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "MPS backend out of memory")


def peak_resident() -> int:
    """Bytes of this process's largest resident set, since its program began.

    On Linux not `ru_maxrss`: a child inherits that from the process that started it, however large that one was.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def spare_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes on the device that this process may fill with what can be computed again: a quarter of what is free; 1 GiB where the system
    does not say. processes: on this machine."""
    free = free_memory(device, processes)
    return (1 << 30) // processes if free is None else int(SPARE * free)


def has_room(size: int, device: torch.device, processes: int = 1) -> bool:
    """Whether activations of so many bytes may wait on the device, and leave enough of it. processes: on this machine."""
    free = free_memory(device, processes)
    return free is None or size <= WAITING * free


def free_memory(device: torch.device, processes: int = 1) -> int | None:
    """Bytes that this process may still take on the device: of a GPU's memory all that is free, of the host's, or of what a container or
    batch system lets it take of that, its part among so many processes. `None` where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        said = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(said["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError, IndexError):
        return None
    allowed = memory_left()
    free = free if allowed is None else min(free, allowed)
    return free // processes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(said in str(error) for said in _SAID_BY_ALLOCATORS)


def with_less_memory(
    attempt: Callable[[int, bool], None], sequences: int, helps: Callable[[], bool], given_up: Callable[[int, bool], None],
    together: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> None:  # fmt: skip
    """Calls `attempt(sequences, keeping)`, and again as often as memory runs out: without keeping what need not be there, and then with
    half as many sequences to a micro-batch each time.

    helps: asked then, whether a smaller batch needs less memory where it ran out. given_up: called before each further attempt, when
    everything that the last one held is free, with the number of sequences from now on, and whether what was kept is what is given up.
    together: entered around every attempt and what is decided of its error; of several processes all then leave it alike. Raises `RunError`
    where nothing is left to give up.
    """
    keeping = True
    while True:
        try:
            with together():
                return _refusing_the_last(attempt, sequences, keeping, helps)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if not keeping:  # all this not in the handler: the error holds the frames, and they hold the tensors
            sequences //= 2
        given_up(sequences, keeping)
        keeping = False


def _refusing_the_last(attempt: Callable[[int, bool], None], sequences: int, keeping: bool, helps: Callable[[], bool]) -> None:
    try:
        attempt(sequences, keeping)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or keeping or (sequences > 1 and helps()):
            raise
        why = "with one sequence at a time" if sequences == 1 else "where smaller batches do not help"
        what = str(error).partition(". ")[0] or type(error).__name__
        raise RunError(
            f"out of memory {why} ({what}); finished blocks are kept. Free memory and run the same command again, use "
            "--activations host or --device cpu, or start anew with fewer --calib-samples or a smaller --seq-len"
        ) from error
