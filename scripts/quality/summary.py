"""Cells → rows: all that the table and the figures say, from results alone. Losses are in nats per token; a perplexity is their exp."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from quality.cells import Cell, Start
from quality.methods import are_rivals


@dataclass(frozen=True)
class Accuracy:
    """On one task. before, after: mean over rows, of each row's mean over seeds. stderr: of `after`, over rows, which all models share;
    more seeds do not shrink it. chance: what guessing gives, where it is known."""

    metric: str
    before: float
    after: float
    stderr: float
    rows: int
    chance: float | None = None


@dataclass(frozen=True)
class Caught:
    """When a method is as good as its best rival is in the end.

    rival: of all rivals at its width (`methods.are_rivals`) the one with the lowest final validation loss, mean over seeds. target: that
    loss. steps: where the method's mean validation curve, linear in the loss between its points (before training, the evaluations during
    it, after it), first is at the target or below; `None` if it never is. seconds: these steps at the method's own seconds per step.
    """

    rival: str
    target: float
    steps: float | None
    seconds: float | None


@dataclass(frozen=True)
class Row:
    """A method at a width, at the learning rate that is best on the validation text.

    changes: to the protocol, at a point of a sweep. after: test loss by seed. before, loss: mean test loss before and after training.
    stderr: of `loss`, over seeds. curve: mean validation loss by step, from 0 to the last.
    """

    bits: float
    method: str
    changes: tuple[tuple[str, Any], ...]
    lr: float
    after: dict[int, float]
    before: float
    loss: float
    stderr: float
    seconds_per_step: float
    curve: dict[int, float]
    tasks: dict[str, Accuracy] = field(default_factory=dict)
    caught: Caught | None = None

    @property
    def start(self) -> Start:
        return Start(self.bits, self.method, self.changes)


def summarize(results: Mapping[Cell, Mapping[str, Any]], steps: int) -> list[Row]:
    """One row per start, in the order in which they came. Rivals are those at the same width and point of a sweep."""
    rates = best_rates(results)
    rows = [_row(start, rates[start], cells, steps) for start, cells in _by_start(results).items()]
    return [replace(row, caught=caught(row, [other for other in rows if other.changes == row.changes])) for row in rows]


def best_rates(results: Mapping[Cell, Mapping[str, Any]]) -> dict[Start, float]:
    """The learning rate of the lowest validation loss after training, mean over the seeds that all rates of a start have."""
    return {start: _best_rate(cells) for start, cells in _by_start(results).items()}


def _best_rate(cells: Mapping[Cell, Mapping[str, Any]]) -> float:
    seeds: dict[float, set[int]] = {}
    for cell in cells:
        seeds.setdefault(cell.lr, set()).add(cell.seed)
    common = set.intersection(*seeds.values())

    def final(lr: float) -> float:
        return mean([_finite(one["after"]["valid"]) for cell, one in cells.items() if cell.lr == lr and cell.seed in common])

    return min(seeds, key=final)


def _by_start(results: Mapping[Cell, Mapping[str, Any]]) -> dict[Start, dict[Cell, Mapping[str, Any]]]:
    found: dict[Start, dict[Cell, Mapping[str, Any]]] = {}
    for cell, result in results.items():
        found.setdefault(cell.start, {})[cell] = result
    return found


def _row(start: Start, best: float, cells: Mapping[Cell, Mapping[str, Any]], steps: int) -> Row:
    chosen = {cell.seed: result for cell, result in sorted(cells.items(), key=lambda item: item[0].seed) if cell.lr == best}
    found = list(chosen.values())
    after = {seed: result["after"]["test"] for seed, result in chosen.items()}
    return Row(
        start.bits, start.method, start.changes, best, after,
        before=mean([result["before"]["test"] for result in found]),
        loss=mean(list(after.values())),
        stderr=stderr(list(after.values())),
        seconds_per_step=mean([result["seconds"] / len(result["losses"]) for result in found]),
        curve=mean_curve(found, steps),
        tasks=accuracies(found),
    )  # fmt: skip


def mean_curve(results: Sequence[Mapping[str, Any]], steps: int) -> dict[int, float]:
    """Validation loss by step, at the steps that every result has. (Steps are text in results that come out of a file.)"""
    curves = []
    for result in results:
        during = {int(step): value for step, value in result["during"].items()}
        curves.append({0: result["before"]["valid"], **during, steps: result["after"]["valid"]})
    common = sorted(set.intersection(*map(set, curves)))
    return {step: mean([curve[step] for curve in curves]) for step in common}


def accuracies(results: Sequence[Mapping[str, Any]]) -> dict[str, Accuracy]:
    """Of every task that all results have, each asked on the same rows."""
    answered = [result.get("tasks", {"before": {}, "after": {}}) for result in results]
    found = {}
    for task in answered[0]["after"]:
        if all(task in one["after"] for one in answered):
            first = answered[0]["after"][task]
            before, after = (_row_means([one[when][task]["rows"] for one in answered]) for when in ("before", "after"))
            found[task] = Accuracy(first["metric"], mean(before), mean(after), stderr(after), len(after), first["chance"])
    return found


def _row_means(seeds: Sequence[Sequence[float]]) -> list[float]:
    return [mean(list(values)) for values in zip(*seeds, strict=True)]


# -- between rows ----------------------------------------------------------------------------------------------------------


def caught(row: Row, others: Iterable[Row]) -> Caught | None:
    """`None` without a rival. others: rows at the same point of a sweep, in which `row` itself may be."""
    rivals = [other for other in others if other.bits == row.bits and are_rivals(row.method, other.method)]
    finals = {other.method: other.curve[max(other.curve)] for other in rivals}
    rival = min(finals, key=lambda name: _finite(finals[name]), default=None)
    if rival is None:
        return None
    steps = steps_until(row.curve, finals[rival])
    return Caught(rival, finals[rival], steps, None if steps is None else steps * row.seconds_per_step)


def steps_until(curve: Mapping[int, float], target: float) -> float | None:
    """Where a curve of losses by step, linear between its points, first is at the target or below; `None` if nowhere."""
    points = sorted(curve.items())
    if points[0][1] <= target:
        return float(points[0][0])
    for (step, loss), (next_step, next_loss) in pairwise(points):
        if next_loss <= target:
            return step + (next_step - step) * (loss - target) / (loss - next_loss)
    return None


def gap_closed(row: Row, zero: Row | None, ceiling: Row | None) -> float | None:
    """Share of the way, in the loss, from zero factors to LoRA on the 16-bit model; `None` without the two, or where there is no way."""
    if zero is None or ceiling is None or zero.loss == ceiling.loss:
        return None
    return (zero.loss - row.loss) / (zero.loss - ceiling.loss)


def paired(row: Row, other: Row | None) -> tuple[float, float] | None:
    """Mean difference of the test losses and its standard error over the seeds that both have; `None` if there is nothing to compare."""
    common = sorted(set(row.after) & set(other.after)) if other is not None and other is not row else []
    differences = [row.after[seed] - other.after[seed] for seed in common]
    return (mean(differences), stderr(differences)) if differences else None


# -- numbers ---------------------------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def stderr(values: Sequence[float]) -> float:
    """Of the mean; not a number for fewer than two values."""
    if len(values) < 2:
        return math.nan
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


def perplexity(loss: float) -> float:
    return math.exp(loss) if not loss > 700 else math.inf


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
