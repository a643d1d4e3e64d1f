"""What the outputs of a layer count: the diagonal of the loss's Fisher information, found once for a run.

The factors undo a layer's error in the norm `‖D^{1/2} (E − B A) S‖`: inputs count as far as the calibration text moves them (`S`), outputs
as far as the loss depends on them (`D`). That is the layer's block of the Fisher information if both are taken to be independent (K-FAC,
Martens and Grosse, arXiv:1503.05671), with the diagonal of its output side in the place of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cloq.models import Decoder, followed, given_bytes, linear_shape, squared_gradients
from cloq.specs import LayerSpec, RunSpec
from cloq.streaming.device import place_aside, waiting_in
from cloq.streaming.distributed import Processes
from cloq.streaming.store import Store

TOKENS = 12_288
"""Calibration tokens that the loss is followed back from."""


def sampled(own: Tensor, processes: Processes) -> dict[int, int]:
    """Of this process's calibration tokens `(sequences, length)`, those whose loss is followed back: number among all → row.

    Of those of all processes some are taken at even distances, the same however many processes there are; the first process has some.
    """
    total = processes.total({"sequences": len(own)})["sequences"]
    count = min(total, math.ceil(TOKENS / own.shape[1]))
    taken = {number * total // count for number in range(count)}
    return {number: row for row, number in enumerate(processes.share(torch.arange(total)).tolist()) if number in taken}


def squared_gradients_of(
    spec: RunSpec, decoder: Decoder, layers: Mapping[str, LayerSpec], own: Tensor, store: Store, processes: Processes
) -> dict[str, Tensor]:  # fmt: skip
    """The loss's squared gradients with respect to each output of the layers that are quantized, `(out,)` by full name: means over tokens.

    own: this process's calibration tokens `(sequences, length)`. What was found is kept in the store, so that a continued run goes on with
    the same to the last bit.
    """
    found = processes.on_first(store.kept_gradients)
    if found is None:
        names = [name for name in decoder.all_linears() if not layers[name].dense]
        mine = sampled(own, processes)
        if mine:
            given = given_bytes(decoder, len(mine) * followed(own.shape[1]))
            aside = waiting_in(place_aside(spec, given, processes.here), store.folder)
            found = squared_gradients(decoder, own[[*mine.values()]], spec.batch_tokens, frozenset(names), [*mine], aside)
        else:
            found = {name: torch.zeros(linear_shape(decoder.model.get_submodule(name))[0], device=decoder.device) for name in names}
        processes.add(found.values())
        tokens = processes.total({"tokens": len(mine)})["tokens"] * followed(own.shape[1])
        found = {name: squared / tokens for name, squared in found.items()}
        if processes.first:
            store.keep_gradients(found)
    return {name: squared.to(decoder.device) for name, squared in found.items()}


def output_weights(squared: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """`(1 − share) + share · h / mean(h)`, `(out,)`, by full name, `h` the squared gradients of a layer that has any; of others all outputs
    count alike."""
    means = {name: float(values.mean()) for name, values in squared.items()}
    return {name: 1 - share + share / means[name] * values for name, values in squared.items() if 0 < means[name] < math.inf}
