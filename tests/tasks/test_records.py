"""Rows on disk: what was written comes back, and only what was measured again is replaced."""

import pytest

from cloq.errors import CalibrationError, TaskError
from cloq.tasks.records import is_record, read_records, write_records
from cloq.tasks.spec import RowResult


def rows(task: str, value: float) -> tuple[RowResult, ...]:
    detail = {"text": "half a \ud83d pair, é", "gold": ["x"]} if task == "svamp" else {"log_likelihoods": [-1.5, value]}
    return tuple(RowResult(task, n, f"key{n}", "cloq, 0-shot", {"acc": value}, n == 1, detail) for n in range(2))


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "new/rows.jsonl"
    write_records(path, {"a": rows("piqa", 1.0), "b": rows("arc_easy", 0.5)})
    assert read_records(path) == {"a": list(rows("piqa", 1.0)), "b": list(rows("arc_easy", 0.5))} and is_record(path)


def test_half_a_character_does_not_stop_the_writing(tmp_path):
    write_records(tmp_path / "rows.jsonl", {"a": rows("svamp", 1.0)})
    assert read_records(tmp_path / "rows.jsonl")["a"][0].detail["text"].startswith("half a ")


def test_what_is_measured_again_is_replaced_and_the_rest_stays(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_records(path, {"a": rows("piqa", 1.0) + rows("cb", 1.0), "b": rows("piqa", 1.0)})
    write_records(path, {"a": rows("piqa", 0.0), "c": rows("cb", 0.0)})
    found = read_records(path)
    assert found["a"] == [*rows("cb", 1.0), *rows("piqa", 0.0)] and found["b"] == list(rows("piqa", 1.0)) and list(found) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "error"), [('{"model": "a"}\n', TaskError), ("", TaskError), ("{\n", CalibrationError), ("[1]", TaskError)]
)
def test_other_files_are_refused(content, error, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(error):
        read_records(tmp_path / "rows.jsonl")
