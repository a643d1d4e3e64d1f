"""What every source yields: strings that are whole documents, or pieces of a document too large to hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class Unfinished(str):
    """A piece of a document that goes on in the next string: nothing belongs between the two."""

    __slots__ = ()


def whole(passages: Iterable[str]) -> Iterator[str]:
    """The same text with pieces put together: one string per document."""
    pieces: list[str] = []
    for passage in passages:
        pieces.append(passage)
        if not isinstance(passage, Unfinished):
            yield "".join(pieces)
            pieces = []
    if pieces:
        yield "".join(pieces)
