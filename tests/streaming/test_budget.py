"""The choice of widths and ranks: against all choices there are, tied layers, and what cannot be."""

import itertools
import math
import random

import pytest

from cloq.errors import SpecError
from cloq.streaming.budget import GAP, Offer, choose


def problem(seed: int, layers: int = 4) -> tuple[dict[str, list[Offer]], dict[str, tuple[int, int]]]:
    """Offers whose loss falls with bits and rank, in a way of their own for each layer."""
    draw = random.Random(seed)
    shapes = {f"layer{i}": (draw.randint(4, 40), draw.randint(4, 40)) for i in range(layers)}
    offers = {}
    for name in shapes:
        size, steep, flat = (draw.random() for _ in range(3))
        offers[name] = [Offer(b, r, (0.1 + size) * 4.0 ** (-b * (0.5 + steep)) * math.exp(-r * flat)) for b in (2, 3, 4) for r in (1, 2, 4)]
    return offers, shapes


def taken(chosen: dict[str, Offer], shapes: dict[str, tuple[int, int]]) -> tuple[float, float, float]:
    """Bits, parameters of factors, and the loss."""
    bits = sum(offer.bits * math.prod(shapes[name]) for name, offer in chosen.items())
    return bits, sum(offer.rank * sum(shapes[name]) for name, offer in chosen.items()), sum(offer.loss for offer in chosen.values())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tied", [[], [["layer0", "layer1"]], [["layer1", "layer3", "layer2"]]])
def test_no_choice_within_the_limits_is_better(seed, tied):
    offers, shapes = problem(seed)
    bits, factors = 2.6 * sum(math.prod(s) for s in shapes.values()), 2.2 * sum(sum(s) for s in shapes.values())
    chosen = choose(offers, shapes, tied, bits, factors)

    def allowed(choice: dict[str, Offer]) -> bool:
        equal = all(len({choice[name].bits for name in group}) == 1 for group in tied)
        return equal and taken(choice, shapes)[0] <= bits and taken(choice, shapes)[1] <= factors

    every = (dict(zip(offers, choice, strict=True)) for choice in itertools.product(*offers.values()))
    best = min(taken(choice, shapes)[2] for choice in every if allowed(choice))
    assert allowed(chosen) and all(chosen[name] in several for name, several in offers.items())
    assert best <= taken(chosen, shapes)[2] <= best * (1 + GAP) + 1e-12
    assert len({offer.bits for offer in chosen.values()}) > 1  # the mean is made of several


def test_a_limit_that_is_met_exactly_is_no_obstacle():
    shapes = {f"layer{i}": (3, 7) for i in range(9)}
    offers = {name: [Offer(2, 5, 1.0), Offer(3, 5, 0.4)] for name in shapes}
    chosen = choose(offers, shapes, [], (2 + 1 / 3) * 9 * 21, 5 * 9 * 10)
    assert sum(offer.bits == 3 for offer in chosen.values()) == 3


def test_factors_without_a_limit():
    offers, shapes = problem(0)
    chosen = choose(offers, shapes, [], 2 * sum(math.prod(s) for s in shapes.values()), math.inf)
    assert all((offer.bits, offer.rank) == (2, 4) for offer in chosen.values())


def test_layers_that_cost_nothing_and_ties_with_layers_that_are_not_there():
    offers = {"a": [Offer(2, 1, 0.0), Offer(3, 1, 0.0)], "b": [Offer(2, 1, 0.0)]}
    chosen = choose(offers, {"a": (4, 4), "b": (4, 4)}, [["c", "a", "b"], ["d"]], 64, 100)
    assert chosen["a"].bits == chosen["b"].bits == 2


def test_what_cannot_be_is_said():
    offers, shapes = problem(1)
    with pytest.raises(SpecError, match="no choice of widths and ranks keeps to 10 bits"):
        choose(offers, shapes, [], 10, math.inf)


def test_equal_offers_give_equal_choices():
    offers, shapes = problem(3, layers=12)
    limits = 2.5 * sum(math.prod(s) for s in shapes.values()), 2 * sum(sum(s) for s in shapes.values())
    assert choose(offers, shapes, [], *limits) == choose(offers, shapes, [], *limits)
