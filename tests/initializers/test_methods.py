"""Each initializer against the equations of its paper, written out naively in float64."""

import pytest
import torch

from cloq import initializers
from cloq.algebra import lowrank
from cloq.initializers import SPLITS, Cloq, Eora, Loftq, Pissa, Qera, Svd, Zero, closed_form
from cloq.initializers.cloq import EVEN, KEPT, SHRINKAGE, size_left
from cloq.quantizers import Gptq, Nf4, Rtn
from cloq.types import LoraFactors
from tests.problems import KINDS, LARGE_SHAPES, SHAPES, optimum, output_error, problem, root

QUANTIZER = Rtn(2, 32)
SHAPE = SHAPES["tall"]
RANK = 7


def fit(initializer, p, quantizer=QUANTIZER, rank=RANK):
    quantized, factors = initializer.initialize(p.weight, p.stats, quantizer.quantize, rank)
    return quantized, factors, p.weight - quantized.dequantize()


def first_factors(p, rank):
    """Those of rounds, before any codes and without a shift."""
    return closed_form(p.weight, p.gram + SHRINKAGE * p.gram.diagonal().mean() * torch.eye(len(p.gram)), rank).factors


def truncated(matrix, rank=RANK):
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def balanced(factors) -> bool:
    return torch.allclose(factors.B.T @ factors.B, factors.A @ factors.A.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", ("paper", "balanced"))
def test_cloq_is_the_closed_form_of_the_error(split):
    p = problem("power law", SHAPE)
    _, factors, error = fit(Cloq(split), p)
    expected = closed_form(error, p.gram, RANK, split).factors
    assert torch.equal(factors.A, expected.A) and torch.equal(factors.B, expected.B)


def test_zero_starts_at_nothing_and_by_its_seed():
    p = problem("power law", SHAPE)
    _, factors, _ = fit(Zero(), p)
    assert not factors.B.any() and bool(factors.A.any())
    bound = SHAPE[1] ** -0.5
    assert float(factors.A.abs().max()) <= bound and float(factors.A.abs().max()) > 0.9 * bound
    assert float(factors.A.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not torch.equal(factors.A, fit(Zero(seed=1), p)[1].A)


@pytest.mark.parametrize("kind", KINDS)
def test_svd_truncates_the_error_whatever_the_data(kind):
    p = problem(kind, SHAPE)
    _, factors, error = fit(Svd(), p)
    torch.testing.assert_close(factors.delta(), truncated(error).float(), rtol=0, atol=1e-5)
    assert balanced(factors)


def test_one_round_of_loftq_is_the_svd():
    p = problem("power law", SHAPE)
    once, factors, _ = fit(Loftq(1), p)
    plain, expected, _ = fit(Svd(), p)
    assert torch.equal(once.codes, plain.codes) and torch.equal(factors.delta(), expected.delta())


@pytest.mark.parametrize("quantizer", (Rtn(2, 32), Rtn(3, None, symmetric=True), Nf4()), ids=str)
@pytest.mark.parametrize("rounds", (2, 5))
def test_loftq_alternates_as_its_algorithm_says(quantizer, rounds):
    p = problem("well conditioned", SHAPE)
    quantized, factors, error = fit(Loftq(rounds), p, quantizer)
    product = torch.zeros(SHAPE, dtype=torch.float64)
    for _ in range(rounds):
        expected = quantizer.quantize((p.weight - product).float())
        product = truncated(p.weight - expected.dequantize())
    # a code on the edge may fall to either side, and the rounds carry it on: the errors agree, nearly all codes do
    assert float((quantized.codes != expected.codes).float().mean()) < 0.01
    naive = float((p.weight - expected.dequantize() - product).norm())
    assert float((error - factors.delta()).norm()) == pytest.approx(naive, rel=1e-2)
    assert balanced(factors)


def test_loftq_lowers_the_weight_error():
    p = problem("well conditioned", SHAPE)
    _, plain, error = fit(Svd(), p)
    _, factors, remaining = fit(Loftq(5), p)
    assert float((remaining - factors.delta()).norm()) < float((error - plain.delta()).norm())


def test_loftq_needs_a_round():
    with pytest.raises(ValueError, match="at least one round, got iterations=0"):
        Loftq(0)


@pytest.mark.parametrize("kind", ["well conditioned", "power law", "rank deficient", "outlier channel", "collinear", "tiny"])
def test_qera_is_the_scaled_svd_of_its_paper(kind):
    p = problem(kind, SHAPE)
    _, factors, error = fit(Qera(), p)
    s = p.inputs.double().square().mean(0).sqrt()
    torch.testing.assert_close(factors.delta(), (truncated(error * s) / s).float(), rtol=1e-3, atol=1e-4)
    assert balanced(factors)


@pytest.mark.parametrize("kind", ["dead channels", "outlier and dead"])
def test_qera_with_dead_inputs_is_the_limit_of_small_ones(kind):
    p = problem(kind, SHAPE)
    _, factors, error = fit(Qera(), p)
    energy = p.gram.diagonal().double()
    s = torch.where(energy > 0, energy, 1e-9).sqrt()
    torch.testing.assert_close(factors.delta(), (truncated(error * s) / s).float(), rtol=1e-3, atol=1e-5)
    best = optimum(error, torch.diag(energy), RANK)
    left = error.double() - factors.delta().double()
    assert output_error(left, torch.diag(energy)) <= 1.001 * best + 1e-12 * float(energy.sum())


def test_qera_is_cloq_where_the_inputs_are_uncorrelated():
    p = problem("well conditioned", SHAPE)
    x = torch.linalg.qr(p.inputs).Q * torch.linspace(1, 9, SHAPE[1])
    p = p._replace(inputs=x)
    delta, expected = fit(Qera(), p)[1].delta(), fit(Cloq(), p)[1].delta()
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_eora_is_the_paper_form_of_cloqs_optimum(kind):
    p = problem(kind, SHAPE)
    _, factors, error = fit(Eora(), p)
    total = output_error(error, p.gram)
    direct = output_error(error.double() - factors.delta().double(), p.gram)
    assert direct == pytest.approx(optimum(error, p.gram, RANK), rel=1e-3, abs=1e-6 * total)


@pytest.mark.parametrize("kind", ["well conditioned", "power law", "mostly constant"])
def test_eora_shares_the_singular_values_in_the_eigenspace(kind):
    """`B = P σ^{1/2}` and `A S = σ^{1/2} Rᵀ`, with the twin's own root and its plain inverse."""
    p = problem(kind, SHAPE)
    _, factors, error = fit(Eora(), p)
    S = root(p.gram)
    sigma = torch.linalg.svdvals(error.double() @ S)[:RANK]
    B, A = factors.B.double(), factors.A.double()
    torch.testing.assert_close(B.T @ B, torch.diag(sigma), rtol=1e-3, atol=1e-4 * float(sigma[0]))
    torch.testing.assert_close(A @ S @ S.T @ A.T, torch.diag(sigma), rtol=1e-3, atol=1e-4 * float(sigma[0]))
    expected = truncated(error.double() @ S) @ torch.linalg.inv(S)
    torch.testing.assert_close(B @ A, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_pissa_quantizes_what_the_principal_part_leaves():
    p = problem("power law", SHAPE)
    quantized, factors, _ = fit(Pissa(), p)
    principal = truncated(p.weight)
    torch.testing.assert_close(factors.delta(), principal.float(), rtol=0, atol=1e-5)
    assert balanced(factors)
    expected = QUANTIZER.quantize(p.weight - factors.delta())
    assert torch.equal(quantized.codes, expected.codes) and torch.equal(quantized.scale, expected.scale)


def test_pissa_gains_where_the_weight_has_a_strong_principal_part():
    p = problem("power law", SHAPE)
    p = p._replace(weight=p.weight + torch.linspace(-1, 1, SHAPE[0])[:, None] @ torch.linspace(1, 2, SHAPE[1])[None])
    _, factors, left = fit(Pissa(), p)
    assert float((left - factors.delta()).norm()) < 0.1 * float(fit(Zero(), p)[2].norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantizer", (Gptq(2, 32), Gptq(3, 32, act_order=True), Nf4()), ids=str)
def test_rounds_never_cost_and_mostly_gain(kind, quantizer):
    """On the calibration data, over the shapes; the base is another one, made for its factors."""
    errors = {}
    for rounds in (0, 1, 3):
        errors[rounds] = []
        for shape in SHAPES.values():
            p = problem(kind, shape)
            quantized, factors = Cloq(rounds=rounds).initialize(p.weight, p.stats, quantizer.quantize, 8)
            errors[rounds].append(output_error(p.weight - quantized.dequantize() - factors.delta(), p.gram))
    slack = 1e-6 * sum(output_error(problem(kind, shape).weight, problem(kind, shape).gram) for shape in SHAPES.values())
    for earlier, later in ((0, 1), (0, 3)):
        assert all(b <= a * 1.001 + slack for a, b in zip(errors[earlier], errors[later], strict=True))
    if kind in ("well conditioned", "power law") and quantizer == Gptq(2, 32):
        assert sum(errors[3]) < 0.9 * sum(errors[0])


@pytest.mark.parametrize("outputs", (False, True))
def test_the_split_has_no_part_in_the_codes(outputs):
    """Nor in the product: only in how it is shared."""
    p = problem("power law", SHAPES["tall"])
    stats = p.stats.for_outputs(0.1 + torch.rand(len(p.weight), generator=torch.Generator().manual_seed(1))) if outputs else p.stats
    (paper, one), (balanced, other) = (
        Cloq(split, 3).initialize(p.weight, stats, Gptq(2, 32).quantize, 8) for split in ("paper", "balanced")
    )
    assert torch.equal(paper.codes, balanced.codes) and torch.equal(paper.scale, balanced.scale)
    torch.testing.assert_close(one.delta(), other.delta(), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(one.A, other.A, rtol=0.1)


def test_rounds_at_full_rank_stop_where_no_error_is_left():
    p = problem("power law", SHAPES["wide"])
    calls = []

    def quantize(weight, stats):
        calls.append(stats)
        return Gptq(2, 32).quantize(weight, stats)

    Cloq(rounds=5).initialize(p.weight, p.stats, quantize, min(p.weight.shape))
    assert len(calls) == 1


def test_a_round_quantizes_for_what_the_factors_will_undo():
    """The quantizer is asked for the weight without the factors, first to the nearest and at last in the norm without their directions; the
    first factors are made of the weight, and those of a round of what its codes leave."""
    p = problem("power law", SHAPES["tall"])
    asked = []

    def quantize(weight, stats):
        asked.append((weight, stats))
        return Rtn(2, 32).quantize(weight, stats)

    Cloq(rounds=2).initialize(p.weight, p.stats, quantize, 8)
    factors = first_factors(p, 8)
    left = p.weight - Rtn(2, 32).quantize(p.weight - factors.delta()).dequantize()
    following = LoraFactors(*reversed(lowrank.follow(left, p.gram, factors.B)[:2]))
    (first, to_the_nearest), (last, stats) = asked
    assert to_the_nearest is None
    torch.testing.assert_close(first, p.weight - factors.delta())
    torch.testing.assert_close(last, p.weight - following.delta())
    torch.testing.assert_close(stats.gram, lowrank.deflate(p.gram, following.A, KEPT))
    assert stats.n_tokens == p.stats.n_tokens


@pytest.mark.parametrize(("rounds", "last"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (16, 4)])
def test_the_last_quarter_of_the_rounds_makes_up_for_its_errors(rounds, last):
    p = problem("power law", SHAPES["tall"])
    rounded = []
    Cloq(rounds=rounds).initialize(p.weight, p.stats, lambda w, stats: rounded.append(stats is None) or Rtn(2, 32).quantize(w), 8)
    assert rounded == [True] * (rounds - last) + [False] * last


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("outputs", (False, True))
def test_factors_that_follow_are_the_closed_forms(kind, split, outputs):
    """Product, error and split, whether the last step shows that they have arrived or the closed form is asked after all."""
    for shape in SHAPES.values():
        p = problem(kind, shape)
        stats = p.stats.for_outputs(0.1 + torch.rand(shape[0], generator=torch.Generator().manual_seed(1))) if outputs else p.stats
        roots = stats.outputs.sqrt()[:, None] if outputs else 1.0
        quantized, found = Cloq(split, 3).initialize(p.weight, stats, Gptq(3, 32).quantize, 6)
        error = p.weight - quantized.dequantize()
        best = closed_form(error, p.gram, 6, split, stats.outputs)
        total = output_error(roots * p.weight, p.gram)
        assert output_error(roots * (error - found.delta()), p.gram) <= best.error * 1.001 + 1e-6 * total
        held = best.spectrum > 1e-6 * best.spectrum[0]  # terms that the inputs do not reach are any
        for own, expected in ((found.A.norm(dim=1), best.factors.A.norm(dim=1)), (found.B.norm(dim=0), best.factors.B.norm(dim=0))):
            torch.testing.assert_close(own[held], expected[held], rtol=0.05, atol=0.05 * float(expected.max()))


def test_mostly_the_closed_form_is_not_asked_again(monkeypatch):
    calls = []
    whole = initializers.cloq.closed_form
    monkeypatch.setattr(initializers.cloq, "closed_form", lambda *args, **kwargs: calls.append(1) or whole(*args, **kwargs))
    p = problem("power law", SHAPES["tall"])
    Cloq(rounds=3).initialize(p.weight, p.stats, Gptq(2, 32).quantize, 8)
    assert len(calls) == 1, "of the first factors"


def test_codes_of_the_best_round_are_kept():
    """Here a quantizer that gets worse from round to round."""
    p = problem("power law", SHAPES["tall"])
    made = []

    def quantize(weight, stats):
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(made)))
        made.append(Rtn(2, 32).quantize(weight + len(made) * weight.std() * noise))
        return made[-1]

    codes, _ = Cloq(rounds=3).initialize(p.weight, p.stats, quantize, 8)
    assert len(made) == 3 and codes is made[0]


def first_target(p, rank, bits):
    """What the quantizer is asked for first."""
    asked = []
    Cloq(rounds=2, bits=bits).initialize(p.weight, p.stats, lambda w, stats: asked.append(w) or Rtn(2, 32).quantize(w), rank)
    return asked[0]


def size(matrix) -> float:
    return float(matrix.square().sum())


@pytest.mark.parametrize("kind", ["well conditioned", "power law", "outlier channel"])
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES)
def test_at_two_bits_the_first_codes_are_of_a_weight_moved_by_half_a_step(kind, shape):
    """By row, whose step is about its root mean square, and by input; in the place of the last of the terms that are made otherwise."""
    p = problem(kind, shape)
    first = first_factors(p, 3)
    left = p.weight - first.B[:, :2] @ first.A[:2]
    assert size(p.weight - first.delta()) > EVEN * size(left)
    rows, columns = left.square().mean(1).sqrt(), left.square().mean(0).sqrt()
    expected = left + 0.5 * torch.outer(rows, columns / columns.mean())
    torch.testing.assert_close(first_target(p, 3, 2), expected, rtol=1e-3, atol=1e-3 * float(left.std()))
    for bits in (None, 3, 4):
        torch.testing.assert_close(first_target(p, 3, bits), p.weight - first.delta())


def test_a_term_that_holds_more_than_an_even_grid_is_worth_stays():
    p = problem("power law", SHAPE)
    assert size(p.weight - first_factors(p, RANK).delta()) < EVEN * size(p.weight - first_factors(p, RANK - 1).delta())
    torch.testing.assert_close(first_target(p, RANK, 2), first_target(p, RANK, None))


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(("group_size", "at_most"), [(64, 0.94), (None, 0.87)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_an_even_grid_is_worth_more_than_a_term(rounds, group_size, at_most, symmetric):
    """Of normal weights, of which every term holds as little; and nearly all groups come to have their four points alike."""
    p = problem("well conditioned", (256, 320))
    p = p._replace(weight=torch.randn(p.weight.shape, generator=torch.Generator().manual_seed(0)))
    quantizer = Gptq(2, group_size, symmetric=symmetric, search=True)
    (_, before, lopsided), (quantized, now, even) = (fit(Cloq(rounds=rounds, bits=bits), p, quantizer, 4) for bits in (None, 2))
    assert output_error(even - now.delta(), p.gram) < at_most * output_error(lopsided - before.delta(), p.gram)
    above = quantized.zero.float() * quantized.scale.sign()
    assert float((above == above.median()).float().mean()) > 0.95


def test_inputs_that_the_factors_hold_stay_on_the_grids_zero():
    """A shift that is the same for all inputs would put those of a massive activation between two points."""
    p = problem("outlier channel", LARGE_SHAPES["wide"])
    (_, before, lopsided), (_, now, even) = (fit(Cloq(rounds=1, bits=bits), p, Gptq(2, 64, search=True), 8) for bits in (None, 2))
    assert output_error(even - now.delta(), p.gram) < 1.1 * output_error(lopsided - before.delta(), p.gram)


@pytest.mark.parametrize("rank", [1, 4])
def test_at_two_bits_a_weight_of_zeros_has_no_step(rank):
    p = problem("power law", SHAPES["tall"])
    p = p._replace(weight=torch.zeros_like(p.weight))
    quantized, factors = Cloq(rounds=2, bits=2).initialize(p.weight, p.stats, Gptq(2, 32).quantize, rank)
    assert not (quantized.dequantize() + factors.delta()).any()


def test_what_the_first_factors_leave_is_known_for_all_ranks_at_once():
    p = problem("power law", SHAPES["tall"])
    ranks = (1, 5, 16)
    factors = [first_factors(p, rank) for rank in ranks]
    expected = torch.tensor([float((p.weight - found.delta()).norm() / p.weight.norm()) ** 2 for found in factors], dtype=torch.float64)
    torch.testing.assert_close(size_left(p.weight, p.gram, ranks), expected, rtol=1e-4, atol=1e-6)
    assert size_left(p.weight, p.gram, [min(p.weight.shape)]) == pytest.approx(0, abs=1e-6)
