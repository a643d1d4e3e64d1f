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

from cloq.distributed import Processes
from cloq.models import Decoder, linear_shape, squared_gradients
from cloq.specs import LayerSpec, RunSpec
from cloq.store import Store

TOKENS = 12_288
"""Calibration tokens that the loss is followed back from."""


def output_weights(
    spec: RunSpec, decoder: Decoder, layers: Mapping[str, LayerSpec], own: Tensor, store: Store, processes: Processes
) -> dict[str, Tensor]:  # fmt: skip
    """`(1 − share) + share · h / mean(h)`, `(out,)`, by full name, `h` the squared gradients of a layer that has any; others count alike.

    own: this process's calibration tokens `(sequences, length)`. Of those of all processes some are taken at even distances, the same
    however many processes there are. What was found is kept in the store, so that a continued run goes on with the same to the last bit.
    """
    found = processes.on_first(store.kept_gradients)
    if found is None:
        names = [name for name in decoder.all_linears() if not layers[name].dense]
        total = processes.total({"sequences": len(own)})["sequences"]
        count = min(total, math.ceil(TOKENS / own.shape[1]))
        taken = {number * total // count for number in range(count)}
        mine = {number: row for row, number in enumerate(processes.share(torch.arange(total)).tolist()) if number in taken}
        if mine:
            found = squared_gradients(decoder, own[[*mine.values()]], spec.batch_tokens, frozenset(names), [*mine])
        else:
            found = {name: torch.zeros(linear_shape(decoder.model.get_submodule(name))[0], device=decoder.device) for name in names}
        processes.add(found.values())
        if processes.first:
            store.keep_gradients(found)
    share, means = spec.fisher, {name: float(squared.mean()) for name, squared in found.items()}
    return {
        name: 1 - share + share / means[name] * squared.to(decoder.device)
        for name, squared in found.items()
        if 0 < means[name] < math.inf
    }  # fmt: skip
