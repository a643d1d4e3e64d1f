"""The tables of the quality benchmark."""

from __future__ import annotations

from quality.cells import Cell, Start
from quality.protocol import Protocol, Sweep
from quality.summary import summarize
from quality.tables import main_table, sweep_table

PROTOCOL = Protocol("models/m", "a.txt", "b.txt", "c.txt", steps=4, rank=8)
RANKS = Sweep.parse(["rank", "4", "8"])


def result(before: float, after: float, tasks: dict | None = None) -> dict:
    found = {when: {"valid": loss, "test": loss} for when, loss in (("before", before), ("after", after))}
    return found | {"during": {}, "losses": [0.0] * 4, "seconds": 4.0} | ({"tasks": tasks} if tasks else {})


def cells(table: str) -> list[dict[str, str]]:
    """The lines of a Markdown table by column."""
    head, _, *lines = (line.strip("|").split("|") for line in table.splitlines() if line.startswith("|"))
    assert all(len(line) == len(head) for line in lines)
    return [{name.strip(): value.strip() for name, value in zip(head, line, strict=True)} for line in lines]


def test_the_main_table_has_what_is_known_and_nothing_else():
    rows = summarize(
        {
            Cell(2, "cloq", 1e-3, 0): result(1.0, 0.0),
            Cell(2, "zero", 1e-3, 0): result(3.0, 2.0),
            Cell(16, "lora-16", 1e-3, 0): result(0.0, -2.0),
            Cell(2, "cloq", 1e-3, 0, (("rank", 4),)): result(1.0, 9.0),
        },
        PROTOCOL.steps,
    )
    table = main_table(PROTOCOL, rows, {Start(2, "gptqmodel-eora"): "not done within 3 minutes"})
    lora, cloq, zero = cells(table)
    assert (lora["bits"], lora["method"], lora["after"], lora["gap closed"]) == ("16", "lora-16", "0.14", "")
    assert (cloq["before"], cloq["after"], cloq["± %"], cloq["gap closed"]) == ("2.72", "1.00", "", "50%")
    assert (zero["loss − cloq's, paired"], cloq["loss − cloq's, paired"]) == ("+2.0000", "")
    assert cloq["as good as the best rival in the end"] == "zero: after 0.0 steps, 0 s"
    assert zero["as good as the best rival in the end"] == "cloq: not in 4 steps" and "Tasks" not in table
    assert "2-gptqmodel-eora has no row: not done within 3 minutes." in table and "nan" not in table


def test_tasks_have_a_column_each():
    about = {"metric": "acc", "chance": 0.5, "protocol": "cloq, 0-shot"}
    tasks = {"before": {"piqa": about | {"rows": [1.0, 0.0]}}, "after": {"piqa": about | {"rows": [1.0, 1.0]}}}
    rows = summarize({Cell(2, "cloq", 1e-3, 0): result(1.0, 0.0, tasks), Cell(2, "zero", 1e-3, 0): result(3.0, 2.0)}, PROTOCOL.steps)
    table = main_table(PROTOCOL, rows, {})
    assert [line["piqa acc"] for line in cells(table)] == ["50.0 → 100.0 ± 0.0", ""] and "Tasks: 200 rows of each" in table


def test_a_sweep_s_table_has_every_method_at_every_value():
    rows = summarize(
        {
            Cell(2, "cloq", 1e-3, 0): result(1.0, 0.0),
            Cell(4, "peft-loftq", 1e-3, 0): result(1.0, 0.0),
            Cell(2, "cloq", 1e-3, 0, (("rank", 4),)): result(2.0, 1.0),
            Cell(2, "cloq", 1e-3, 0, (("group_size", 32),)): result(0.0, 0.0),
        },
        PROTOCOL.steps,
    )
    table = sweep_table(PROTOCOL, RANKS, rows)
    assert [(line["rank"], line["method"], line["after"]) for line in cells(table)] == [
        ("4", "cloq", "2.72"), ("8", "cloq", "1.00"), ("8", "peft-loftq", "1.00"),
    ]  # fmt: skip
    groups = Sweep.parse(["group-size", "64", "32", "0"])  # nothing is there at the last; peft's base has blocks of its own
    assert [(line["group-size"], line["method"]) for line in cells(sweep_table(PROTOCOL, groups, rows))] == [
        ("64", "cloq"), ("64", "peft-loftq"), ("32", "cloq"), ("32", "peft-loftq"), ("channel", "peft-loftq"),
    ]  # fmt: skip
