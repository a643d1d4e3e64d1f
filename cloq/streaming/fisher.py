"""What the outputs of a layer count: the loss's Fisher information, found once for a run.

The factors undo a layer's error in the norm `‖R (E − B A) S‖`: inputs count as far as the calibration text moves them (`S`), outputs as far
as the loss depends on them (`RᵀR`). That is the layer's block of the Fisher information if both are taken to be independent (K-FAC, Martens
and Grosse, arXiv:1503.05671), whose output side is kept as its leading eigenvectors and the diagonal of the rest: of queries and keys,
whose products attention takes, most of it lies in a few directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cloq.algebra.moments import SecondMoment
from cloq.models import Decoder, followed, linear_shape, second_moments
from cloq.specs import LayerSpec, RunSpec
from cloq.streaming.device import place_aside, waiting_in
from cloq.streaming.distributed import Processes
from cloq.streaming.store import Store
from cloq.types import OutputNorm

TOKENS = 4_096
"""Calibration tokens that the loss is followed back from."""

DIRECTIONS = 16
"""Leading eigenvectors of a layer's output side. More add next to nothing."""


def sampled(own: Tensor, processes: Processes) -> dict[int, int]:
    """Of this process's calibration tokens `(sequences, length)`, those whose loss is followed back: number among all → row.

    Of those of all processes some are taken at even distances, the same however many processes there are; the first process has some.
    """
    total = processes.total({"sequences": len(own)})["sequences"]
    count = min(total, math.ceil(TOKENS / own.shape[1]))
    taken = {number * total // count for number in range(count)}
    return {number: row for row, number in enumerate(processes.share(torch.arange(total)).tolist()) if number in taken}


def moments_of(
    spec: RunSpec, decoder: Decoder, layers: Mapping[str, LayerSpec], own: Tensor, store: Store, processes: Processes
) -> dict[str, SecondMoment]:  # fmt: skip
    """The second moments of the loss's gradients with respect to the outputs of the layers that are quantized, by full name: means over
    tokens.

    own: this process's calibration tokens `(sequences, length)`. What was found is kept in the store, so that a continued run goes on with
    the same to the last bit.
    """
    found = processes.on_first(store.kept_gradients)
    if found is None:
        names = [name for name in decoder.all_linears() if not layers[name].dense]
        mine = sampled(own, processes)
        if mine:
            given = len(decoder.blocks) * len(mine) * followed(own.shape[1]) * decoder.bytes_of_a_token
            aside = waiting_in(place_aside(spec, given, processes.here), store.folder)
            found = second_moments(decoder, own[[*mine.values()]], spec.batch_tokens, frozenset(names), [*mine], aside)
        else:
            found = {name: SecondMoment.zeros(linear_shape(decoder.model.get_submodule(name))[0], decoder.device) for name in names}
        processes.add(part for moment in found.values() for part in (moment.diagonal, moment.sketch))
        tokens = processes.total({"tokens": len(mine)})["tokens"] * followed(own.shape[1])
        found = {name: moment / tokens for name, moment in found.items()}
        if processes.first:
            store.keep_gradients(found)
    return {name: moment.to(decoder.device) for name, moment in found.items()}


def output_norms(moments: Mapping[str, SecondMoment], share: float) -> dict[str, OutputNorm]:
    """`(1 − share) I + share · H / mean(diag H)` by full name, `H` the second moment of a layer that has any; of others all outputs count
    alike."""
    means = {name: float(moment.diagonal.mean()) for name, moment in moments.items()}
    return {name: _norm(moment / means[name], share) for name, moment in moments.items() if 0 < means[name] < math.inf}


def _norm(moment: SecondMoment, share: float) -> OutputNorm:
    directions = moment.leading(DIRECTIONS)
    rest = (moment.diagonal - directions.square().sum(1)).clamp_min(0)
    return OutputNorm(1 - share + share * rest, math.sqrt(share) * directions)
