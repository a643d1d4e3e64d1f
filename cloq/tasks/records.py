"""Every row's result in a JSON-lines file, so that models can be compared later without being run again."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from cloq.calibration.local import file_rows
from cloq.errors import TaskError
from cloq.streaming.store import write_atomically, writing
from cloq.tasks.spec import RowResult

SUFFIXES = (".jsonl", ".jsonl.gz")


def is_record(path: Path) -> bool:
    return path.is_file() and path.name.endswith(SUFFIXES)


def write_records(path: Path, rows: Mapping[str, Sequence[RowResult]]) -> None:
    """Adds the rows of every model, by its label, to the file; earlier rows of the same model and task are replaced."""
    new = {(label, row.task) for label, own in rows.items() for row in own}
    earlier = read_records(path) if path.exists() else {}
    kept = {label: [row for row in own if (label, row.task) not in new] for label, own in earlier.items()}
    merged = {label: [*kept.get(label, ()), *rows.get(label, ())] for label in (*earlier, *(l for l in rows if l not in earlier))}
    lines = [json.dumps({"model": label, **asdict(row)}, default=str) for label, own in merged.items() for row in own]
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, ("\n".join(lines) + "\n").encode())


def refuse_unusable(path: Path) -> None:
    """Raises, before anything is evaluated, what `write_records` would: `RunError` for a folder that cannot be written, `TaskError` for a
    file with other content."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if path.exists():
        read_records(path)


def _writing(path: Path) -> AbstractContextManager[None]:
    return writing(path.parent, "make room or name another file with --rows, and run the same command again")


def read_records(path: Path) -> dict[str, list[RowResult]]:
    """Rows by model. Raises `TaskError` for a file that `write_records` did not make."""
    found: dict[str, list[RowResult]] = {}
    for where, values in file_rows(path):
        try:
            values = dict(values)
            found.setdefault(values.pop("model"), []).append(RowResult(**values))
        except (KeyError, TypeError, ValueError) as error:
            raise TaskError(
                f"{where} is no row of an evaluation, as cloq eval --rows writes them ({type(error).__name__}: {error})"
            ) from error
    if not found:
        raise TaskError(f"{path} holds no rows of an evaluation")
    return found
