"""Gives memory that was freed back to the system: two ways with glibc's heap, and nothing with any other.

glibc learns from every large tensor that is freed to take the next one of that size from its heap, where tensors of many sizes leave gaps
between each other that stay with the process.
"""

from __future__ import annotations

import ctypes
import functools

LARGE = 1 << 18
"""Bytes from which on an allocation is a tensor worth a mapping of its own."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@functools.cache
def _glibc():
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
    except (OSError, TypeError):  # no C library to be had this way, as on Windows
        return None


def trim_heap() -> None:
    """Returns the heap's free pages. Takes milliseconds.

    Without this a streamed run of 30 blocks grew by two blocks' weights a block, to as much as the whole model that it never loads.
    """
    if _glibc():
        _glibc().malloc_trim(0)


def map_large_allocations() -> None:
    """From now on every allocation of `LARGE` or more bytes has a mapping of its own, which goes when it is freed.

    For training, whose steps allocate and free the same activations between those that stay. Costs the system's work of handing out
    fresh pages. Changes the whole process, so the command line calls it and the library never does.
    """
    if _glibc():
        _glibc().mallopt(_MMAP_THRESHOLD, LARGE)
        _glibc().mallopt(_TRIM_THRESHOLD, LARGE // 2)
