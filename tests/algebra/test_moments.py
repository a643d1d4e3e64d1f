"""What a sketch knows of a second moment, against the moment itself."""

import pytest
import torch

from cloq.algebra.moments import SKETCHED, SecondMoment


def gradients(out: int, decay: float, tokens: int = 400) -> torch.Tensor:
    """Rows whose second moment has eigenvalues that fall by `decay` from one to the next."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(out, out, generator=generator, dtype=torch.float64)).Q
    return torch.randn(tokens, out, generator=generator, dtype=torch.float64) * decay ** (torch.arange(out) / 2) @ basis.T


@pytest.mark.parametrize("out", (8, 20, 100, 300))
@pytest.mark.parametrize("decay", (0.5, 0.9, 1.0))
def test_leading_directions_hold_what_they_can_and_never_more_than_there_is(out, decay):
    rows = gradients(out, decay)
    whole = rows.T @ rows
    found = SecondMoment.of(rows.float()).leading(16).double()
    assert found.shape == (out, 16)
    values = torch.linalg.eigvalsh(whole).flip(0)
    assert float(torch.linalg.eigvalsh(whole - found @ found.T)[0]) >= -1e-4 * float(values[0])
    held = float(found.square().sum() / values[:16].sum())
    assert held <= 1 + 1e-4 and held > (0.93 if decay < 0.95 or out <= SKETCHED else 0.3)
    one = found[:, 0] / found[:, 0].norm()
    assert decay == 1.0 or float(one @ whole @ one) > 0.99 * float(values[0])


def test_moments_of_parts_add_up():
    rows = gradients(40, 0.9).float()
    whole, parts = SecondMoment.of(rows), SecondMoment.of(rows[:100]) + SecondMoment.of(rows[100:]) + SecondMoment.zeros(40)
    for name in ("diagonal", "sketch"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(getattr(whole / 4, name), getattr(whole, name) / 4)


@pytest.mark.parametrize("rows", (torch.zeros(5, 12), torch.ones(5, 12), 1e-20 * torch.ones(5, 12)), ids=("none", "one", "small"))
def test_few_directions_are_filled_up_with_nothing(rows):
    found = SecondMoment.of(rows).leading(16)
    torch.testing.assert_close(found @ found.T, rows.T @ rows, rtol=1e-4, atol=0)
