"""CLoQ's closed form against brute force: the optimum, on any input, whatever the route, the split and the scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloq import closed_form
from cloq.algebra import lowrank
from cloq.initializers import SPLITS, Cloq
from cloq.quantizers import Gptq, Rtn
from tests.problems import KINDS, LARGE_SHAPES, SHAPES, optimum, output_error, problem, rounding

CASES = [(s, r) for s in SHAPES.values() for r in (1, 7, 39, 40, 48, 100)]
CASES += [(s, r) for s in LARGE_SHAPES.values() for r in (3, 12, 30)]


def quantization_error(p):
    return p.weight - Rtn(2, 32).quantize(p.weight).dequantize()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape, rank", CASES, ids=lambda v: str(v).replace(" ", ""))
@pytest.mark.parametrize("kind", KINDS)
def test_within_a_thousandth_of_brute_force(kind, shape, rank, split):
    p = problem(kind, shape)
    error = quantization_error(p)
    result = closed_form(error, p.gram, rank, split)
    A, B = result.factors.A, result.factors.B
    most = min(rank, *shape)
    assert A.shape == (most, shape[1]) and B.shape == (shape[0], most)
    assert A.dtype == B.dtype == torch.float32 and bool(A.isfinite().all() and B.isfinite().all())

    best, slack = optimum(error, p.gram, rank), rounding(error, p.gram)
    direct = output_error(error.double() - B.double() @ A.double(), p.gram)
    assert direct <= 1.001 * best + slack
    assert result.error == pytest.approx(direct, rel=1e-3, abs=slack)
    digits = 1e-9 if min(shape) <= lowrank.EXACT_BELOW else 1e-5  # large layers are solved in float32 where that is enough
    assert result.total == pytest.approx(output_error(error, p.gram), rel=digits, abs=slack)
    assert result.error == 0 if most == min(shape) else result.error >= 0


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGE_SHAPES.values()])
@pytest.mark.parametrize("kind", KINDS)
def test_weighted_outputs_are_the_same_problem_in_other_units(kind, shape, split):
    p = problem(kind, shape)
    outputs = 0.05 + torch.rand(shape[0], generator=torch.Generator().manual_seed(1)) ** 4
    roots = outputs.sqrt()[:, None]
    error = quantization_error(p)
    result = closed_form(error, p.gram, 10, split, outputs)
    A, B = result.factors.A, result.factors.B
    best, slack = optimum(roots * error, p.gram, 10), rounding(roots * error, p.gram)
    direct = output_error(roots.double() * (error.double() - B.double() @ A.double()), p.gram)
    assert direct <= 1.001 * best + slack and result.error == pytest.approx(direct, rel=1e-3, abs=slack)
    if split == "paper":
        torch.testing.assert_close(B.T @ B, torch.eye(10), rtol=0, atol=1e-4)
    plain = closed_form(error, p.gram, 10, split)
    alike = closed_form(error, p.gram, 10, split, torch.ones(shape[0]))
    torch.testing.assert_close(alike.factors.delta(), plain.factors.delta(), rtol=1e-3, atol=1e-4 * float(error.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGE_SHAPES.values()])
def test_the_loss_is_the_discarded_spectrum(kind, shape):
    p = problem(kind, shape)
    error = quantization_error(p)
    result = closed_form(error, p.gram, 10)
    energies = torch.linalg.eigvalsh(error.double() @ p.gram.double() @ error.double().T).flip(0)
    slack = rounding(error, p.gram)
    assert result.spectrum.shape == (10,) and result.spectrum.dtype == torch.float64
    # the iterative route promises the sum to a thousandth of what remains, and that bounds each eigenvalue
    torch.testing.assert_close(result.spectrum, energies[:10].clamp_min(0), rtol=1e-9, atol=1e-3 * result.error + slack)
    assert result.error == pytest.approx(result.total - float(result.spectrum.sum()), abs=slack)


@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGE_SHAPES.values()])
@pytest.mark.parametrize("split", SPLITS)
def test_an_identity_gram_gives_the_plain_svd(shape, split):
    """On an error with a gap after the fifth singular value, where the truncation is unique to full accuracy."""
    torch.manual_seed(0)
    error = quantization_error(problem("well conditioned", shape)) + torch.randn(shape[0], 5) @ torch.randn(5, shape[1])
    u, s, vt = torch.linalg.svd(error.double(), full_matrices=False)
    result = closed_form(error, torch.eye(shape[1]), 5, split)
    torch.testing.assert_close(result.factors.delta().double(), u[:, :5] * s[:5] @ vt[:5], rtol=0, atol=1e-3)
    torch.testing.assert_close(result.spectrum, s[:5].square(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGE_SHAPES.values()])
def test_both_splits_have_the_same_product(kind, shape):
    p = problem(kind, shape)
    error = quantization_error(p)
    paper, balanced = (closed_form(error, p.gram, 6, split).factors for split in ("paper", "balanced"))
    torch.testing.assert_close(paper.delta(), balanced.delta(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(paper.B.T @ paper.B, torch.eye(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(paper.A, paper.B.T @ error, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("outputs", (False, True))
@pytest.mark.parametrize("kind", ("well conditioned", "power law", "outlier channel"))
def test_balanced_factors_move_the_outputs_alike_and_the_least(kind, outputs):
    """What a step of ±η on every entry does to the outputs on the tokens, term by term, found by making such steps."""
    p = problem(kind, SHAPES["wide"])
    weights = 0.05 + torch.rand(SHAPES["wide"][0], generator=torch.Generator().manual_seed(1)) if outputs else None
    factors = closed_form(quantization_error(p), p.gram, 4, "balanced", weights).factors
    A, B, gram, generator = factors.A.double(), factors.B.double(), p.gram.double(), torch.Generator().manual_seed(2)

    def moved(A, B, steps=4000) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean squares, by term, of what a step on its column of `B` and on its row of `A` adds to the outputs."""
        through_b = B.shape[0] * ((A @ gram) * A).sum(1)  # ± of a column of B: no output's step depends on another's
        signs = torch.randint(0, 2, (steps, A.shape[1]), generator=generator).double() * 2 - 1
        return through_b, B.square().sum(0) * ((signs @ gram) * signs).sum(1).mean()

    through_b, through_a = moved(A, B)
    torch.testing.assert_close(through_b, through_a, rtol=0.1, atol=0)
    for scale in (0.5, 2.0):
        assert float(sum(moved(A / scale, B * scale)).sum()) > 1.5 * float((through_a + through_b).sum())


def test_a_term_without_inputs_is_scaled_like_the_others():
    B, A, gram = torch.ones(5, 3), torch.ones(3, 4), torch.zeros(4, 4)
    assert lowrank.share_steps(B, A, gram) == (B, A)  # nothing is known of any
    gram[0, 0], A[1, 0], A[0, 0] = 3.0, 0.0, 16.0
    b, a = lowrank.share_steps(B, A, gram)
    torch.testing.assert_close(b @ a, B @ A)
    torch.testing.assert_close(b[0], torch.tensor([4.0, 1.0, 1.0]))
    torch.testing.assert_close(b, b[:1].expand(5, 3))


@pytest.mark.parametrize("scale", (1e-6, 1e8))
@pytest.mark.parametrize("shape", [SHAPES["wide"], LARGE_SHAPES["tall"]])
def test_the_scale_of_the_gram_is_irrelevant(scale, shape):
    p = problem("power law", shape)
    error = quantization_error(p)
    plain, scaled = closed_form(error, p.gram.double(), 6), closed_form(error, scale * p.gram.double(), 6)
    torch.testing.assert_close(plain.factors.delta(), scaled.factors.delta(), rtol=1e-4, atol=1e-7)
    assert scaled.error == pytest.approx(scale * plain.error, rel=1e-6)


def test_the_dtypes_of_the_inputs_do_not_matter():
    p = problem("power law", SHAPES["tall"])
    error = quantization_error(p).half()
    wide = closed_form(error.double(), p.gram.double(), 6)
    narrow = closed_form(error, p.gram, 6)
    assert narrow.factors.A.dtype == torch.float32
    assert narrow.error == pytest.approx(wide.error, rel=1e-4)


@pytest.mark.parametrize("shape", [SHAPES["wide"], LARGE_SHAPES["tall"]])
def test_inputs_stay_as_they_were_and_answers_repeat(shape):
    p = problem("outlier channel", shape)
    error, gram = quantization_error(p), p.gram
    before = error.clone(), gram.clone()
    torch.manual_seed(1)
    first = closed_form(error, gram, 6)
    torch.manual_seed(2)
    second = closed_form(error, gram, 6)
    assert torch.equal(error, before[0]) and torch.equal(gram, before[1])
    assert torch.equal(first.factors.A, second.factors.A) and torch.equal(first.factors.B, second.factors.B)
    assert first.error == second.error and torch.equal(first.spectrum, second.spectrum)


@pytest.mark.parametrize("shape", [SHAPES["wide"], LARGE_SHAPES["tall"]])
def test_nothing_to_undo_gives_nothing(shape):
    p = problem("well conditioned", shape)
    result = closed_form(torch.zeros(shape), p.gram, 6)
    assert result.error == result.total == 0 and not result.factors.delta().any()
    unseen = closed_form(p.weight, torch.zeros_like(p.gram), 6)
    assert unseen.error == 0 and bool(unseen.factors.delta().isfinite().all())


@given(st.integers(1, 10), st.integers(1, 12), st.integers(1, 14), st.integers(1, 20), st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_no_other_factors_do_better(out, columns, rank, tokens, seed):
    """Against brute force, and against a random nudge of its own factors, on shapes of every kind."""
    torch.manual_seed(seed)
    error, x = torch.randn(out, columns), torch.randn(tokens, columns, dtype=torch.float64)
    gram = x.T @ x
    result = closed_form(error, gram, rank)
    best, slack = optimum(error, gram, rank), 1e-11 * result.total
    direct = output_error(error.double() - result.factors.delta().double(), gram)
    assert direct <= best * 1.0001 + slack
    A, B = result.factors.A, result.factors.B
    nudged = (B + 0.1 * torch.randn_like(B)) @ (A + 0.1 * torch.randn_like(A))
    assert output_error(error - nudged, gram) >= direct - slack


ERROR, GRAM = torch.zeros(3, 5), torch.eye(5)
REFUSED = {
    "transposed": (ERROR.T, GRAM, 1, "paper", r"error \(out, in\) and a Gram matrix \(in, in\), got \(5, 3\) and \(5, 5\)"),
    "a vector": (ERROR[0], GRAM, 1, "paper", r"got \(5,\) and \(5, 5\)"),
    "a diagonal": (ERROR, GRAM[0], 1, "paper", r"got \(3, 5\) and \(5,\)"),
    "rank 0": (ERROR, GRAM, 0, "paper", "rank must be at least 1, got 0"),
    "split": (ERROR, GRAM, 1, "even", "unknown split 'even': one of paper, balanced"),
    "NaN": (ERROR + torch.nan, GRAM, 1, "paper", "NaN or Inf"),
    "Inf": (ERROR, GRAM * torch.inf, 1, "paper", "NaN or Inf"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    error, gram, rank, split, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        closed_form(error, gram, rank, split)


@pytest.mark.parametrize("outputs", (torch.ones(2), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, torch.nan, 1.0])), ids=str)
def test_weights_that_are_none_are_refused(outputs):
    with pytest.raises(ValueError, match="a positive finite weight for each of 3 outputs"):
        closed_form(ERROR, GRAM, 1, outputs=outputs)


@pytest.mark.parametrize("split", SPLITS)
def test_rounds_lower_the_weighted_error(split):
    p = problem("power law", SHAPES["tall"])
    outputs = 0.05 + torch.rand(p.weight.shape[0], generator=torch.Generator().manual_seed(1)) ** 4
    roots = outputs.sqrt()[:, None]

    def left(rounds, weighted):
        stats = p.stats.for_outputs(outputs) if weighted else p.stats
        quantized, factors = Cloq(split, rounds).initialize(p.weight, stats, Gptq(2, 32).quantize, 6)
        return output_error(roots * (p.weight - quantized.dequantize() - factors.delta()), p.gram)

    assert left(4, True) < left(1, True) < left(0, True) < left(0, False)
    assert left(4, True) < left(4, False)
