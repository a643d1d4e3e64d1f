"""Text from data sets of the Hugging Face hub, streamed: what is used is fetched, a data set is never downloaded whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from cloq.calibration.options import CALIBRATION, Options
from cloq.calibration.passages import Unfinished
from cloq.calibration.rows import Row, TextColumn, row_texts
from cloq.errors import CalibrationError, MissingLibrary

_TIMEOUT = 10.0
"""Seconds within which the hub has to answer one small question before anything is asked of `datasets`, which would retry for
minutes."""

_ONE_TEXT = {"Salesforce/wikitext": "text"}
"""Data sets whose rows are the lines of one text, and the column: joined by blank lines as everyone does, so that numbers
compare."""


class HubSet(NamedTuple):
    """`owner/name`, a configuration where the data set has several, and a split."""

    name: str
    config: str | None = None
    split: str = "train"


def local_instead(options: Options) -> str:
    """The remedy where the hub is not to be had."""
    own = f" {options.text} self," if options.calibrates else ""
    return f"Without the hub: {options.text} demo (always there),{own} or a local file such as {options.text} text.txt or rows.jsonl"


def hub_set(source: str) -> HubSet | None:
    """`owner/name[:config[:split]]` → its parts; an empty configuration is the default one. `None` for anything else."""
    name, *rest = source.split(":")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or len(rest) > 2:
        return None
    config, split = [*rest, "", ""][:2]
    return HubSet(name, config or None, split or "train")


def hub_passages(wanted: HubSet, column: str | None, tokenizer, options: Options = CALIBRATION) -> Iterator[str]:
    """The data set's documents in its own order; `Salesforce/wikitext` as one long document.

    Raises `CalibrationError` if the hub does not answer in seconds, does not have it, or has no such configuration, split or
    column.
    """
    if wanted.name not in _ONE_TEXT:
        yield from row_texts(hub_rows(wanted, options), column, tokenizer, options)
        return
    reader, before = TextColumn(column or _ONE_TEXT[wanted.name], options.column), ""
    for where, row in hub_rows(wanted, options):
        yield Unfinished(before + reader.content(row, where))
        before = "\n\n"


def hub_rows(wanted: HubSet, options: Options = CALIBRATION) -> Iterator[Row]:
    """The data set's rows as they are. Errors as above."""
    try:
        import datasets
    except ImportError as error:
        raise MissingLibrary("datasets", f"reading {wanted.name} from the hub") from error
    _ask(wanted.name, options)
    try:
        stream = datasets.load_dataset(wanted.name, wanted.config, split=wanted.split, streaming=True)
        for number, row in enumerate(stream, 1):
            yield f"{wanted.name}, row {number}", row
    except Exception as error:  # `datasets` raises dozens of unrelated types, those of file systems and HTTP libraries among them
        raise CalibrationError(
            f"the hub data set {wanted.name} (configuration {wanted.config or 'default'}, split {wanted.split}) cannot be read: "
            f"{_reason(error)}. Name another as owner/name:config:split. {local_instead(options)}"
        ) from error


def _ask(name: str, options: Options) -> None:
    """One request, no retries: is the hub there, and does it have this data set? In offline mode the answer is left to the
    cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=_TIMEOUT)
    except OfflineModeIsEnabled:
        return
    except RepositoryNotFoundError as error:
        raise CalibrationError(
            f"the hub has no data set {name!r} that you may read, and there is no local file or folder of that name. "
            "Check the spelling; for a private or gated one accept its terms and run: hf auth login"
        ) from error
    except Exception as error:  # connection, proxy, certificate and server errors come in many types
        raise CalibrationError(
            f"the Hugging Face hub cannot be reached for the data set {name} ({_reason(error)}). {local_instead(options)}. "
            "If the data set is in this machine's cache, set HF_HUB_OFFLINE=1"
        ) from error


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300].rstrip(". ")
