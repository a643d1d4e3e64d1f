"""Gives memory that was freed back to the system."""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def _trim():
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc: macOS, musl, Windows
        return None


def trim_heap() -> None:
    """Returns the free pages of glibc's heap; does nothing with other C libraries. Takes milliseconds.

    glibc learns from every large tensor that is freed to take the next one of that size from its heap, where tensors of many sizes
    leave gaps between each other. Without this a streamed run of 30 blocks grew by two blocks' weights a block, to as much as the whole
    model that it never loads.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
