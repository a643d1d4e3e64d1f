"""The corrected target against least squares on the activations themselves."""

import pytest
import torch

from cloq.algebra.drift import DAMPINGS, Drift, corrected, corrected_by_heldout
from cloq.types import LayerStats

OUT, IN, TOKENS = 10, 16, 200


@pytest.fixture(scope="module")
def paired():
    """Inputs and streams of the original and of the compressed model, float64, one token per row, and the layer's weight."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(TOKENS, IN, generator=generator, dtype=torch.float64) @ torch.randn(IN, IN, generator=generator, dtype=torch.float64)
    inputs = true + 0.3 * torch.randn(TOKENS, IN, generator=generator, dtype=torch.float64) + 0.1 * true.roll(1, 1)
    streams = torch.randn(2, TOKENS, OUT, generator=generator, dtype=torch.float64)
    return true, inputs, streams[0], streams[0] + 0.2 * streams[1] + inputs[:, :OUT], torch.randn(OUT, IN, generator=generator)


def drift_of(paired, stream=True):
    true, inputs, true_stream, its_stream, weight = paired
    if not stream:
        return Drift(((true - inputs).T @ inputs).float())
    sums = (true_stream + true @ weight.double().T) - (its_stream + inputs @ weight.double().T)
    return Drift(sums=(sums.T @ inputs).float())


def statistics(inputs):
    return LayerStats((inputs.T @ inputs).float(), len(inputs))


def deviation(paired, weight, stream=True):
    true, inputs, true_stream, its_stream, original = paired
    wanted = true @ original.double().T + (true_stream - its_stream if stream else 0.0)
    return float((wanted - inputs @ weight.double().T).square().sum())


@pytest.mark.parametrize("stream", (True, False))
def test_the_whole_step_is_the_least_squares_answer(paired, stream, monkeypatch):
    monkeypatch.setattr("cloq.algebra.drift.DAMPING", 0.0)
    true, inputs, true_stream, its_stream, weight = paired
    wanted = true @ weight.double().T + (true_stream - its_stream if stream else 0.0)
    best = torch.linalg.lstsq(inputs, wanted).solution.T.float()
    torch.testing.assert_close(corrected(weight, statistics(inputs), drift_of(paired, stream), 1.0), best, rtol=1e-3, atol=1e-3)


def test_every_share_is_nearer_than_none(paired):
    found = [deviation(paired, corrected(paired[4], statistics(paired[1]), drift_of(paired), share)) for share in (0.0, 0.25, 0.5, 1.0)]
    assert found == sorted(found, reverse=True) and found[-1] < 0.8 * found[0]


def test_what_is_quantized_for_the_target_is_quantized_for_the_outputs(paired, monkeypatch):
    """`‖s° + W x° − s − Ŵ x‖² − ‖(W* − Ŵ) S‖²` is the same for every `Ŵ`."""
    monkeypatch.setattr("cloq.algebra.drift.DAMPING", 0.0)
    stats = statistics(paired[1])
    target = corrected(paired[4], stats, drift_of(paired), 1.0).double()
    found = []
    for step in (0.5, 0.25):
        rounded = (paired[4].double() / step).round() * step
        found.append(deviation(paired, rounded) - float((((target - rounded) @ stats.gram.double()) * (target - rounded)).sum()))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_no_drift_and_no_share_change_nothing(paired):
    _, inputs, _, _, weight = paired
    assert torch.equal(corrected(weight, statistics(inputs), Drift(torch.zeros(IN, IN)), 1.0), weight)
    assert torch.equal(corrected(weight, statistics(inputs), Drift(sums=torch.zeros(OUT, IN)), 1.0), weight)
    assert torch.equal(corrected(weight, statistics(inputs), drift_of(paired), 0.0), weight)


def halves(paired, noise=0.0):
    """The same layer on two sets of tokens; of the first, the streams are noisy."""
    generator = torch.Generator().manual_seed(1)
    true, inputs, true_stream, its_stream, weight = paired
    noisy = true_stream + noise * torch.randn(true_stream.shape, generator=generator, dtype=torch.float64)
    few, others = slice(None, 40), slice(40, None)
    return (*(part[few] for part in (true, inputs, noisy, its_stream)), weight), (
        *(part[others] for part in (true, inputs, true_stream, its_stream)),
        weight,
    )


@pytest.mark.parametrize("stream", (True, False))
@pytest.mark.parametrize("noise", (0.0, 1.0, 4.0))
def test_a_chosen_correction_is_the_best_of_all_for_other_tokens(paired, stream, noise):
    seen, unseen = halves(paired, noise)
    weight, stats = paired[4], statistics(seen[1])
    found = corrected_by_heldout(weight, stats, drift_of(seen, stream), statistics(unseen[1]), drift_of(unseen, stream))

    def step(damping):
        damped = stats.gram.double() + damping * stats.gram.double().diagonal().mean() * torch.eye(IN)
        return drift_of(seen, stream).step(weight).double() @ damped.inverse()

    shares = torch.linspace(0, 2, 201).tolist()
    tried = [deviation(unseen, weight + share * step(damping), stream) for damping in DAMPINGS for share in shares]
    assert deviation(unseen, found, stream) == pytest.approx(min(tried), rel=1e-3)
    assert min(tried) < deviation(unseen, corrected(weight, stats, drift_of(seen, stream), 1.0), stream)


def test_noise_is_damped(paired):
    """What the tokens say of the stream is mostly noise: little of it is believed."""
    seen, unseen = halves(paired, noise=4.0)
    weight, mine, others = paired[4], (statistics(seen[1]), drift_of(seen)), (statistics(unseen[1]), drift_of(unseen))
    moved, whole = (found - weight for found in (corrected_by_heldout(weight, *mine, *others), corrected(weight, *mine, 1.0)))
    assert float(moved.norm()) < 0.5 * float(whole.norm())


def test_a_step_that_does_not_help_others_is_not_taken(paired):
    seen, unseen = halves(paired)
    mine = (paired[4], statistics(seen[1]), drift_of(seen))
    away, nobody = Drift(sums=-drift_of(unseen).sums), (LayerStats(torch.zeros(IN, IN), 0), Drift(torch.zeros(IN, IN)))
    assert torch.equal(corrected_by_heldout(*mine, statistics(unseen[1]), away), paired[4])
    assert torch.equal(corrected_by_heldout(*mine, *nobody), paired[4])


def test_an_input_that_is_always_zero_is_no_trouble(paired):
    true, inputs, true_stream, its_stream, weight = paired
    dead = torch.ones(IN, dtype=torch.float64)
    dead[[0, 5]] = 0
    found = corrected(weight, statistics(inputs * dead), drift_of((true, inputs * dead, true_stream, its_stream, weight)), 0.5)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found[:, [0, 5]], weight[:, [0, 5]])


def wide(seed, noise):
    """A layer of 600 outputs on 60 and on 400 tokens, whose stream is noisy; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mix, weight, wrong = normal(24, 24), normal(600, 24), normal(24, 600)

    def draw(tokens):
        true = normal(tokens, 24) @ mix
        inputs, stream = true + 0.3 * normal(tokens, 24), normal(tokens, 600)
        return true, inputs, stream, stream + inputs @ wrong + noise * normal(tokens, 600), weight.float()

    return draw(60), draw(400)


@pytest.mark.parametrize("noise", (10.0, 30.0))
def test_few_mixtures_of_many_rows_choose_a_damping_that_is_hardly_worse(noise, monkeypatch):
    gained = []
    for seed in range(5):
        seen, unseen = wide(seed, noise)
        weight, mine, others = seen[4], (statistics(seen[1]), drift_of(seen)), (statistics(unseen[1]), drift_of(unseen))
        by_mixtures = corrected_by_heldout(weight, *mine, *others)
        assert torch.equal(by_mixtures, corrected_by_heldout(weight, *mine, *others))
        with monkeypatch.context() as patch:
            patch.setattr("cloq.algebra.drift.MIXTURES", 600)
            by_all = corrected_by_heldout(weight, *mine, *others)
        before, found, best = (deviation(unseen, w) for w in (weight, by_mixtures, by_all))
        assert best <= found < before
        gained.append((before - found) / (before - best))
    assert min(gained) > 0.95 and sum(gained) / len(gained) > 0.98
