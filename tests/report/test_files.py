import json

import pytest

from cloq.errors import RunError
from cloq.report import REPORT_FILE, add_quality, carry_over, read_report, weight_bytes, write_report
from tests.report import synthetic

FILES = {"report.json", "layers.csv", "report.html", "README.md"}


def test_written_and_read_back(tmp_path):
    report = synthetic.report()
    write_report(tmp_path, report)
    assert {path.name for path in tmp_path.iterdir()} == FILES and read_report(tmp_path) == report
    summary = json.loads((tmp_path / REPORT_FILE).read_text("utf8"))["summary"]
    assert summary["repaired"] == pytest.approx(report.repaired()) and summary["layers"] == 12


def test_equal_reports_give_equal_bytes(tmp_path):
    for folder in ("a", "b"):
        write_report(tmp_path / folder, synthetic.report())
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_quality_is_added_to_all_files_and_replaced_where_it_is_the_same(tmp_path):
    write_report(tmp_path, synthetic.report(quality=()))
    assert "Perplexity" not in (tmp_path / "report.html").read_text("utf8")
    add_quality(tmp_path, synthetic.quality("one"))
    add_quality(tmp_path, synthetic.quality("two"))
    added = add_quality(tmp_path, synthetic.quality("one", 2.0))
    assert [(q.text, round(q.perplexity, 2)) for q in added.quality if q.model == "16-bit"] == [("two", 24.13), ("one", 48.26)]
    assert read_report(tmp_path) == added
    for name in ("report.html", "README.md"):
        assert "48.26" in (tmp_path / name).read_text("utf8")


def test_a_repeated_command_forgets_nothing(tmp_path):
    first = synthetic.report(notes=("made in two calls",))
    write_report(tmp_path, first)
    again = synthetic.report(quality=(), seconds=3.0, phases={"load": 1.0}, sizes={"base": 1})
    carried = carry_over(tmp_path, again)
    assert (carried.quality, carried.seconds, carried.phases, carried.notes) == (
        first.quality,
        first.seconds,
        first.phases,
        first.notes,
    )
    assert carried.sizes == {"base": 1}


def test_another_result_inherits_nothing(tmp_path):
    other = synthetic.report(blocks=2, quality=())
    assert carry_over(tmp_path, other) == other
    write_report(tmp_path, synthetic.report(blocks=3))
    assert carry_over(tmp_path, other) == other
    (tmp_path / REPORT_FILE).write_text("{")
    assert carry_over(tmp_path, other) == other


@pytest.mark.parametrize(
    "content, said", [(None, "does not exist"), ("{", "is damaged"), ('{"layers": {}}', "is damaged"), ("[]", "is damaged")]
)
def test_refusals(tmp_path, content, said):
    if content is not None:
        (tmp_path / REPORT_FILE).write_text(content)
    with pytest.raises(RunError, match=said):
        read_report(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        write_report(tmp_path / "file" / "out", synthetic.report())


def test_weight_bytes_counts_the_shards(tmp_path):
    for number, size in enumerate((100, 23)):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes(size))
    (tmp_path / "config.json").write_bytes(bytes(1000))
    assert weight_bytes(tmp_path) == 123
