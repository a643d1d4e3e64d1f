"""Rows → scores with their uncertainty, and two models' rows → whether they differ.

Accuracies: Wilson's 95 % interval. Everything else: a bootstrap over rows (BCa). Two models on the same rows: McNemar's exact test where a
row is right or wrong, a paired t-test elsewhere. No p-value is corrected for the number of comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cloq.tasks.spec import RowResult

CONFIDENCE = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """value with its standard error and 95 % confidence interval, of so many rows."""

    value: float
    stderr: float
    low: float
    high: float
    rows: int


@dataclass(frozen=True)
class Difference:
    """Second model minus first on the rows that both answered. value: difference of the means; for a perplexity the quotient. low, high:
    95 % interval. p: of the null hypothesis that they are equally good. test: by which it was found."""

    value: float
    low: float
    high: float
    p: float
    rows: int
    test: str


def estimate(metric: str, values: Sequence[float], seed: int = 0) -> Estimate:
    """The score of a metric from its value on every row. A `perplexity`'s values are log-likelihoods. Raises `ValueError` without rows."""
    if not len(values):
        raise ValueError("no rows to estimate from")
    array = np.asarray(values, dtype=np.float64)
    spread = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan
    if right_or_wrong(metric, array):
        from scipy.stats import binomtest

        interval = binomtest(int(array.sum()), len(array)).proportion_ci(CONFIDENCE, "wilson")
        return Estimate(float(array.mean()), spread, float(interval.low), float(interval.high), len(array))
    transform = _perplexity if metric == "perplexity" else np.mean
    value = float(transform(array))
    low, high = _bootstrap(array, transform, seed)
    return Estimate(value, spread * value if metric == "perplexity" else spread, low, high, len(array))


def difference(metric: str, first: Sequence[float], second: Sequence[float], seed: int = 0) -> Difference:
    """Two models on the same rows in the same order. Raises `ValueError` if there are none, or not equally many."""
    if not len(first) or len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} rows cannot be paired")
    a, b = (np.asarray(values, dtype=np.float64) for values in (first, second))
    change = b - a
    if right_or_wrong(metric, a) and right_or_wrong(metric, b):
        from scipy.stats import binomtest

        worse, better = int((change < 0).sum()), int((change > 0).sum())
        p = float(binomtest(better, worse + better, 0.5).pvalue) if worse + better else 1.0
        return Difference(float(change.mean()), *_bootstrap(change, np.mean, seed), p, len(a), "McNemar, exact")
    from scipy.stats import ttest_1samp

    p = 1.0 if not change.any() else float(ttest_1samp(change, 0.0).pvalue) if len(change) > 1 else math.nan
    transform = _perplexity if metric == "perplexity" else np.mean
    return Difference(float(transform(change)), *_bootstrap(change, transform, seed), p, len(a), "paired t")


def right_or_wrong(metric: str, values: np.ndarray) -> bool:
    """Whether the score is a proportion of rows."""
    return metric != "perplexity" and bool(np.isin(values, (0.0, 1.0)).all())


def _perplexity(values, axis=-1):
    return np.exp(-np.mean(values, axis=axis))


def _bootstrap(values: np.ndarray, statistic, seed: int) -> tuple[float, float]:
    """The interval; the value itself where all rows are alike, nothing known where there is one row."""
    if len(values) < 2:
        return math.nan, math.nan
    if np.ptp(values) == 0:
        value = float(statistic(values))
        return value, value
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,), statistic, n_resamples=_RESAMPLES, batch=64, confidence_level=CONFIDENCE, method="BCa", rng=np.random.default_rng(seed),
        vectorized=True, axis=-1,
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def values_of(rows: Sequence[RowResult], task: str, metric: str) -> dict[tuple[int, str, str], float]:
    """A metric by row: (number, key of the content, protocol)."""
    return {(row.row, row.key, row.protocol): row.metrics[metric] for row in rows if row.task == task and metric in row.metrics}


def paired(
    first: Sequence[RowResult], second: Sequence[RowResult], task: str, metric: str, seed: int = 0
) -> Difference | None:  # fmt: skip
    """The difference on the rows that both have, `None` if they share none."""
    a, b = values_of(first, task, metric), values_of(second, task, metric)
    common = sorted(a.keys() & b.keys())
    return difference(metric, [a[key] for key in common], [b[key] for key in common], seed) if common else None
