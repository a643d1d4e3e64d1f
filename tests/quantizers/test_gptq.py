"""GPTQ against the procedure that it is a fast form of, and the ways in which it can go wrong in silence."""

import itertools
from typing import NamedTuple

import pytest
import torch

from cloq.algebra import linalg
from cloq.quantizers import Gptq, Rtn, columns, gptq, grid
from cloq.types import LayerStats, QuantizedWeight
from tests.problems import KINDS, LARGE_SHAPES, SHAPES, output_error, problem

NAMES = ("bits", "group_size", "symmetric", "act_order", "static_groups")
GRIDS = [(2, 32, False), (3, 20, True), (4, None, False), (2, None, True), (8, 64, False)]
SETTINGS = [dict(zip(NAMES, (*g, *order), strict=True)) for g in GRIDS for order in itertools.product((False, True), repeat=2)]


class Naive(NamedTuple):
    """codes, scale, zero: as of a `QuantizedWeight`. margin: how far from the edge between two codes each weight was when its turn came, in
    steps. order: of the columns' turns. groups: of the column at each turn. fitted: by group, the weights that its grids were fitted to and
    what the error of each counts."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    margin: torch.Tensor
    order: torch.Tensor
    groups: torch.Tensor
    config: Gptq
    fitted: dict[int, tuple[torch.Tensor, torch.Tensor]]

    def may_have(self, row: int, group: int, scale: torch.Tensor, zero: torch.Tensor) -> bool:
        """Whether weights that are the row's but for float32's rounding have this grid, found by trying some."""
        (values, weights), config = self.fitted[group], self.config
        noise = torch.randn(256, values.shape[1], generator=torch.Generator().manual_seed(0))
        tried = values[row] + ROUNDING * float(values[row].abs().max()) * noise
        scales, zeros = grid.fit(tried, config.bits, config.symmetric, config.search, weights)
        return bool(((scales == scale) & (zeros == zero)).any())


def naive_gptq(weight, gram, config: Gptq) -> Naive:
    """Optimal Brain Quantization with the columns in a given order, arXiv:2210.17323 Eqs. (2) and (3), in float64.

    The inverse Hessian is explicit; after each column its row and column are eliminated from it, and every weight that remains
    moves. No Cholesky factor, no blocks.
    """
    weight, gram = weight.double().clone(), gram.double()
    out, columns = weight.shape
    dead = gram.diagonal() == 0
    weight[:, dead] = 0
    hessian = gram + torch.diag(dead * gram.diagonal()[~dead].mean())
    hessian += config.damping * hessian.diagonal().mean() * torch.eye(columns)
    inverse = torch.linalg.inv(hessian)
    order = gram.diagonal().argsort(descending=True, stable=True) if config.act_order else torch.arange(columns)
    group_of = torch.arange(columns) // (config.group_size or columns)
    index = group_of[order] if config.static_groups else group_of

    importance, remaining = torch.empty(columns, dtype=torch.float64), inverse.clone()
    for i in order.tolist():  # of a column, once those before it are gone
        importance[i] = remaining[i, i] ** -0.5
        remaining -= torch.outer(remaining[:, i], remaining[i]) / remaining[i, i]

    fits, fitted = {}, {}

    def fit(g, which):
        fitted[g] = values, weights = weight[:, which].float(), importance[which].float()
        fits[g] = tuple(t.double() for t in grid.fit(values, config.bits, config.symmetric, config.search, weights))

    if config.static_groups or config.group_size is None:
        for g in group_of.unique().tolist():
            fit(g, group_of == g)
    codes, margin = torch.empty(out, columns, dtype=torch.int64), torch.empty(out, columns, dtype=torch.float64)
    for position, i in enumerate(order.tolist()):
        g = int(index[position])
        if g not in fits:
            fit(g, order[position : position + config.group_size])
        scale, zero = fits[g]
        margin[:, i] = (weight[:, i] / scale - (weight[:, i] / scale).floor() - 0.5).abs()
        codes[:, i] = (torch.round(weight[:, i] / scale) + zero).clamp(0, 2**config.bits - 1).long()
        error = (weight[:, i] - (codes[:, i] - zero) * scale) / inverse[i, i]
        rest = order[position + 1 :]
        weight[:, rest] -= torch.outer(error, inverse[i, rest])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    scale, zero = (torch.stack([fits[g][part] for g in sorted(fits)], dim=1) for part in (0, 1))
    return Naive(codes, scale.float(), zero, margin, order, index, config, fitted)


AT_AN_EDGE = 3e-4
"""In steps. Where the damped matrix has a condition number of thousands, float32's factor of it is off in the fifth digit."""

ROUNDING = 1e-4
"""Of a group's largest weight: what that does to each by the time that the group gets its grid. At 2 bits about half of `AT_AN_EDGE`."""


def unlike(quantized: QuantizedWeight, naive: Naive) -> list[str]:
    """Rows are independent. In float32 a value at the edge between two codes may fall to the other side of it, and a group may get another
    grid where its scale or zero point is at such an edge or two candidates of the search are alike; that moves all that comes after in its
    row, and nothing else. The rows that differ first in another way, and how."""
    found = []
    scale, zero = (part[:, naive.groups] for part in (quantized.scale, quantized.zero))
    expected_scale, expected_zero = (part[:, naive.groups] for part in (naive.scale, naive.zero))
    codes, expected, margin = (part[:, naive.order] for part in (quantized.codes.long(), naive.codes, naive.margin))
    differs = (codes != expected) | (scale != expected_scale) | (zero != expected_zero)
    for row in differs.any(1).nonzero().flatten().tolist():
        first = int(differs[row].nonzero()[0])
        group, ours = int(naive.groups[first]), (scale[row, first], zero[row, first])
        if ours[0] == expected_scale[row, first] and ours[1] == expected_zero[row, first]:
            if margin[row, first] > AT_AN_EDGE:
                found.append(f"row {row}: another code at turn {first}, {float(margin[row, first]):.2g} steps from an edge")
        elif not naive.may_have(row, group, *ours):
            found.append(
                f"row {row}: another grid in group {group}, its scale {float(ours[0] / expected_scale[row, first]):.4f} times as large"
            )
    return found


def rows_that_differ(one: QuantizedWeight, other: QuantizedWeight) -> int:
    return int(((one.codes != other.codes).any(1) | (one.scale != other.scale).any(1) | (one.zero != other.zero).any(1)).sum())


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("search", (False, True))
@pytest.mark.parametrize("kind", ("power law", "dead channels"))
def test_code_by_code_as_the_naive_elimination(kind, settings, search):
    p = problem(kind, (17, 150))
    config = Gptq(**settings, search=search)
    quantized = config.quantize(p.weight, p.stats)
    assert unlike(quantized, naive_gptq(p.weight, p.gram, config)) == []


@pytest.mark.parametrize("shape", (SHAPES["wide"], SHAPES["tall"]))
def test_exactly_the_naive_codes(shape):
    """Where no value is near an edge there is no difference at all."""
    p = problem("well conditioned", shape)
    config = Gptq(2, 32)
    quantized = config.quantize(p.weight, p.stats)
    naive = naive_gptq(p.weight, p.gram, config)
    assert torch.equal(quantized.codes.long(), naive.codes)
    assert torch.equal(quantized.scale, naive.scale) and torch.equal(quantized.zero.double(), naive.zero)


@pytest.mark.parametrize("block, inner", ((1, 16), (7, 3), (32, 1), (1000, 16), (1000, 1000)))
@pytest.mark.parametrize("config", (Gptq(3, 32), Gptq(3, None), Gptq(2, 32, act_order=True, static_groups=True)), ids=str)
def test_blocks_are_only_an_order_of_work(monkeypatch, block, inner, config):
    p = problem("power law", (17, 150))
    expected = config.quantize(p.weight, p.stats)
    monkeypatch.setattr(gptq, "BLOCK", block)
    monkeypatch.setattr(columns, "INNER", inner)
    found = config.quantize(p.weight, p.stats)
    assert rows_that_differ(found, expected) <= 1


@pytest.mark.parametrize("kind", ("well conditioned", "power law", "rank deficient", "outlier channel", "mostly constant"))
def test_many_blocks_are_as_good_as_the_naive_elimination(kind):
    """A row in which a value at the edge between two codes fell to its other side is another answer, of the same quality."""
    p = problem(kind, (192, 400))
    found, naive = Gptq(2, 64, search=True).quantize(p.weight, p.stats), naive_gptq(p.weight, p.gram, Gptq(2, 64, search=True))
    assert unlike(found, naive) == []
    dense = (naive.codes.float() - naive.zero.float()[:, naive.groups]) * naive.scale[:, naive.groups]
    errors = [output_error(p.weight - weight, p.gram) for weight in (found.dequantize(), dense)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


GAINS = {
    "well conditioned": 0.95,
    "power law": 0.1,
    "rank deficient": 0.4,
    "one token": 0.1,
    "outlier channel": 1,
    "collinear": 0.7,
}


@pytest.mark.parametrize("kind", GAINS)
@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("order", ({}, {"static_groups": True}, {"act_order": True, "static_groups": True}), ids=str)
def test_less_output_error_than_rounding(kind, bits, order):
    """A Cholesky factor of the wrong triangle would turn GPTQ into something that rounds, without a sound.

    The more the inputs are correlated, the larger the gain.
    """
    p = problem(kind, LARGE_SHAPES["wide"])
    rounded = output_error(p.weight - Rtn(bits, 32).quantize(p.weight).dequantize(), p.gram)
    ours = output_error(p.weight - Gptq(bits, 32, **order).quantize(p.weight, p.stats).dequantize(), p.gram)
    assert ours < GAINS[kind] * rounded


def test_uncorrelated_inputs_leave_nothing_to_push():
    """With a diagonal Gram matrix GPTQ is round to nearest."""
    weight = problem("well conditioned", SHAPES["wide"]).weight
    stats = LayerStats(torch.diag(torch.linspace(1, 5, weight.shape[1])), 100)
    ours, rounded = Gptq(3, 32).quantize(weight, stats), Rtn(3, 32).quantize(weight)
    assert torch.equal(ours.codes, rounded.codes) and torch.equal(ours.scale, rounded.scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", (2.0**-20, 2.0**10))
def test_the_scale_of_the_gram_is_irrelevant(kind, scale):
    """Dead inputs too: what stands on their diagonal follows the others."""
    p = problem(kind, SHAPES["tall"])
    plain = Gptq(2, 32).quantize(p.weight, p.stats)
    scaled = Gptq(2, 32).quantize(p.weight, LayerStats(scale * p.gram, len(p.inputs)))
    assert torch.equal(plain.codes, scaled.codes) and plain.damping == scaled.damping


ORDERS = ({}, {"act_order": True}, {"act_order": True, "static_groups": True}, {"group_size": None})


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("symmetric", (False, True))
def test_dead_inputs_get_weight_zero_and_move_nothing(order, symmetric):
    p = problem("dead channels", SHAPES["tall"])
    settings = {"bits": 3, "group_size": 32, "symmetric": symmetric} | order
    dead = p.gram.diagonal() == 0
    found = Gptq(**settings).quantize(p.weight, p.stats)
    assert int(dead.sum()) > 5 and not found.dequantize()[:, dead].any()
    other = p.weight.clone()
    other[:, dead] = 7.0
    assert torch.equal(Gptq(**settings).quantize(other, p.stats).dequantize(), found.dequantize())


def test_a_layer_that_saw_only_zeros_gets_zeros():
    weight = problem("power law", SHAPES["wide"]).weight
    found = Gptq(2, 32).quantize(weight, LayerStats(torch.zeros(72, 72), 50))
    assert not found.dequantize().any()


def test_activation_order_starts_with_the_strongest_input():
    """The strongest input is rounded first, in its raw state; its group holds the next strongest, not its neighbours."""
    p = problem("power law", SHAPES["wide"])
    p = p._replace(inputs=p.inputs * torch.linspace(1, 30, 72))
    found = Gptq(3, 8, act_order=True).quantize(p.weight, p.stats)
    order = p.gram.diagonal().argsort(descending=True, stable=True)
    assert torch.equal(found.group_index[order], torch.arange(72) // 8)
    scale, zero = found.scale[:, 0], found.zero[:, 0].float()
    expected_scale, expected_zero = grid.fit(p.weight[:, order[:8]], 3, False, False)
    assert torch.equal(scale, expected_scale) and torch.equal(zero, expected_zero.float())
    assert torch.equal(found.codes[:, order[0]].float(), grid.encode(p.weight[:, order[0]], scale, zero, 3))


@pytest.mark.parametrize("act_order", (False, True))
def test_static_groups_have_the_grids_of_the_original_weight(act_order):
    p = problem("power law", (17, 100))
    found = Gptq(3, 32, act_order=act_order, static_groups=True).quantize(p.weight, p.stats)
    rounded = Rtn(3, 32).quantize(p.weight)
    assert torch.equal(found.scale, rounded.scale) and torch.equal(found.zero, rounded.zero)
    assert torch.equal(found.group_index, rounded.group_index)


def test_the_search_weighs_columns_by_what_their_errors_cost():
    """A group with one loud input: the plain search cuts its large weight off, the weighted one keeps it."""
    p = problem("outlier channel", (64, 96))
    errors = []
    for scales in (Gptq(2, 32, search=True), Rtn(2, 32, search=True)):
        fits = scales.quantize(p.weight, p.stats)
        left = p.weight - grid.decode(grid.encode(p.weight, fits.scale[:, fits.group_index], fits.zero[:, fits.group_index].float(), 2),
                                      fits.scale[:, fits.group_index], fits.zero[:, fits.group_index].float())  # fmt: skip
        errors.append(float(left[:, 5].square().sum()))
    assert errors[0] < 0.7 * errors[1]


def test_a_gram_matrix_that_is_not_positive_definite_raises_the_damping_and_says_so():
    p = problem("well conditioned", SHAPES["wide"])
    values, vectors = torch.linalg.eigh(p.gram.double())
    values[0] = -0.05 * values.mean()
    stats = LayerStats(((vectors * values) @ vectors.T).float(), 100)
    found = Gptq(3, 32).quantize(p.weight, stats)
    assert found.damping == pytest.approx(0.1)
    assert torch.equal(found.codes, Gptq(3, 32, damping=0.1).quantize(p.weight, stats).codes)
    assert Gptq(3, 32).quantize(p.weight, p.stats).damping == 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", (0.0, 1e-7))
def test_little_damping_never_does_worse_than_rounding(kind, damping):
    """Without any the factorization of a rank-deficient matrix fails or comes out as noise; neither may spoil the weight."""
    p = problem(kind, SHAPES["wide"])
    found = Gptq(4, 32, damping=damping).quantize(p.weight, p.stats)
    assert found.damping >= damping
    rounded = Rtn(4, 32).quantize(p.weight)
    errors = [linalg.relative_error(p.weight - q.dequantize(), p.weight, p.gram) for q in (found, rounded)]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_layers_that_share_statistics_share_the_factorization(order, monkeypatch):
    """Each comes out as alone; other settings of the order or the damping have their own."""
    p, other = problem("dead channels", SHAPES["tall"]), problem("dead channels", SHAPES["tall"], seed=1)
    calls, factorize = [], linalg.damped_cholesky
    monkeypatch.setattr(linalg, "damped_cholesky", lambda gram, damping: calls.append(damping) or factorize(gram, damping))
    settings = {"bits": 3, "group_size": 32} | order
    alone = [Gptq(**settings).quantize(weight, p.stats) for weight in (p.weight, other.weight)]
    assert len(calls) == 2
    stats = p.stats
    together = [Gptq(**settings).quantize(weight, stats) for weight in (p.weight, other.weight)]
    assert len(calls) == 3
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(one.codes, two.codes) and torch.equal(one.scale, two.scale) and torch.equal(one.group_index, two.group_index)
    assert Gptq(**settings | {"damping": 0.1}).quantize(p.weight, stats).damping == 0.1 and len(calls) == 4


def test_a_gram_matrix_with_nan_is_refused():
    p = problem("power law", SHAPES["wide"])
    with pytest.raises(ValueError, match="NaN or Inf"):
        Gptq().quantize(p.weight, LayerStats(p.gram * torch.nan, 5))
