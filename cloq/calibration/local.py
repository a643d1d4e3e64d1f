"""Text from files: plain text, JSON rows, Parquet, gzipped or not, and folders of them.

Everything is read as it is asked for, so a file of any size costs only what is used of it.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from cloq.calibration.options import CALIBRATION, Options
from cloq.calibration.passages import Unfinished
from cloq.calibration.rows import Row, row_texts
from cloq.errors import CalibrationError, MissingLibrary

TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet")
"""What a folder is searched for; text and JSON may end in .gz too."""

_TABLES = (".csv", ".tsv", ".arrow", ".feather", ".xlsx")

_BLOCK = 1 << 20
"""Characters of a text file per piece."""

_LONGEST_ROW = 1 << 26
"""Characters after which a row that does not end, in a line or in a JSON array, is taken for broken."""


def local_passages(path: Path, column: str | None, tokenizer, options: Options = CALIBRATION) -> Iterator[str]:
    """The documents of a file, or of all files in a folder and below it in the order of their names.

    A text file is one document, a row is one document. Names that start with a dot are passed over. Raises `CalibrationError` for
    what cannot be read, with file and line.
    """
    files = _files(path) if path.is_dir() else [path]
    found = False
    for file in files:
        for passage in _file_passages(file, column, tokenizer, options):
            found = found or bool(passage.strip())
            yield passage
    if not found:
        inside = f" in its {len(files)} files" if path.is_dir() else ""
        raise CalibrationError(f"{path} holds no text{inside}; give other text to {options.text}")


def local_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, or of all files in a folder and below it; a text file is one row, a string. Errors as above."""
    for file in _files(path) if path.is_dir() else [path]:
        rows = _rows_of(file)
        yield from ((str(file), "".join(_blocks(file))),) if rows is None else rows


def _files(folder: Path) -> list[Path]:
    inside = [file for file in folder.rglob("*") if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    files = sorted((file for file in inside if _suffix(file) in SUFFIXES and not file.is_dir()), key=lambda file: file.as_posix())
    if not files:
        others = sorted({file.suffix for file in inside if file.suffix and file.is_file()})
        there = f" (there is: {', '.join(others)})" if others else ""
        raise CalibrationError(f"the folder {folder} holds no {', '.join(SUFFIXES)} file{there}; name one file, or convert to .jsonl")
    return files


def _suffix(file: Path) -> str:
    """The ending that says what is inside: `.jsonl` for `rows.jsonl.gz` too; Parquet is never gzipped."""
    name = file.name.lower()
    inner = Path(name.removesuffix(".gz")).suffix
    return "" if name.endswith(".gz") and inner == ".parquet" else inner


def file_rows(file: Path) -> Iterator[Row]:
    """The rows of one JSON or Parquet file as they are, each with its place. Raises `CalibrationError` for what cannot be read."""
    return _parquet_rows(file) if _suffix(file) == ".parquet" else _json_rows(file)


def _file_passages(file: Path, column: str | None, tokenizer, options: Options) -> Iterator[str]:
    rows = _rows_of(file)
    yield from _blocks(file) if rows is None else row_texts(rows, column, tokenizer, options)


def _rows_of(file: Path) -> Iterator[Row] | None:
    """The rows of a file; `None` for one that is plain text."""
    suffix = _suffix(file)
    if suffix in _TABLES:
        raise CalibrationError(f"{file}: {suffix} is not read. Convert it to .jsonl or .parquet, with the text in one column")
    return _json_rows(file) if suffix in JSON_SUFFIXES else _parquet_rows(file) if suffix == ".parquet" else None


def _blocks(file: Path) -> Iterator[str]:
    with _opened(file) as stream:
        block = stream.read(_BLOCK)
        while block:
            if "\0" in block:
                raise CalibrationError(
                    f"{file} is not text (it holds NUL bytes). Allowed: {', '.join(SUFFIXES)}, or any other plain UTF-8 text"
                )
            following = stream.read(_BLOCK)
            yield Unfinished(block) if following else block
            block = following


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    """The file as UTF-8 text, line ends as `\\n`; whatever goes wrong while it is read becomes a `CalibrationError`."""
    try:
        with gzip.open(file) if file.name.lower().endswith(".gz") else open(file, "rb") as binary:
            yield io.TextIOWrapper(binary, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{file}, line {_first_bad_line(file)}: not UTF-8 ({error.reason}). Convert it first, for example: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {file.name} > utf8-{file.name}"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CalibrationError(f"{file} is a broken or truncated gzip file ({error}); get it again") from error
    except OSError as error:
        raise CalibrationError(f"{file} cannot be read ({error.strerror or error}); check the path and its permissions") from error


def _first_bad_line(file: Path) -> int:
    number = 0
    broken_too = contextlib.suppress(gzip.BadGzipFile, EOFError, zlib.error)  # not far behind: it is read in pieces
    with gzip.open(file) if file.name.lower().endswith(".gz") else open(file, "rb") as binary, broken_too:
        for number, line in enumerate(binary, 1):
            try:
                line.decode("utf8")
            except UnicodeDecodeError:
                return number
    return number + 1


# -- JSON --------------------------------------------------------------------------------------------------------------


def _json_rows(file: Path) -> Iterator[Row]:
    """One array of rows, or one row per line: what the file starts with decides, not its name, for both are called .json."""
    with _opened(file) as stream:
        number, line = 0, "\n"
        while line and not line.strip():
            number, line = number + 1, stream.readline(_BLOCK)  # an array may be one line as long as the file
        if line.lstrip().startswith("["):
            yield from _array(file, stream, line, number)
            return
        if line and not line.endswith("\n"):
            line += stream.readline(_LONGEST_ROW)
        while line:
            if len(line) > _LONGEST_ROW:
                raise CalibrationError(
                    f"{file}, line {number} has more than {_LONGEST_ROW} characters; a file of rows has one object per line"
                )
            if line.strip():
                yield f"{file}, line {number}", _parsed(file, line, number)
            number, line = number + 1, stream.readline(_LONGEST_ROW + 1)


def _parsed(file: Path, line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
        raise CalibrationError(
            f"{file}, line {number}: not valid JSON ({error}). A file of rows has one object per line, or is one array of objects"
        ) from error


_SPACE = re.compile(r"[\s,]*")


def _array(file: Path, stream: TextIO, head: str, line: int) -> Iterator[Row]:
    """The elements of an array, decoded one by one; `head` is the text up to here, starting in line `line`."""
    decoder, ask = json.JSONDecoder(), 1 << 16
    buffer, at, ended = head, head.index("[") + 1, False
    while True:
        start = _SPACE.match(buffer, at).end()
        line, at = line + buffer.count("\n", at, start), start
        if buffer[at : at + 1] == "]":
            if (buffer[at + 1 :] + stream.read(ask)).strip():
                raise CalibrationError(
                    f"{file}, line {line}: something follows the array of rows. A file is one array, or one object per line"
                )
            return
        try:
            value, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:  # broken, or not all of it read yet
            if ended or len(buffer) - at > _LONGEST_ROW or not isinstance(error, json.JSONDecodeError):
                raise _broken(file, error, line + buffer.count("\n", at, getattr(error, "pos", at))) from error
            more = stream.read(ask)
            buffer, at, ended, ask = buffer[at:] + more, 0, not more, ask * 2
            continue
        yield f"{file}, line {line}", value
        line, at, ask = line + buffer.count("\n", at, end), end, 1 << 16


def _broken(file: Path, error: Exception, line: int) -> CalibrationError:
    reason = getattr(error, "msg", "nested too deeply" if isinstance(error, RecursionError) else error)
    return CalibrationError(
        f"{file}, line {line}: not valid JSON ({reason}). The array of rows breaks off or is malformed here; get it again"
    )


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingLibrary("pyarrow", f"reading {file.name}") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(os.fspath(file)) as table:
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).strip().splitlines() or ["unknown"])[0]
        raise CalibrationError(f"{file} cannot be read as Parquet ({reason}); check that it is whole") from error
