"""What the layers of one block are given, over the batches of all processes, and what an expert is shown besides."""

from __future__ import annotations

from functools import partial

from torch import nn

from cloq.algebra.drift import Drift, sums_of
from cloq.calibration import adding_layers, gram_matrices, paired_statistics, shared_inputs, summed, topped_up
from cloq.models import Decoder, Forwards, Reference, hooks_on, linear_shape
from cloq.streaming.distributed import ALONE, Processes
from cloq.types import LayerStats

ENOUGH = 2
"""Tokens for each input of an expert's layer with which its own Gram matrix is enough; measured in docs/log.md."""

SHOWN = 4
"""Tokens for each input that an expert with fewer is shown besides, or all there are."""


def groups_of(decoder: Decoder, index: int, linears: dict[str, nn.Module], forwards: Forwards, processes: Processes) -> list[list[str]]:
    """Those of a block's layers together that share an input, as the first process sees them."""
    at = 1 if decoder.experts(index) and len(forwards.batches) > 1 else 0  # one sequence may reach few experts
    return processes.on_first(lambda: shared_inputs(lambda: forwards.run(at), linears))


def statistics(
    decoder: Decoder, linears: dict[str, nn.Module], groups: list[list[str]], forwards: Forwards,
    processes: Processes = ALONE, reference: Reference | None = None,
) -> tuple[dict[str, LayerStats], dict[str, Drift]]:  # fmt: skip
    """Gram matrices of each group's input, by its first layer, and beside a reference the drift of every layer.

    forwards: of this process's own batches. A layer that no token reached has a zero matrix. Raises `ModelError` for activations that are
    not finite.
    """
    names, positions = [name for group in groups for name in group], range(len(forwards.batches))
    if reference is None:
        runs = (partial(forwards.run, position, names) for position in positions)
        own, drifts = gram_matrices(runs, linears, [group[0] for group in groups]), {}
    else:
        watched = hooks_on(linears, adding_layers(groups, reference.joined))
        pairs = ((partial(forwards.run, position, names, watched), partial(reference.seen, position)) for position in positions)
        own, drifts = paired_statistics(pairs, linears, groups, reference.joined, decoder.expert_layers)
    if processes.size > 1:
        own = summed(own, processes.total, processes.add)
        processes.add(sums_of(drifts))
    return own, drifts


def top_up_experts(
    decoder: Decoder, linears: dict[str, nn.Module], forwards: Forwards, stats: dict[str, LayerStats], processes: Processes = ALONE
) -> dict[str, LayerStats]:  # fmt: skip
    """The statistics of those experts' layers that saw fewer than `ENOUGH` tokens for each of their inputs: topped up to that many with a
    mean over tokens of the layer, wherever the router sent them, as this expert would treat them."""
    experts = decoder.expert_layers
    least = {name: ENOUGH * linear_shape(linears[name])[1] for name in stats}
    starved = [name for name, seen in stats.items() if name in experts and seen.n_tokens < least[name]]
    if not starved:
        return {}
    alike: dict[object, list[str]] = {}  # experts are shown the same tokens: of those that see the tokens themselves one stands for all
    for name in starved:
        alike.setdefault(name if experts[name].inner else experts[name].experts, []).append(name)
    tokens = processes.total({"tokens": sum(batch.hidden.shape[:2].numel() for batch in forwards.batches)})["tokens"]
    with decoder.showing(starved, tokens, SHOWN // ENOUGH * max(least[name] for name in starved)):
        others, _ = statistics(decoder, linears, [names[:1] for names in alike.values()], forwards.anew(), processes)
    return {name: topped_up(stats[name], others[names[0]], least[name]) for names in alike.values() for name in names}
