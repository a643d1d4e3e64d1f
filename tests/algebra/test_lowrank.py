"""The weighted low-rank solve on both routes and in both precisions, following an error, balancing, deflation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloq.algebra import linalg, lowrank
from tests.problems import KINDS, LARGE_SHAPES, SHAPES, optimum, output_error, problem, rounding

ROUTES = {"exact": lowrank._top_eigenvectors_exact, "krylov": lowrank._top_eigenvectors_krylov}


def rotated(spectrum: torch.Tensor, rows: int, seed: int = 0) -> torch.Tensor:
    """An `(rows, len(spectrum))` matrix with the given singular values, float64."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    left = torch.linalg.qr(torch.randn(rows, n, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    return left * spectrum @ right


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES)
def test_top_eigenvectors_span_the_optimum(route, kind, shape):
    p = problem(kind, shape)
    vectors, values, trace, slack = ROUTES[route](p.weight.double(), p.gram, 9)
    assert slack == 0
    assert vectors.shape == (shape[0], 9) and values.shape == (9,) and values.dtype == torch.float64
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(9, dtype=torch.float64), atol=1e-10, rtol=0)
    assert bool((values.diff() <= 1e-12 * trace).all()) and bool((values >= 0).all())
    weight = p.weight.double()
    total = output_error(weight, p.gram)
    assert trace == pytest.approx(total, rel=1e-9)
    best, slack = optimum(weight, p.gram, 9), rounding(weight, p.gram)
    assert slack < 1e-6 * total
    assert output_error(weight - vectors @ (vectors.T @ weight), p.gram) <= 1.001 * best + slack
    assert trace - float(values.sum()) == pytest.approx(best, rel=1e-3, abs=slack)


def test_the_route_follows_size_and_rank(monkeypatch):
    taken = []
    for name in ROUTES:
        monkeypatch.setattr(lowrank, f"_top_eigenvectors_{name}", lambda error, gram, rank, name=name: taken.append(name))
    for shape, rank in (((128, 900), 4), ((300, 200), 20), ((300, 200), 21), ((200, 300), 21), ((200, 300), 200)):
        lowrank.top_eigenvectors(torch.zeros(shape, dtype=torch.float64), None, rank)
    assert taken == ["exact", "krylov", "exact", "exact", "exact"]


SPECTRA = {
    "flat": lambda n: torch.ones(n),
    "noise": lambda n: torch.linspace(1, 0.5, n),
    "step after the rank": lambda n: torch.cat([torch.full((12,), 10.0), torch.ones(n - 12)]),
    "step before the rank": lambda n: torch.cat([torch.full((4,), 10.0), torch.ones(n - 4)]),
    "cluster across the rank": lambda n: torch.cat([torch.full((60,), 3.0), torch.ones(n - 60)]),
    "one giant": lambda n: torch.cat([torch.tensor([1e6]), torch.linspace(1, 0.1, n - 1)]),
    "power law": lambda n: torch.arange(1, n + 1) ** -0.5,
    "steep": lambda n: 0.8 ** torch.arange(n),
    "rank three": lambda n: torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.zeros(n - 3)]),
    "zero": lambda n: torch.zeros(n),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", (1, 12, 40))
@pytest.mark.parametrize("rows", (400, 220))
def test_krylov_is_within_a_thousandth_on_any_spectrum(name, rank, rows):
    spectrum = SPECTRA[name](220).double()
    matrix = rotated(spectrum, rows)
    vectors, values, trace, _ = lowrank._top_eigenvectors_krylov(matrix, None, rank)
    best = float(spectrum[rank:].square().sum())
    remaining = float((matrix - vectors @ (vectors.T @ matrix)).square().sum())
    assert best * (1 - 1e-9) <= remaining <= 1.001 * best + 1e-11 * trace
    assert trace - float(values.sum()) == pytest.approx(remaining, rel=1e-6, abs=1e-11 * trace)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank, dtype=torch.float64), atol=1e-10, rtol=0)


def test_krylov_restarts_when_its_basis_is_full(monkeypatch):
    """With a smaller basis it takes longer; the answer is as good."""
    matrix = rotated(torch.linspace(1, 0.5, 200).double(), 260)
    widest = []
    monkeypatch.setattr(lowrank, "KRYLOV_MAX_BLOCKS", 4)
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: widest.append(len(m)) or eigh(m))
    _, values, trace, _ = lowrank._top_eigenvectors_krylov(matrix, None, 10)
    assert max(widest) == 4 * 18 and widest.count(4 * 18) > 1
    best = float(torch.linspace(1, 0.5, 200).double()[10:].square().sum())
    assert best * (1 - 1e-9) <= trace - float(values.sum()) <= 1.001 * best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES)
def test_float32_is_used_where_it_is_as_good_and_nowhere_else(kind, shape, monkeypatch):
    """Of the awkward inputs, those with a part that dwarfs the rest need float64; what comes out is the optimum whichever was used."""
    dwarfing = ("one token", "outlier channel", "outlier and dead", "mostly constant")
    p, dtypes, krylov = problem(kind, shape), [], lowrank._top_eigenvectors_krylov
    monkeypatch.setattr(lowrank, "_top_eigenvectors_krylov", lambda e, *rest: dtypes.append(e.dtype) or krylov(e, *rest))
    found = lowrank.top_eigenvectors(p.weight, p.gram, 9)
    assert dtypes[0] == torch.float32 and (len(dtypes) == 2) == (kind in dwarfing)
    assert found.vectors.dtype == found.values.dtype == torch.float64
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(9, dtype=torch.float64), atol=1e-10, rtol=0)
    weight = p.weight.double()
    best, slack = optimum(weight, p.gram, 9), rounding(weight, p.gram)
    assert output_error(weight - found.vectors @ (found.vectors.T @ weight), p.gram) <= 1.001 * best + slack
    assert found.trace - float(found.values.sum()) == pytest.approx(best, rel=1e-3, abs=slack)


def test_the_slack_bounds_what_rounding_did():
    """On a product that cancels: rows that the Gram matrix's one large direction hardly sees."""
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(200, 300, generator=generator)
    error -= error.mean(1, keepdim=True)
    x = 30 + 0.1 * torch.randn(900, 300, generator=generator)
    gram = x.T @ x
    exact = lowrank._top_eigenvectors_krylov(error.double(), gram, 10)
    coarse = lowrank._top_eigenvectors_krylov(error, gram, 10)
    assert abs(coarse.trace - exact.trace) <= coarse.slack and coarse.slack > lowrank.FLOAT32_TOLERANCE * exact.trace
    fine = lowrank.top_eigenvectors(error, gram, 10)
    assert fine.slack == 0 and fine.trace == pytest.approx(exact.trace, rel=1e-9)


@pytest.mark.parametrize("route", ROUTES)
def test_a_diagonal_and_the_identity_have_short_forms(route):
    p = problem("power law", LARGE_SHAPES["wide"])
    diagonal = p.gram.diagonal()
    short, full = ROUTES[route](p.weight, diagonal, 6), ROUTES[route](p.weight, torch.diag(diagonal), 6)
    torch.testing.assert_close(short.values, full.values)
    assert short.trace == pytest.approx(full.trace)
    short, full = ROUTES[route](p.weight, None, 6), ROUTES[route](p.weight, torch.eye(p.weight.shape[1]), 6)
    torch.testing.assert_close(short.values, full.values)
    torch.testing.assert_close(short.vectors @ short.vectors.T, full.vectors @ full.vectors.T, atol=1e-5, rtol=0)


def test_a_gram_matrix_is_widened_panel_by_panel(monkeypatch):
    p = problem("power law", LARGE_SHAPES["wide"])
    whole = lowrank.top_eigenvectors(p.weight.double(), p.gram, 6).values
    monkeypatch.setattr(lowrank, "GRAM_PANEL", 64)
    torch.testing.assert_close(lowrank.top_eigenvectors(p.weight.double(), p.gram, 6).values, whole, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGE_SHAPES.values()])
def test_low_rank_without_a_gram_is_the_truncated_svd(shape):
    weight = problem("well conditioned", shape).weight
    weight = weight + 0.05 * torch.linspace(1, 2, shape[0])[:, None] @ torch.linspace(-1, 1, shape[1])[None]
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    for rank in (1, 5, min(shape)):
        B, A = lowrank.low_rank(weight, None, rank)
        left = float((weight - B @ A).double().square().sum())
        assert left == pytest.approx(float(s[rank:].square().sum()), rel=1e-3, abs=1e-9)
        torch.testing.assert_close(B.T @ B, A @ A.T, atol=1e-5, rtol=1e-4)
    B, A = lowrank.low_rank(weight, None, 1)
    torch.testing.assert_close(B @ A, (s[0] * torch.outer(u[:, 0], vt[0])).float(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("rank", (0, -1, 41))
def test_a_rank_that_the_shape_does_not_allow_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank must be 1 to 40 for a layer of shape \(40, 72\), got {rank}"):
        lowrank.top_eigenvectors(torch.zeros(40, 72), None, rank)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_following_leads_to_the_optimum(kind, shape):
    """From anywhere, each no worse than the last, and every step says truly what its factors leave."""
    p = problem(kind, shape)
    total, vectors, last = output_error(p.weight, p.gram), torch.randn(shape[0], 6, generator=torch.Generator().manual_seed(1)), None
    for _ in range(30):
        vectors, A, remaining, gained = lowrank.follow(p.weight, p.gram, vectors)
        assert gained >= -2e-6 * total
        assert remaining == pytest.approx(output_error(p.weight - vectors @ A, p.gram), rel=1e-3, abs=2e-6 * total)
        assert last is None or remaining <= last * 1.001 + 2e-6 * total
        last = remaining
    assert last <= 1.1 * optimum(p.weight, p.gram, 6) + 1e-5 * total


@pytest.mark.parametrize("kind", ["well conditioned", "power law"])
def test_following_says_when_it_has_arrived(kind):
    """From anywhere the last step still gains, by as much as it says; from the optimum nothing."""
    p = problem(kind, SHAPES["tall"])
    start = torch.randn(len(p.weight), 6, generator=torch.Generator().manual_seed(1))
    first, second = lowrank.follow(p.weight, p.gram, start, 2), lowrank.follow(p.weight, p.gram, start, 3)
    assert not first.settled and not second.settled
    assert second.gained == pytest.approx(first.remaining - second.remaining, rel=1e-2)
    best = lowrank.top_eigenvectors(p.weight, p.gram, 6).vectors
    assert lowrank.follow(p.weight, p.gram, best).settled
    assert not lowrank.Followed(best, best, float("nan"), 0.0).settled and not lowrank.Followed(best, best, float("inf"), 0.0).settled


@pytest.mark.parametrize("kind", ["well conditioned", "power law", "outlier channel"])
def test_a_space_turned_into_eigenvectors_is_the_same_product(kind):
    p = problem(kind, SHAPES["tall"])
    vectors = lowrank.top_eigenvectors(p.weight, p.gram, 6).vectors.float()
    turned = vectors @ torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    B, A = lowrank.as_eigenvectors(turned, turned.T @ p.weight, p.gram)
    torch.testing.assert_close(B @ A, vectors @ (vectors.T @ p.weight), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(B.T @ B, torch.eye(6), atol=1e-5, rtol=0)
    core = A.double() @ p.gram.double() @ A.double().T
    sizes = core.diagonal()
    assert torch.equal(sizes, sizes.sort(descending=True).values)
    assert float((core - torch.diag(sizes)).abs().max()) < 1e-4 * float(sizes[0])


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_balance_keeps_the_product_and_shares_the_singular_values(out, columns, rank, seed):
    torch.manual_seed(seed)
    rank = min(rank, out, columns)
    B, A = torch.randn(out, rank), 100 * torch.randn(rank, columns)
    b, a = lowrank.balance(B, A)
    torch.testing.assert_close(b @ a, B @ A, atol=1e-3, rtol=1e-5)
    gram = b.T @ b
    torch.testing.assert_close(gram, a @ a.T, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_survive_float32(kind):
    """A corrected error against 1000-fold outliers is the worst case: large products that cancel."""
    p = problem(kind, SHAPES["wide"])
    B, A = lowrank.low_rank(p.weight, p.gram, 6)
    left = p.weight - B @ A
    assert linalg.gram_norm2(p.weight, p.gram) == pytest.approx(output_error(p.weight, p.gram), rel=1e-4)
    total = output_error(p.weight, p.gram)
    assert linalg.gram_norm2(left, p.gram) == pytest.approx(output_error(left, p.gram), rel=1e-2, abs=1e-9 * total)
    assert linalg.relative_error(left, p.weight, p.gram) == linalg.gram_norm2(left, p.gram) / linalg.gram_norm2(p.weight, p.gram)


@pytest.mark.parametrize("kind", KINDS)
def test_deflate_is_what_the_best_b_leaves(kind):
    """`trace(E G' Eᵀ)` against a least-squares solve for B on the inputs themselves."""
    p = problem(kind, SHAPES["tall"])
    rows = torch.randn(5, p.weight.shape[1], generator=torch.Generator().manual_seed(1))
    x = p.inputs.double().T  # (in, tokens)
    wanted, given = p.weight.double() @ x, rows.double() @ x
    B = torch.linalg.lstsq(given.T, wanted.T, driver="gelsd").solution.T
    expected = float((wanted - B @ given).square().sum())
    found = float(((p.weight.double() @ lowrank.deflate(p.gram, rows).double()) * p.weight).sum())
    assert found == pytest.approx(expected, rel=1e-3, abs=2e-5 * float(wanted.square().sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_deflate_keeps_a_share_and_stays_positive(kind):
    p = problem(kind, SHAPES["wide"])
    rows = torch.randn(5, p.weight.shape[1], generator=torch.Generator().manual_seed(1))
    none, some, all_of_it = (lowrank.deflate(p.gram, rows, kept) for kept in (0.0, 0.25, 1.0))
    torch.testing.assert_close(all_of_it, p.gram)
    scale = float(p.gram.abs().max())
    torch.testing.assert_close(some, none + 0.25 * (p.gram - none), rtol=0, atol=1e-5 * scale)
    assert float(torch.linalg.eigvalsh(none.double())[0]) > -1e-5 * scale and torch.equal(none, none.T)
