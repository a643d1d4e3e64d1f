"""Intervals and tests: closed forms, coverage on data whose truth is known, and the harness's own standard errors."""

import math

import numpy as np
import pytest

from cloq.tasks.score import difference, estimate, paired
from cloq.tasks.spec import RowResult


def test_an_accuracy_has_wilsons_interval():
    one = estimate("acc", [1.0] * 30 + [0.0] * 70)
    z, p, n = 1.959963984540054, 0.3, 100
    centre, half = (p + z**2 / (2 * n)) / (1 + z**2 / n), z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (one.value, one.rows) == (0.3, 100)
    assert one.low == pytest.approx(centre - half) and one.high == pytest.approx(centre + half)
    assert one.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_interval_at_the_end_of_the_scale_is_not_a_point(value):
    one = estimate("acc", [value] * 20)
    assert one.value == value and 0 <= one.low < one.high <= 1 and one.high - one.low > 0.1


def test_a_perplexity_is_of_the_mean_and_its_bootstrap_agrees_with_the_normal_one():
    logs = np.random.default_rng(0).normal(-2.0, 0.5, 400)
    one = estimate("perplexity", logs)
    assert one.value == pytest.approx(math.exp(-logs.mean()))
    assert one.stderr == pytest.approx(one.value * logs.std(ddof=1) / 20)
    assert one.low == pytest.approx(one.value - 1.96 * one.stderr, rel=0.02) and one.high == pytest.approx(
        one.value + 1.96 * one.stderr, rel=0.02
    )
    assert estimate("perplexity", logs) == one and estimate("perplexity", logs, seed=1) != one


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    draw = np.random.default_rng(0)
    covered = [(e := estimate("acc", (draw.random(80) < 0.35).astype(float))).low <= 0.35 <= e.high for _ in range(400)]
    assert 0.92 <= np.mean(covered) <= 0.98


def test_few_rows_say_that_nothing_is_known():
    assert math.isnan(estimate("perplexity", [-1.0]).low) and estimate("perplexity", [-1.0, -1.0]).low == pytest.approx(math.e)
    with pytest.raises(ValueError, match="no rows"):
        estimate("acc", [])


def test_mcnemar_counts_the_rows_that_changed():
    first = [1.0] * 5 + [0.0] * 12 + [1.0] * 40
    second = [0.0] * 5 + [1.0] * 12 + [1.0] * 40
    one = difference("acc", first, second)
    exact = 2 * sum(math.comb(17, k) for k in range(6)) / 2**17
    assert one.p == pytest.approx(exact) and one.value == pytest.approx(7 / 57) and one.test == "McNemar, exact"
    assert one.low < 7 / 57 < one.high
    assert difference("acc", first, first).p == 1.0


def test_equal_accuracies_can_differ_in_nothing_and_p_is_honest():
    """Under the null hypothesis the share of p below 0.05 is at most 0.05."""
    draw = np.random.default_rng(0)
    small = 0
    for _ in range(200):
        a, b = ((draw.random(60) < 0.5).astype(float) for _ in range(2))
        small += difference("acc", a, b).p < 0.05
    assert small / 200 <= 0.08


def test_sequence_losses_are_paired():
    draw = np.random.default_rng(0)
    base = draw.normal(-3, 1, 60)
    one = difference("perplexity", base, base + 0.02 + draw.normal(0, 0.01, 60))
    assert one.p < 1e-6 and one.value == pytest.approx(math.exp(-0.02), rel=0.01) and one.low < one.value < one.high < 1
    assert one.test == "paired t"
    with pytest.raises(ValueError, match="cannot be paired"):
        difference("perplexity", base, base[1:])


def row(number: int, value: float, protocol: str = "cloq, 0-shot", key: str = "k") -> RowResult:
    return RowResult("piqa", number, f"{key}{number}", protocol, {"acc": value})


def test_only_the_same_rows_under_the_same_protocol_are_compared():
    first = [row(n, 1.0) for n in range(6)]
    second = [row(n, 0.0) for n in range(3, 9)]
    assert paired(first, second, "piqa", "acc").rows == 3
    assert paired(first, [row(n, 0.0, "lm-eval, 0-shot") for n in range(6)], "piqa", "acc") is None
    assert paired(first, [row(n, 0.0, key="other") for n in range(6)], "piqa", "acc") is None
