"""What disks, downloads and editors do to bytes. Every function leaves its argument alone; the result may be equal to it."""

from __future__ import annotations

import random


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One of the damages below, at a random place."""
    return draw.choice([flipped, flipped, truncated, zeroed, garbled, repeated, cut])(content, draw)


def flipped(content: bytes, draw: random.Random) -> bytes:
    """One bit, the other way round."""
    if not content:
        return content
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def truncated(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def zeroed(content: bytes, draw: random.Random) -> bytes:
    """A run of zeros, as a crash of the file system leaves them."""
    start, length = _span(content, draw)
    return content[:start] + bytes(length) + content[start + length :]


def garbled(content: bytes, draw: random.Random) -> bytes:
    start, length = _span(content, draw)
    return content[:start] + draw.randbytes(length) + content[start + length :]


def repeated(content: bytes, draw: random.Random) -> bytes:
    """A piece of it twice."""
    start, length = _span(content, draw)
    return content[: start + length] + content[start:]


def cut(content: bytes, draw: random.Random) -> bytes:
    """A piece of it gone."""
    start, length = _span(content, draw)
    return content[:start] + content[start + length :]


def _span(content: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(content) + 1)
    return start, min(len(content) - start, draw.choice([1, 3, 16, 64, 512]))
