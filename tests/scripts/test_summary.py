"""What the quality benchmark's table says, from results that were made up: every number here can be computed by hand."""

from __future__ import annotations

import math

import pytest
from quality.cells import Cell, Start
from quality.methods import METHODS, are_rivals
from quality.summary import best_rates, caught, gap_closed, mean_curve, paired, perplexity, stderr, steps_until, summarize

STEPS = 10


def result(before: float, after: float, during: dict | None = None, tasks: dict | None = None) -> dict:
    """Validation losses are the test's plus 1."""
    found = {"before": {"valid": before + 1, "test": before}, "after": {"valid": after + 1, "test": after}}
    return found | {"during": during or {}, "losses": [0.0] * STEPS, "seconds": 20.0} | ({"tasks": tasks} if tasks else {})


def row_of(method: str, *results: dict, bits: int = 2):
    [row] = summarize({Cell(bits, method, 1e-3, seed): one for seed, one in enumerate(results)}, STEPS)
    return row


@pytest.mark.parametrize(
    ("curve", "target", "steps"),
    [
        ({0: 5.0, 4: 3.0, 10: 1.0}, 4.0, 2.0),
        ({0: 5.0, 4: 3.0, 10: 1.0}, 3.0, 4.0),
        ({0: 5.0, 4: 3.0, 10: 1.0}, 1.5, 8.5),
        ({0: 5.0, 4: 3.0, 10: 1.0}, 5.5, 0.0),  # ahead before the first step
        ({0: 5.0, 4: 3.0, 10: 1.0}, 0.9, None),
        ({0: 5.0, 4: 3.0, 10: 4.0}, 3.5, 3.0),  # the first time, though it does not stay there
        ({10: 1.0, 0: 5.0}, 3.0, 5.0),  # in any order
        ({0: 5.0, 10: math.nan}, 3.0, None),
        ({0: 5.0, 10: 1.0}, math.nan, None),
    ],
)
def test_steps_until_a_loss_is_reached(curve, target, steps):
    assert steps_until(curve, target) == steps


def test_the_best_rival_is_the_lowest_in_the_end_and_no_variant_of_one_s_own():
    rows = summarize(
        {
            Cell(2, "cloq", 1e-3, 0): result(4.0, 2.0),
            Cell(2, "cloq-balanced", 1e-3, 0): result(4.0, 1.0),
            Cell(16, "lora-16", 1e-3, 0): result(1.0, 0.5),
            Cell(2, "zero", 1e-3, 0): result(9.0, 5.0),
            Cell(2, "svd", 1e-3, 0): result(6.0, 3.0),
            Cell(4, "svd", 1e-3, 0): result(3.0, 1.5),
        },
        STEPS,
    )
    found = {(row.bits, row.method): row.caught for row in rows}
    assert found[2, "cloq"].rival == "svd" and found[2, "cloq"].target == 4.0
    assert found[2, "cloq"].steps == 5.0 and found[2, "cloq"].seconds == 10.0  # 4 → 2 in 10 steps of 2 s, 3 reached halfway
    assert found[2, "svd"].rival == "cloq-balanced" and found[2, "svd"].steps is None and found[2, "svd"].seconds is None
    assert found[16, "lora-16"] is None and found[4, "svd"] is None  # nobody else at their widths


def test_a_diverged_rival_is_nobody_s_measure():
    rows = [row_of("cloq", result(4.0, 2.0)), row_of("svd", result(6.0, math.nan)), row_of("zero", result(9.0, 3.0))]
    assert caught(rows[0], rows).rival == "zero"


def test_rivalry_is_mutual_but_for_the_16_bit_model():
    for one in METHODS:
        for other in METHODS:
            if "lora-16" not in (one, other):
                assert are_rivals(one, other) == are_rivals(other, one)
    assert not are_rivals("cloq", "cloq-run") and are_rivals("loftq", "peft-loftq") and not are_rivals("svd", "svd")


def test_the_rate_is_chosen_by_the_validation_text_and_the_row_is_of_that_rate():
    cells = {
        Cell(2, "cloq", lr, seed): result(4.0, after) for (lr, after) in ((1e-3, 2.0), (1e-4, 1.5), (1e-2, math.nan)) for seed in (0, 1)
    }
    [row] = summarize(cells, STEPS)
    assert row.lr == 1e-4 and row.after == {0: 1.5, 1: 1.5} and row.stderr == 0.0 and row.before == 4.0
    assert row.seconds_per_step == 2.0 and row.start == Start(2, "cloq")


def test_the_rate_is_chosen_on_the_seeds_that_all_rates_have_and_the_row_has_all_seeds_of_that_rate():
    """The other seed is hard for everybody: a mean over all that is there would choose the other rate."""
    ended = {(1e-3, 0): 2.0, (1e-4, 0): 1.5, (1e-4, 1): 9.0}
    cells = {Cell(2, "cloq", lr, seed): result(4.0, after) for (lr, seed), after in ended.items()}
    [row] = summarize(cells, STEPS)
    assert best_rates(cells) == {Start(2, "cloq"): 1e-4} and row.lr == 1e-4 and row.after == {0: 1.5, 1: 9.0}


def test_a_curve_is_the_mean_over_seeds_at_common_steps_wherever_they_come_from():
    """JSON makes text of the steps: results of one seed out of a file and of another just made are one curve."""
    curve = mean_curve([result(4.0, 2.0, {"5": 4.0, "7": 9.0}), result(6.0, 2.0, {5: 6.0})], STEPS)
    assert curve == {0: 6.0, 5: 5.0, 10: 3.0}


def test_accuracy_is_over_rows_of_the_mean_over_seeds():
    def tasks(before: list[float], after: list[float]) -> dict:
        about = {"metric": "acc", "chance": 0.25, "protocol": "cloq, 0-shot"}
        return {when: {"piqa": about | {"rows": rows}} for when, rows in (("before", before), ("after", after))}

    row = row_of(
        "cloq", result(4.0, 2.0, tasks=tasks([0, 0, 1, 0], [1, 0, 1, 0])), result(4.0, 2.0, tasks=tasks([0, 0, 1, 0], [1, 0, 1, 1]))
    )
    accuracy = row.tasks["piqa"]
    assert (accuracy.before, accuracy.after, accuracy.rows, accuracy.chance) == (0.25, 0.625, 4, 0.25)
    assert accuracy.stderr == pytest.approx(stderr([1.0, 0.0, 1.0, 0.5])) and row.loss == 2.0
    assert row_of("cloq", result(4.0, 2.0, tasks=tasks([0], [1])), result(4.0, 2.0)).tasks == {}  # one of the two was not asked


def test_the_gap_and_the_paired_difference():
    zero, cloq, ceiling = (
        row_of("zero", result(9.0, 5.0)),
        row_of("cloq", result(4.0, 2.0), result(4.0, 2.5)),
        row_of("lora-16", result(1.0, 1.0)),
    )
    assert gap_closed(zero, zero, ceiling) == 0.0 and gap_closed(ceiling, zero, ceiling) == 1.0
    assert gap_closed(row_of("svd", result(6.0, 2.0)), zero, ceiling) == 0.75
    assert gap_closed(cloq, None, ceiling) is None and gap_closed(cloq, zero, zero) is None
    svd = row_of("svd", result(6.0, 3.0), result(6.0, 3.7), result(6.0, 1.0))  # its third seed has no partner
    difference, error = paired(svd, cloq)
    assert difference == pytest.approx(1.1) and error == pytest.approx(0.1) and paired(cloq, cloq) is None and paired(svd, None) is None


def test_numbers_at_their_ends():
    assert math.isnan(stderr([1.0])) and perplexity(1e4) == math.inf and math.isnan(perplexity(math.nan)) and perplexity(0.0) == 1.0
