"""Scores on tasks in a report: an exact round trip, a table for people, and reports of before."""

import math
from types import SimpleNamespace

from cloq.report import Report, add_tasks, read_report, score_lines, write_report
from cloq.report.page import page
from cloq.tasks.spec import TaskScore
from tests.report import synthetic

SCORES = (
    TaskScore("16-bit", "piqa", "acc", 0.625, 0.01, 0.6, 0.65, 200, 1838, "cloq, 0-shot", "float32", 0, 0.5),
    TaskScore("base", "piqa", "acc", 0.5, 0.01, 0.475, 0.525, 200, 1838, "cloq, 0-shot", "packed gptq 2-bit", 3, 0.5),
    TaskScore("base", "<b>", "mcc", 0.25, math.nan, math.nan, math.nan, 3, 3, "lm-eval, 0-shot", "packed gptq 2-bit"),
    TaskScore("base", "lambada_openai", "perplexity", 4321.0, 10.0, 4300.0, 4350.0, 5, 5, "cloq, 0-shot", "packed gptq 2-bit"),
)


def same(a: TaskScore, b: TaskScore) -> bool:
    return repr(a) == repr(b)  # NaN is not itself


def test_a_round_trip_keeps_every_number(tmp_path):
    write_report(tmp_path, synthetic.report())
    add_tasks(tmp_path, SCORES)
    assert all(map(same, read_report(tmp_path).tasks, SCORES)) and len(read_report(tmp_path).tasks) == 4
    add_tasks(tmp_path, SCORES[:1])
    assert sorted(map(repr, read_report(tmp_path).tasks)) == sorted(map(repr, SCORES))


def test_a_report_of_before_has_none():
    values = synthetic.report().to_dict()
    values.pop("tasks")
    assert Report.from_dict(values).tasks == ()


def test_the_table_says_rows_chance_interval_and_p():
    difference = SimpleNamespace(value=-0.125, low=-0.2, high=-0.05, p=0.0004, rows=200, test="McNemar, exact")
    lines = score_lines(SCORES, [SimpleNamespace(model="base", first="16-bit", task="piqa", metric="acc", difference=difference)])
    assert lines[0] == "cloq, 0-shot, with 95 % intervals"
    assert lines[2].split("  ")[1:2] == ["piqa"] and "200 of 1,838" in lines[2]
    assert "50.0" in lines[2] and "62.5 [60.0, 65.0]" in lines[2] and "50.0 [47.5, 52.5] p <0.001" in lines[2]
    assert "4,321 [4,300, 4,350]" in lines[3] and any("25.0" in line and "[" not in line for line in lines)
    assert lines[-1] == "piqa: 3 prompts longer than the context lost the beginning"


def test_the_page_shows_them_escaped():
    text = page(synthetic.report(tasks=SCORES))
    assert "<h2>Tasks</h2>" in text and "62.5 [60.0, 65.0]" in text and "&lt;b&gt;" in text and "<b>" not in text
    assert "<h2>Tasks</h2>" not in page(synthetic.report())
