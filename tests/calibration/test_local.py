"""Files and folders: every form, in pieces of any size, and every way in which one can be unreadable."""

import gzip
import json
import tracemalloc

import pytest

from cloq.calibration import documents, local
from cloq.calibration.passages import Unfinished, whole
from cloq.errors import CalibrationError, MissingLibrary

ROWS = [{"text": f"row {n}\n{'é' * n}", "n": n} for n in range(1, 8)]
TEXTS = [row["text"] for row in ROWS]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, data: str | bytes):
    data = data.encode() if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return str(path)


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.raw", "README"])
def test_a_text_file_is_one_document(tmp_path, name):
    assert list(documents(write(tmp_path / name, "one\n\ntwo\n"))) == ["one\n\ntwo\n"]


@pytest.mark.parametrize("block", [1, 3, 7, 1000])
def test_pieces_of_a_large_file_are_the_file(tmp_path, monkeypatch, block):
    monkeypatch.setattr(local, "_BLOCK", block)
    text = "Grüße, 世界 🙂.\nAnd so on.\n" * 3
    path = tmp_path / "a.txt"
    write(path, text)
    pieces = list(local.local_passages(path, None, None))
    assert "".join(pieces) == text
    assert [isinstance(piece, Unfinished) for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert list(whole(pieces)) == [text]


def test_byte_order_mark_and_line_ends_go(tmp_path):
    assert list(documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n"))) == ["one\ntwo\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "A.JSONL"])
def test_rows_one_per_line(tmp_path, name):
    assert list(documents(write(tmp_path / name, lines(ROWS[:3]) + "\n" + lines(ROWS[3:])))) == TEXTS


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_in_one_array(tmp_path, name, indent):
    assert list(documents(write(tmp_path / name, "\n " + json.dumps(ROWS, indent=indent) + "\n"))) == TEXTS


def test_an_array_is_read_as_it_is_used(tmp_path):
    """The end is broken, and nobody who asks for the first rows gets to know; who asks for all gets the line."""
    many = [{"text": "x" * 1000}] * 500
    path = write(tmp_path / "a.json", json.dumps(many, indent=0)[:-200])
    stream = documents(path)
    assert [next(stream) for _ in range(50)] == ["x" * 1000] * 50
    # a line for the bracket, three for each of 499 rows, and the text is the second line of the last
    with pytest.raises(CalibrationError, match=r"a\.json, line 1500: not valid JSON \(Unterminated string.*breaks off"):
        list(stream)


@pytest.mark.parametrize("before", ["", '{"text": "a"}\n'])
def test_a_line_that_never_ends_is_given_up(before, tmp_path, monkeypatch):
    """Before it is read whole: a file of zeros gzips to a thousandth."""
    monkeypatch.setattr(local, "_LONGEST_ROW", 2_000_000)
    path = write(tmp_path / "a.jsonl", before + '{"text": "' + "x" * 30_000_000)
    tracemalloc.start()
    with pytest.raises(CalibrationError, match=r"line \d has more than 2000000 characters"):
        list(documents(path))
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_an_element_that_never_ends_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_LONGEST_ROW", 200_000)
    path = write(tmp_path / "a.json", '[{"text": "' + "x" * 3_000_000)
    with pytest.raises(CalibrationError, match="line 1: not valid JSON"):
        list(documents(path))


def test_parquet(tmp_path):
    assert list(documents(write_parquet(tmp_path / "a.parquet", ROWS * 40))) == TEXTS * 40
    assert list(documents(write_parquet(tmp_path / "b.parquet", [{"a": "x", "b": "y"}]), column="b")) == ["y"]


def test_parquet_conversations(tmp_path, tokenizer):
    path = write_parquet(tmp_path / "a.parquet", [{"messages": [{"role": "user", "content": "x"}]}])
    assert list(documents(path, tokenizer=tokenizer)) == ["<|user|>x<|end|>\n"]


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "c/deep/d.md", "fourth")
    write(tmp_path / "c/a.jsonl.gz", lines([{"body": "third"}]))
    write_parquet(tmp_path / "a.parquet", [{"text": "first"}])
    write(tmp_path / ".git/x.txt", "hidden")
    write(tmp_path / "image.png", b"\x89PNG\x00")
    write(tmp_path / "empty.txt", "")
    assert list(documents(str(tmp_path))) == ["first", "second", "third", "fourth"]


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "at home")
    assert list(documents("~/a.txt")) == ["at home"]


REFUSED = [
    ("a.txt", b"fine\nst\xe4ndig\n", r"a\.txt, line 2: not UTF-8 .*iconv"),
    ("a.txt", "text\n".encode("utf-16"), r"a\.txt, line 1: not UTF-8"),
    ("a.txt", b"", r"a\.txt holds no text; give other text"),
    ("a.txt", b" \n\n", r"a\.txt holds no text"),
    ("a.txt.gz", gzip.compress(b"fine\nst\xe4ndig\n", mtime=0)[:-4] + b"\0\0\0\1", r"a\.txt\.gz(, line \d: not UTF-8| is a broken)"),
    ("a.bin", b"ab\0cd", r"a\.bin is not text \(it holds NUL bytes\)\. Allowed: \.txt"),
    ("a.jsonl", b"", r"a\.jsonl holds no text"),
    ("a.json", b"[]", r"a\.json holds no text"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl, line 2: not valid JSON .*one object per line"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n17\n', r"a\.jsonl, line 2 is a number; a row is an object"),
    ("a.json", b'{\n "text": "a"\n}', r"a\.json, line 1: not valid JSON"),
    ("a.json", b'[\n{"text": "a"},\n{"text": b}\n]', r"a\.json, line 3: not valid JSON"),
    ("a.json", b'[{"text": "a"}]\n{"text": "b"}', r"a\.json, line 1: something follows the array"),
    ("a.json", b"[" * 100_000, r"a\.json, line 1: not valid JSON \(nested too deeply\)"),
    ("a.jsonl", b'{"a":' * 100_000, r"a\.jsonl, line 1: not valid JSON"),
    ("a.jsonl", b'{"text": "a"}\n{"text": ' + b"9" * 5000 + b"}", r"a\.jsonl, line 2: not valid JSON .*limit"),
    ("a.json", b'[{"text": ' + b"9" * 5000 + b"}]", r"a\.json, line 1: not valid JSON .*limit"),
    ("a.parquet", b"not parquet at all", r"a\.parquet cannot be read as Parquet .*check that it is whole"),
    ("a.csv", b"text\nhello\n", r"a\.csv: \.csv is not read\. Convert it to \.jsonl or \.parquet"),
]


@pytest.mark.parametrize(("name", "data", "message"), REFUSED)
def test_refusals_name_file_and_remedy(tmp_path, name, data, message):
    with pytest.raises(CalibrationError, match=message):
        list(documents(write(tmp_path / name, data)))


def test_broken_gzip(tmp_path):
    whole_file = gzip.compress(b"some text " * 1000)
    for name, data in {"short.txt.gz": whole_file[:-20], "not.txt.gz": b"plain"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CalibrationError, match=rf"{name} is a broken or truncated gzip file"):
            list(documents(str(tmp_path / name)))


def test_a_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(CalibrationError, match=r"a\.txt cannot be read \(No such file or directory\); check the path"):
        list(documents(str(tmp_path / "folder")))


def test_folders_without_text(tmp_path):
    with pytest.raises(CalibrationError, match=r"holds no \.txt, .*\.parquet file; name one file"):
        list(documents(str(tmp_path)))
    write(tmp_path / "a.csv", "x")
    with pytest.raises(CalibrationError, match=r"\(there is: \.csv\); name one file"):
        list(documents(str(tmp_path)))
    write(tmp_path / "a.txt", "\n")
    write(tmp_path / "b.txt", "")
    with pytest.raises(CalibrationError, match="holds no text in its 2 files"):
        list(documents(str(tmp_path)))


def test_parquet_without_its_library(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingLibrary, match=r"a\.parquet needs the library pyarrow.*pip install pyarrow"):
        list(documents(path))
