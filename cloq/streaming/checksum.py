"""A checksum inside the file that it is of: SHA-256 of every byte, its own digits counted as zeros.

    metadata = {"block": '{"sha256": "000…0", …}'}      `BLANK` where the digits will stand
    seal(path)                                          the zeros become the digits
    verify(path)                                        `DamageError` unless they are those of the file as it is now

One file instead of two, so that content and checksum appear in the same moment. It finds accidents (a flipped bit, a file cut short, a
page of zeros after a crash), not forgers, who can seal a file as well.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cloq.errors import CloqError

BLANK = "0" * 64
_DIGITS = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')
_LONGEST_HEADER = 100_000_000
"""Bytes; the same bound as the safetensors library's."""
_PIECE = 1 << 20


class DamageError(CloqError):
    """A file's bytes are not the ones that were written. The message is a reason without the file's name."""


def seal(path: Path) -> None:
    """Puts the checksum into a safetensors file whose metadata hold JSON text with `"sha256": BLANK`; the first such place counts."""
    with path.open("r+b") as file:
        at, digits = _place(file)
        if digits != BLANK.encode():
            raise ValueError(f"{path} is sealed already")
        digest = _digest(file, at)
        file.seek(at)
        file.write(digest.encode())


def verify(path: Path) -> None:
    """Raises `DamageError` if the file is not as `seal` left it, or was never sealed. Reads the whole file, a piece at a time."""
    with path.open("rb") as file:
        at, digits = _place(file)
        if _digest(file, at) != digits.decode():
            raise DamageError("its checksum does not match its content")


class _Place(NamedTuple):
    """Of the digits in the file: the offset, and what stands there."""

    at: int
    digits: bytes


def _place(file: BinaryIO) -> _Place:
    length = int.from_bytes(file.read(8), "little")
    if length > min(_LONGEST_HEADER, os.fstat(file.fileno()).st_size):
        raise DamageError("it is cut short, or its header is damaged")
    found = _DIGITS.search(file.read(length))
    if found is None:
        raise DamageError("it has no checksum")
    return _Place(8 + found.start(1), found[1])


def _digest(file: BinaryIO, at: int) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    digest.update(file.read(at))
    digest.update(BLANK.encode())
    file.seek(at + len(BLANK))
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()
