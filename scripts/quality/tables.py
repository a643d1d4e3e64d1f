"""Rows → Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from quality.cells import Start, applied
from quality.protocol import Protocol, Sweep
from quality.summary import Row, gap_closed, paired, perplexity

_WORDS = ("method",)
"""Columns that are not numbers."""


def main_table(protocol: Protocol, rows: Sequence[Row], refused: Mapping[Start, str]) -> str:
    """Of the rows that no sweep changed, width after width. `summary` says how the columns are computed. refused: why a row is missing."""
    plain = sorted((row for row in rows if not row.changes), key=lambda row: -row.bits)
    ceiling = next((row for row in plain if row.method == "lora-16"), None)
    lines = []
    for row in plain:
        zero, cloq = (next((r for r in plain if r.bits == row.bits and r.method == name), None) for name in ("zero", "cloq"))
        closed, difference = gap_closed(row, zero, ceiling), paired(row, cloq)
        lines.append(
            _common(row)
            | {
                "gap closed": "" if closed is None else f"{closed:.0%}",
                "loss − cloq's, paired": "" if difference is None else _with_error(f"{difference[0]:+.4f}", difference[1], 4),
                "as good as the best rival in the end": _caught(row, protocol),
            }
            | _tasks(row)
        )
    notes = [f"{start.name} has no row: {reason}." for start, reason in refused.items()]
    return "\n".join([_head(protocol, any(row.tasks for row in plain)), "", _markdown(lines), "", *notes]).rstrip() + "\n"


def sweep_table(protocol: Protocol, sweep: Sweep, rows: Sequence[Row]) -> str:
    """Every method at every value of the setting; methods that it means nothing to stand at each with the same numbers."""
    lines = []
    for value, row in sweep_rows(protocol, sweep, rows):
        lines.append({sweep.name: sweep.shown(value)} | _common(row) | _tasks(row))
    head = f"{sweep.name} as in the first column, everything else: {_head(protocol, any(row.tasks for row in rows))}"
    return f"{head}\n\n{_markdown(lines)}\n"


def sweep_rows(protocol: Protocol, sweep: Sweep, rows: Sequence[Row]) -> list[tuple[object, Row]]:
    """(value, row), value after value."""
    by_start = {row.start: row for row in rows}
    asked = dict.fromkeys((row.bits, row.method) for row in rows)
    found = []
    for value in sweep.values:
        for bits, method in asked:
            start = Start(bits, method, applied(method, sweep.changes(protocol, value)))
            if start in by_start:
                found.append((value, by_start[start]))
    return found


def _head(protocol: Protocol, tasks: bool) -> str:
    words = (
        f"`{Path(protocol.model).name}`, group {protocol.group_size or 'channel'}, rank {protocol.rank}; {protocol.steps} steps of "
        f"{protocol.batch} x {protocol.seq_len} tokens in {protocol.precision}, dropout {protocol.dropout:g}, "
        f"weight decay {protocol.weight_decay:g}; test perplexity chunks-{protocol.eval_len} on "
        f"{protocol.test_samples} sequences; ± is the standard error over seeds, in per cent of the perplexity."
    )
    more = (
        f" Tasks: {protocol.task_rows} rows of each (all, where there are fewer), in per cent before → after; ± is the standard error over "
        "rows."
    )
    return words + (more if tasks else "")


def _common(row: Row) -> dict[str, str]:
    return {
        "bits": str(row.bits),
        "method": row.method,
        "lr": f"{row.lr:g}",
        "seeds": str(len(row.after)),
        "before": f"{perplexity(row.before):,.2f}",
        "after": f"{perplexity(row.loss):,.2f}",
        "± %": "" if math.isnan(row.stderr) else f"{100 * row.stderr:.2f}",
    }


def _with_error(value: str, error: float, digits: int) -> str:
    """An error that one seed, or one row, cannot give is left out."""
    return value if math.isnan(error) else f"{value} ± {error:.{digits}f}"


def _tasks(row: Row) -> dict[str, str]:
    return {
        f"{task} {one.metric}": _with_error(f"{100 * one.before:.1f} → {100 * one.after:.1f}", 100 * one.stderr, 1)
        for task, one in row.tasks.items()
    }


def _caught(row: Row, protocol: Protocol) -> str:
    if row.caught is None:
        return ""
    if row.caught.steps is None:
        return f"{row.caught.rival}: not in {protocol.steps} steps"
    return f"{row.caught.rival}: after {row.caught.steps:.1f} steps, {row.caught.seconds:.0f} s"


def _markdown(lines: Sequence[Mapping[str, str]]) -> str:
    """Columns in the order in which they first appear; a line that has none of a column leaves it empty."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    rule = "|".join("---" if name in _WORDS else "---:" for name in columns)
    body = ["| " + " | ".join(line.get(name, "") for name in columns) + " |" for line in lines]
    return "\n".join([f"| {' | '.join(columns)} |", f"|{rule}|", *body])
