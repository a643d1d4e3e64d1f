"""Where calibration text comes from, by name: what each source is called, and which reader it belongs to."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cloq.calibration.demo import demo_documents
from cloq.calibration.hub import hub_passages, hub_rows, hub_set
from cloq.calibration.local import SUFFIXES, local_passages, local_rows
from cloq.calibration.mixture import parse_mixture
from cloq.calibration.options import CALIBRATION, Options
from cloq.calibration.passages import whole
from cloq.calibration.rows import Row
from cloq.errors import CalibrationError

HUB_NAMES = {
    "c4": "allenai/c4:en:train",
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1:train",
    "pile": "NeelNanda/pile-10k::train",
}
"""Short names of data sets on the hub."""

NAMES = ("demo", "self", *HUB_NAMES)
"""Sources with a name of their own. A name wins over a file of the same name in the current folder, which is `./c4`."""


def documents(source: str, column: str | None = None, tokenizer=None, options: Options = CALIBRATION) -> Iterator[str]:
    """The documents of one source, whole and in order.

    column: of a data set, where it is not found by itself. tokenizer: needed for conversations, which its chat template writes. options:
    of the command, for messages.
    Raises `CalibrationError`, before the first document where that is possible, if the source is unknown, a mixture, or `self`,
    and whenever it cannot be read.
    """
    return whole(passages(single(source), column, tokenizer, options))


def single(source: str) -> str:
    """Raises `CalibrationError` if the source is a mixture."""
    if len(parts := parse_mixture(source)) > 1:
        raise CalibrationError(f"{source!r} is a mixture; here one text is needed: name one of {', '.join(part.source for part in parts)}")
    return parts[0].source


def source_rows(source: str, options: Options = CALIBRATION) -> Iterator[Row]:
    """The rows of one source as they are, in order, each with its place in words; a text file is one row, a string."""
    return _reader(source, options).rows()


def passages(source: str, column: str | None = None, tokenizer=None, options: Options = CALIBRATION) -> Iterator[str]:
    """The text of one source as it is read: documents, large ones in pieces (`Unfinished`)."""
    return _reader(source, options).passages(column, tokenizer)


def check(source: str) -> None:
    """Raises `CalibrationError` if there is no such source. Files are looked for, the hub is not asked."""
    if source != "self":
        _reader(source, CALIBRATION)


class _Reader(NamedTuple):
    """passages: `(column, tokenizer)` → text. rows: what it was made of."""

    passages: Callable[..., Iterator[str]]
    rows: Callable[[], Iterator[Row]]


def _reader(source: str, options: Options) -> _Reader:
    path = Path(os.path.expanduser(source))  # pathlib's own raises for a user that there is not
    if source == "demo":
        return _Reader(lambda column, tokenizer: demo_documents(), lambda: (("demo", text) for text in demo_documents()))
    if source == "self":
        raise CalibrationError(
            "'self' is text that the model samples while it is calibrated; it cannot be read. Name a text, a file or a data set"
        )
    if source in HUB_NAMES:
        wanted = hub_set(HUB_NAMES[source])
        return _Reader(lambda column, tokenizer: hub_passages(wanted, None, tokenizer, options), lambda: hub_rows(wanted, options))
    if os.path.exists(path):
        return _Reader(functools.partial(local_passages, path, options=options), functools.partial(local_rows, path))
    if not _looks_like_path(source) and (wanted := hub_set(source)):
        return _Reader(functools.partial(hub_passages, wanted, options=options), functools.partial(hub_rows, wanted, options))
    raise CalibrationError(_unknown(source, path, options))


def _looks_like_path(source: str) -> bool:
    endings = (*SUFFIXES, *(f"{suffix}.gz" for suffix in SUFFIXES))
    return (
        source.startswith((".", "/", "~"))
        or "\\" in source
        or re.match(r"[A-Za-z]:/", source) is not None
        or source.lower().endswith(endings)
    )


def _unknown(source: str, path: Path, options: Options) -> str:
    """No such source: what there is, and the nearest name."""
    names = [name for name in NAMES if name != "self" or options.calibrates]
    if _looks_like_path(source) or "/" in source:
        there = os.path.isdir(path.parent)
        near = difflib.get_close_matches(path.name, os.listdir(path.parent) if there else [], 1)
        hint = f" (did you mean {path.parent / near[0]}?)" if near else "" if there else f", nor a folder {path.parent}"
        return f"there is no file or folder {source}{hint}. Give a path that exists, or one of {', '.join(names)}"
    near = difflib.get_close_matches(source.lower(), [*names, *os.listdir()], 1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return (
        f"unknown {'calibration source' if options.calibrates else 'source of text'} {source!r}{hint}. Known: {', '.join(names)}, "
        f"a hub data set owner/name[:config[:split]], a file or folder ({', '.join(SUFFIXES)})"
        f"{', or a mixture a:0.5,b:0.5' if options.calibrates else ''}"
    )
