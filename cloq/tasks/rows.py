"""Data files → the rows of a task: found by the task's name in a folder, read, checked, and drawn by a seed.

Nothing is fetched for a task whose data are named by the user. Without them, a task that the hub has is read from there.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloq.calibration.local import file_rows
from cloq.errors import TaskError
from cloq.tasks.spec import Options, Question, Task

SUFFIXES = (".jsonl.gz", ".json.gz", ".jsonl", ".ndjson", ".json", ".parquet")
_SPLITS = {"test": "test", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "train": "train"}


@dataclass(frozen=True)
class Asked:
    """A row as it is asked. index: its number in the data, from 0. key: of its content."""

    index: int
    key: str
    item: Options | Question


@dataclass(frozen=True)
class TaskRows:
    """The rows that are evaluated. total: rows in the data. source: where they are from. shots: examples before each row, drawn from
    `pool`. protocol: who asks and how, in words that stand beside every number. note: what is odd about the data, if anything."""

    task: Task
    rows: tuple[Asked, ...]
    total: int
    source: str
    shots: int = 0
    pool: str = ""
    protocol: str = "cloq, 0-shot"
    note: str = ""


def read_task(
    task: Task, data: Mapping[str, Path], *, limit: int | None = None, shots: int | None = None, seed: int = 0
) -> TaskRows:  # fmt: skip
    """The rows of a task, with their examples before them.

    data: the user's files and folders by task name; under `""` what serves every task. limit: so many rows, drawn by the seed. shots:
    examples, `None` for the task's own number; they are drawn for each row by the seed and the row's number, from the training rows beside
    the data where there are any, else from the other rows. Raises `TaskError` or `CalibrationError` for what cannot be read.
    """
    named = data.get(task.name, data.get(""))
    raw, source, training = _local(task, named, task.name in data) if named is not None else _hub(task)
    rows = [Asked(index, _key(row), _item(task, row, where)) for index, (where, row) in enumerate(raw)]
    chosen = rows if limit is None or limit >= len(rows) else [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), limit))]
    shots = task.shots if shots is None else shots
    pool, pool_name = rows, f"the other rows of {source}"
    if shots and training is not None:
        pool, pool_name = [Asked(i, _key(row), _item(task, row, where)) for i, (where, row) in enumerate(training[0])], training[1]
    asked = tuple(Asked(row.index, row.key, row.item.after(_before(task, row, pool, shots, seed))) for row in chosen)
    protocol = f"cloq, {shots}-shot" + (f" (seed {seed})" if shots else "")
    training_file = named is not None and named.is_file() and _split(named) == "train"
    note = f"{task.name}: {source} is a training file by its name; it is evaluated since --task-data names it" if training_file else ""
    return TaskRows(task, asked, len(rows), source, shots, pool_name if shots else "", protocol, note)


def _before(task: Task, row: Asked, pool: Sequence[Asked], shots: int, seed: int) -> str:
    """What stands before a row: the task's description and the examples. Another limit leaves a row's examples as they are."""
    others = [other for other in pool if other.key != row.key] if shots else []
    if len(others) < shots:
        raise TaskError(f"{task.name}: {shots} examples are wanted, but there are {len(others)} rows to take them from; lower --shots")
    drawn = random.Random(f"{seed}:{row.index}").sample(others, shots)
    return task.description + "".join(other.item.solved() + task.separator for other in drawn)


def _item(task: Task, row: Any, where: str) -> Options | Question:
    if not isinstance(row, Mapping):
        raise TaskError(f"{where} is no object with named columns; {task.name} needs {_wanted(task)}")
    missing = _missing(task, row)
    if missing:
        raise TaskError(f"{where} has no column {' or '.join(missing[0].split('|'))}; {_needs(task, row)}")
    try:
        return task.read(row)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise TaskError(f"{where} is no row of {task.name} ({type(error).__name__}: {error})") from error


def _missing(task: Task, row: Mapping[str, Any]) -> list[str]:
    return [column for column in task.columns if not any(name in row for name in column.split("|"))]


def _wanted(task: Task) -> str:
    return ", ".join(column.replace("|", " or ") for column in task.columns)


def _needs(task: Task, row: Mapping[str, Any]) -> str:
    advice = f". {task.advice[0].upper()}{task.advice[1:]}" if task.advice else ""
    return f"{task.name} needs {_wanted(task)}; there {'is' if len(row) == 1 else 'are'} {', '.join(map(str, row)) or 'none'}{advice}"


def _key(row: Any) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()[:16]


# -- local files -------------------------------------------------------------------------------------------------------

Raw = list[tuple[str, Any]]
"""(place, row) for every row."""


def _local(task: Task, path: Path, named: bool) -> tuple[Raw, str, tuple[Raw, str] | None]:
    """The rows, the file's name, and the training rows beside it if there are any. named: the path was given for this very task."""
    if not path.exists():
        raise TaskError(f"{task.name}: there is no file or folder {path}; name one with --task-data")
    file = path if path.is_file() else _pick(task, path, named)
    raw = _read(task, file)
    siblings = [other for other in _data_files(file.parent, deep=False) if _split(other) == "train" and _stem(other) == _stem(file)]
    fitting = [other for other in siblings if _fits(task, other)]
    return raw, _called(file), (_read(task, fitting[0]), _called(fitting[0])) if fitting else None


def _called(file: Path) -> str:
    """The file's name, with its folder's where it is nothing but a split."""
    return f"{file.resolve().parent.name}/{file.name}" if _bare(file) in _SPLITS else file.name


def _read(task: Task, file: Path) -> Raw:
    raw = list(file_rows(file))
    if not raw:
        raise TaskError(f"{task.name}: {file} holds no rows; give another file to --task-data")
    return raw


def _pick(task: Task, folder: Path, named: bool) -> Path:
    """The file of a folder that is the task's: by its name or its folder's, with the columns that the task needs, of the first split."""
    files = [file for file in _data_files(folder, deep=True) if _split(file) != "train"]
    candidates = files if named and folder.is_dir() else [file for file in files if _slug(_stem(file)) in task.files]
    if not candidates:
        there = ", ".join(sorted({_stem(file) for file in files})[:12]) or _no_files(folder)
        raise TaskError(
            f"{task.name}: no data in {folder} (there: {there}). Name a file: --task-data {task.name}=FILE, called like {task.files[0]}"
        )
    fitting = [file for file in candidates if _fits(task, file)]
    if not fitting:
        first = next(iter(file_rows(candidates[0])), None)
        if first is None:
            raise TaskError(f"{task.name}: {candidates[0]} holds no rows; give another file to --task-data")
        _item(task, first[1], first[0])  # raises, naming the columns
    best = min(_rank(task, file) for file in fitting)
    chosen = [file for file in fitting if _rank(task, file) == best]
    if len(chosen) > 1:
        raise TaskError(f"{task.name}: both {chosen[0]} and {chosen[1]} could be meant; name one: --task-data {task.name}=FILE")
    return chosen[0]


def _no_files(folder: Path) -> str:
    training = [file.name for file in _data_files(folder, deep=True)]
    return f"training files alone, such as {training[0]}, which are for examples" if training else "no .json, .jsonl or .parquet files"


def _data_files(folder: Path, deep: bool) -> list[Path]:
    files = folder.rglob("*") if deep else folder.iterdir()
    return sorted(file for file in files if file.is_file() and file.name.lower().endswith(SUFFIXES) and not file.name.startswith("."))


def _fits(task: Task, file: Path) -> bool:
    first = next(iter(file_rows(file)), None)
    return first is not None and isinstance(first[1], Mapping) and not _missing(task, first[1])


def _rank(task: Task, file: Path) -> int:
    split = _split(file)
    return task.splits.index(split) if split in task.splits else len(task.splits)


def _bare(file: Path) -> str:
    name = file.name.lower()
    return _slug(name.removesuffix(next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")))


def _split(file: Path) -> str | None:
    """`test`, `validation` or `train`, from the end of the file's name."""
    return _SPLITS.get(_bare(file).rpartition("_")[2])


def _stem(file: Path) -> str:
    """What the file is of: its name without the split, or its folder's where the name is nothing but a split."""
    name, _, last = _bare(file).rpartition("_")
    if last not in _SPLITS:
        return _bare(file)
    return name or _slug(file.resolve().parent.name)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


# -- the hub -----------------------------------------------------------------------------------------------------------

_TIMEOUT = 10.0
"""Seconds in which the hub has to answer one small question, before `datasets` would retry for minutes."""


def _hub(task: Task) -> tuple[Raw, str, tuple[Raw, str] | None]:
    if task.hub is None:
        raise TaskError(f"{task.name} has no data set on the hub; name its file with --task-data (columns {_wanted(task)})")
    name, config, split = task.hub.split(":") if ":" in task.hub else (task.hub, "", "validation")
    _ask(task, name)
    return (
        _fetch(task, name, config, split),
        f"{name}, {split}",
        (_fetch(task, name, config, "train"), f"{name}, train") if task.shots else None,
    )


def _ask(task: Task, name: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        HfApi().dataset_info(name, timeout=_TIMEOUT)
    except OfflineModeIsEnabled:  # the cache may have it
        return
    except Exception as error:  # connection, proxy, certificate and server errors come in many types
        raise TaskError(
            f"{task.name}: no --task-data is given, and the hub does not give {name} ({_reason(error)}). {_instead(task)}"
        ) from error


def _fetch(task: Task, name: str, config: str, split: str) -> Raw:
    import datasets

    try:
        rows: Iterable = datasets.load_dataset(name, config or None, split=split)
        return [(f"{name}, row {number}", dict(row)) for number, row in enumerate(rows, 1)]
    except Exception as error:  # `datasets` raises dozens of unrelated types
        raise TaskError(
            f"{task.name}: the hub data set {name} ({config or 'default'}, {split}) cannot be read ({_reason(error)}). {_instead(task)}"
        ) from error


def _instead(task: Task) -> str:
    return f"Name a local file or folder: --task-data PATH, with the columns {_wanted(task)}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0][:200]}".rstrip(". ")
