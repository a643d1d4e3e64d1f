"""Scores on tasks as lines of a table: models side by side, with intervals, and whether they differ from the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from cloq.report import wording
from cloq.tasks.spec import TaskScore


class Compared(Protocol):
    """What a comparison says, however it was found. difference: with `value`, `low`, `high`, `p`, `rows`, `test`."""

    model: str
    first: str
    task: str
    metric: str
    difference: Any


def score_lines(scores: Sequence[TaskScore], comparisons: Sequence[Compared] = ()) -> list[str]:
    """One table per protocol, accuracies in per cent; then how each model computed, and what else a reader has to know."""
    lines: list[str] = []
    for protocol, rows in score_tables(scores, comparisons).items():
        lines += [f"{protocol}, with 95 % intervals", *_aligned(rows)]
    weights = {score.model: score.weights for score in scores}
    lines.append("computed as: " + "; ".join(f"{model}: {how}" for model, how in weights.items()))
    if comparisons:
        tests = ", ".join(dict.fromkeys(one.difference.test for one in comparisons))
        lines.append(f"p: against {comparisons[0].first} on the same rows ({tests}), not corrected for the number of comparisons")
    cut = {score.task: score.truncated for score in scores if score.truncated}
    lines += [f"{task}: {wording.plural(rows, 'prompt')} longer than the context lost the beginning" for task, rows in cut.items()]
    return lines


def score_tables(scores: Sequence[TaskScore], comparisons: Sequence[Compared] = ()) -> dict[str, list[list[str]]]:
    """By protocol: a header, and a row of cells for every task and metric."""
    protocols = dict.fromkeys(score.protocol for score in scores)
    return {one: _cells([score for score in scores if score.protocol == one], comparisons) for one in protocols}


def _cells(scores: Sequence[TaskScore], comparisons: Sequence[Compared]) -> list[list[str]]:
    models = list(dict.fromkeys(score.model for score in scores))
    found = {(score.task, score.metric, score.model): score for score in scores}
    tests = {(one.task, one.metric, one.model): one for one in comparisons}
    rows = [["task", "metric", "rows", "chance", *models]]
    for task, metric in dict.fromkeys((score.task, score.metric) for score in scores):
        any_score = next(found[task, metric, model] for model in models if (task, metric, model) in found)
        chance = _number(any_score.chance, metric) if any_score.chance is not None and metric != "perplexity" else wording.UNKNOWN
        cells = [_cell(found.get((task, metric, model)), tests.get((task, metric, model))) for model in models]
        rows.append([task, metric, _rows(any_score), chance, *cells])
    return rows


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _rows(score: TaskScore) -> str:
    return f"{score.rows:,}" if score.rows == score.total else f"{score.rows:,} of {score.total:,}"


def _cell(score: TaskScore | None, test: Compared | None) -> str:
    if score is None:
        return wording.UNKNOWN
    text = _number(score.value, score.metric)
    if not math.isnan(score.low):
        text += f" [{_number(score.low, score.metric)}, {_number(score.high, score.metric)}]"
    return text + (f" {p_value(test.difference.p)}" if test is not None else "")


def _number(value: float, metric: str) -> str:
    return wording.perplexity(value) if metric == "perplexity" else f"{100 * value:.1f}"


def p_value(p: float) -> str:
    """`p 0.03`, `p <0.001`."""
    return f"p {wording.UNKNOWN}" if math.isnan(p) else "p <0.001" if p < 1e-3 else f"p {p:.2g}"


def comparison_dict(one: Compared) -> dict[str, Any]:
    """JSON values."""
    names = ("value", "low", "high", "p", "rows", "test")
    return {key: getattr(one, key) for key in ("model", "first", "task", "metric")} | {key: getattr(one.difference, key) for key in names}
