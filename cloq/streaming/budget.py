"""Where bits and ranks are spent: no more of either than was asked for, each layer with those that lower the loss the most.

Every layer has offers: a width, a rank, and what the loss is taken to rise by with them (`survey`). It takes one. All that they take
together minimises the sum of the losses under

    Σ bits · weights  ≤  what the widths may take        Σ rank · (out + in)  ≤  what the factors may take

where layers that are tied take the same width. That is an integer program, a few thousand variables for a large model, which
HiGHS solves by way of `scipy.optimize.milp`: equal offers give equal choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cloq.errors import SpecError

GAP = 1e-3
"""Relative distance from the optimum that is good enough; what offers say of the loss is not as exact."""

NODES = 20_000
"""Of the search tree, after which the best choice so far is taken. (A limit of seconds would give other choices on other machines.)"""

ROOM = 1e-9
"""Relative, for a sum in floating point that meets its limit exactly."""


class Offer(NamedTuple):
    """What a layer may get, and the rise of the loss that comes with it."""

    bits: int
    rank: int
    loss: float


def choose(
    offers: Mapping[str, Sequence[Offer]], shapes: Mapping[str, tuple[int, int]], tied: Iterable[Sequence[str]], bits: float, factors: float
) -> dict[str, Offer]:  # fmt: skip
    """One offer for every layer.

    offers: by layer, at least one each. shapes: `(out, in)`. tied: layers that take the same width. bits: of all codes together, at most.
    factors: parameters of all factors together, at most; `math.inf` for no limit. Raises `SpecError` if nothing is within the limits.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    wanted = [(name, offer) for name, several in offers.items() for offer in several]
    index = {name: row for row, name in enumerate(offers)}
    one_each = _sparse([(index[name], column, 1.0) for column, (name, _) in enumerate(wanted)], len(offers), len(wanted))
    constraints = [LinearConstraint(one_each, 1, 1)]
    weights = [float(math.prod(shapes[name])) * offer.bits for name, offer in wanted]
    sizes = [float(sum(shapes[name])) * offer.rank for name, offer in wanted]
    for row, limit in ((weights, bits), (sizes, factors)):
        if limit < math.inf:
            constraints.append(LinearConstraint(np.array([row]), -np.inf, limit * (1 + ROOM)))
    equal = _equal_widths(wanted, offers, tied)
    if equal:
        rows = 1 + max(row for row, _, _ in equal)
        constraints.append(LinearConstraint(_sparse(equal, rows, len(wanted)), 0, 0))
    losses = np.array([offer.loss for _, offer in wanted])
    found = milp(
        losses / (losses.max() or 1.0),
        constraints=constraints,
        integrality=np.ones(len(wanted)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    if found.x is None:
        raise SpecError(
            f"no choice of widths and ranks keeps to {bits:,.0f} bits and {factors:,.0f} parameters of factors; ask for more of them "
            f"({found.message.strip()})"
        )
    return {wanted[column][0]: wanted[column][1] for column in np.flatnonzero(found.x > 0.5)}


def _sparse(entries: Sequence[tuple[int, int, float]], rows: int, columns: int):
    from scipy.sparse import csc_array

    at_rows, at_columns, values = zip(*entries, strict=True)
    return csc_array((values, (at_rows, at_columns)), shape=(rows, columns))


def _equal_widths(
    wanted: Sequence[tuple[str, Offer]], offers: Mapping[str, Sequence[Offer]], tied: Iterable[Sequence[str]]
) -> list[tuple[int, int, float]]:  # fmt: skip
    """Entries of a matrix whose product with a choice is 0 where tied layers have the same width: a row for each width and pair."""
    columns: dict[tuple[str, int], list[int]] = {}
    for column, (name, offer) in enumerate(wanted):
        columns.setdefault((name, offer.bits), []).append(column)
    entries, row = [], 0
    for first, *others in ([name for name in group if name in offers] for group in tied if any(name in offers for name in group)):
        for other in others:
            for width in sorted({offer.bits for name in (first, other) for offer in offers[name]}):
                entries += [(row, column, 1.0) for column in columns.get((first, width), [])]
                entries += [(row, column, -1.0) for column in columns.get((other, width), [])]
                row += 1
    return entries
