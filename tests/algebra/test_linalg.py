"""Norms, shares, damping, the largest eigenvalue."""

import pytest
import torch

from cloq.algebra import linalg
from tests.problems import KINDS, LARGE_SHAPES, SHAPES, output_error, problem


@pytest.mark.parametrize("panel", (1, 30, 72, 500))
def test_a_norm_by_panels_of_one_triangle(panel, monkeypatch):
    monkeypatch.setattr(linalg, "NORM_PANEL", panel)
    p = problem("power law", SHAPES["wide"])
    assert linalg.gram_norm2(p.weight, p.gram) == pytest.approx(output_error(p.weight, p.gram), rel=1e-6)


def test_the_relative_error_of_an_unseen_layer_is_zero():
    assert linalg.relative_error(torch.ones(3, 5), torch.ones(3, 5), torch.zeros(5, 5)) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", (0.01, 0.1))
def test_damped_cholesky_is_an_upper_root_of_the_damped_matrix(kind, damping):
    gram = problem(kind, SHAPES["wide"]).gram
    factor, used = linalg.damped_cholesky(gram, damping)
    assert used == damping and factor.dtype == torch.float32
    assert torch.equal(factor, factor.triu()) and bool((factor.diagonal() > 0).all())
    damped = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram))
    wide = factor.double()
    torch.testing.assert_close(wide @ wide.T, damped, atol=1e-6 * float(damped.diagonal().max()), rtol=0)


def test_a_failed_cholesky_raises_the_damping_and_returns_it():
    eigenvalues = torch.cat([torch.full((39,), 1.0), torch.tensor([-0.05])]).double()
    basis = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    gram = ((basis * eigenvalues) @ basis.T).float()
    factor, used = linalg.damped_cholesky(gram, 0.01)
    assert used == pytest.approx(0.1)  # 0.01 · 0.97 < 0.05 < 0.1 · 0.97
    damped = gram.double() + used * gram.double().diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(factor.double() @ factor.double().T, damped, rtol=1e-3, atol=1e-5)
    assert linalg.damped_cholesky(gram, 0.0).damping == pytest.approx(0.1)  # 0 → 1e-4 → 1e-3 → 1e-2 → 1e-1
    assert linalg.damped_cholesky(gram + 0.05 * torch.eye(40) - 1e-5 * torch.eye(40), 0.0).damping == 1e-4


def test_what_is_no_gram_matrix_is_refused():
    with pytest.raises(ValueError, match="failed up to a relative damping of 100000"):
        linalg.damped_cholesky(torch.tensor([[1.0, 1e7], [1e7, 1.0]]), 0.01)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN or Inf"):
            linalg.damped_cholesky(torch.tensor([[1.0, bad], [bad, 1.0]]), 0.01)


def test_a_gram_matrix_of_zeros_has_the_identity_for_a_factor():
    factor, damping = linalg.damped_cholesky(torch.zeros(5, 5), 0.01)
    assert torch.equal(factor, torch.eye(5)) and damping == 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_eigenvalue_is_found_from_below(kind):
    gram = problem(kind, LARGE_SHAPES["wide"]).gram
    exact = float(torch.linalg.eigvalsh(gram.double())[-1])
    assert 0.999 * exact <= linalg.largest_eigenvalue(gram) <= 1.00001 * exact


def test_the_largest_eigenvalue_of_easy_matrices():
    assert linalg.largest_eigenvalue(torch.zeros(7, 7)) == 0
    assert linalg.largest_eigenvalue(torch.eye(7)) == pytest.approx(1)
    assert linalg.largest_eigenvalue(torch.tensor([[4.0]])) == pytest.approx(4)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_one_value_that_is_not_finite_is_found_wherever_it_is(value, dtype):
    matrix = torch.full((5, 7), -torch.finfo(dtype).max, dtype=dtype)
    assert linalg.all_finite(matrix) and linalg.all_finite(matrix[:0])
    for position in (0, 17, 34):
        broken = matrix.clone()
        broken.view(-1)[position] = value
        assert not linalg.all_finite(broken)
        assert not linalg.all_finite(broken.T)
