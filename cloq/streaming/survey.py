"""What every layer's rounding costs the loss, by width and rank, before anything is quantized: what `budget` chooses from.

In second order a layer's error `E` raises the loss by `½ Σ_o h_o ‖E_o S‖²` for each token, with `h` the loss's squared gradients at its
outputs (`fisher`) and `S` its inputs, in the original model (K-FAC, Martens and Grosse, arXiv:1503.05671, with the diagonal of the
output side). Factors of rank r leave of it what lies behind the r largest eigenvalues of `D^{1/2} E G Eᵀ D^{1/2}`, `D = diag(h)`: one
decomposition for each width says it for all ranks. The codes are those of a rounding that knows of no factors. What rounds win is
foreseen: their codes hold what the first factors leave of the weight, on grids that are finer by as much, so that the error is multiplied
by the share of the weight's size that is left (docs/log.md has it beside what rounds then did). What layers do to each other is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cloq import quantizers
from cloq.algebra import lowrank
from cloq.initializers.cloq import size_left
from cloq.models import Decoder, Forwards, Kinds, Room, linear_shape
from cloq.precision import full_precision
from cloq.specs import LayerSpec, RunSpec, mixes, ruled
from cloq.streaming.budget import Offer, choose
from cloq.streaming.capture import groups_of, statistics, top_up_experts
from cloq.streaming.distributed import Processes, shared_out
from cloq.streaming.fisher import sampled
from cloq.streaming.memory import spare_memory
from cloq.streaming.store import Store
from cloq.types import GivenBase, LayerStats

WIDTHS = (2, 3, 4)
"""That a mean may be made of."""

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
"""Of the rank that was asked for, what a layer may get."""


@dataclass(frozen=True, eq=False)
class Survey:
    """losses: by layer, `(widths, ranks)` of `possible`, in nats per token. tied: layers that servers hold as one."""

    losses: dict[str, Tensor]
    tied: list[list[str]]


def budgeted(
    spec: RunSpec, decoder: Decoder, layers: Mapping[str, LayerSpec], own: Tensor, squared: Mapping[str, Tensor], store: Store,
    processes: Processes, given: GivenBase | None = None,
) -> dict[str, LayerSpec]:  # fmt: skip
    """The layers with the widths and ranks that the run's means are best spent on.

    Those that a rule names keep what it says, and are no part of the mean. own: this process's calibration tokens. squared: the loss's
    squared gradients, as of `fisher.squared_gradients_of`. What was found is kept in the store.
    """
    kept = processes.on_first(store.kept_survey)
    if kept is None:
        found = survey(spec, decoder, layers, own, squared, processes, given)
        if processes.first:
            store.keep_survey(found.losses, found.tied)
    else:
        found = Survey(*kept)
    chosen = processes.on_first(lambda: spend(spec, layers, _shapes(decoder, layers), found))
    return {name: layer.replace(quant=layer.quant.replace(bits=chosen[name].bits), rank=chosen[name].rank) if name in chosen else layer
            for name, layer in layers.items()}  # fmt: skip


def spend(
    spec: RunSpec, layers: Mapping[str, LayerSpec], shapes: Mapping[str, tuple[int, int]], found: Survey
) -> dict[str, Offer]:  # fmt: skip
    """An offer for every layer that is quantized, within the run's means over those that no rule names."""
    offers = {}
    for name, losses in found.losses.items():
        widths, ranks = possible(spec, name, layers[name], shapes[name])
        offers[name] = [Offer(b, r, float(losses[i, j])) for i, b in enumerate(widths) for j, r in enumerate(ranks)]
    bits = sum(math.prod(shapes[name]) * (spec.mean_bits if mixes(spec, name) else layers[name].quant.bits) for name in offers)
    factors = sum(sum(shapes[name]) * min(layers[name].rank, *shapes[name]) for name in offers)
    tied = [[name for name in group if mixes(spec, name)] for group in found.tied]
    return choose(offers, shapes, tied, bits, factors)


def possible(spec: RunSpec, name: str, layer: LayerSpec, shape: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Widths and ranks that a layer may get, each in ascending order."""
    widths = list(WIDTHS) if mixes(spec, name) else [layer.quant.bits]
    shares = SHARES if spec.adaptive_rank and not ruled(spec, name, "rank") else (1.0,)
    return widths, sorted({min(max(1, round(share * layer.rank)), *shape) for share in shares})


def _shapes(decoder: Decoder, layers: Mapping[str, LayerSpec]) -> dict[str, tuple[int, int]]:
    return {name: linear_shape(decoder.model.get_submodule(name)) for name, layer in layers.items() if not layer.dense}


def survey(
    spec: RunSpec, decoder: Decoder, layers: Mapping[str, LayerSpec], own: Tensor, squared: Mapping[str, Tensor], processes: Processes,
    given: GivenBase | None = None,
) -> Survey:  # fmt: skip
    """Goes once through the original model, on those tokens whose loss was followed back (`fisher.sampled`)."""
    mine = sampled(own, processes)
    batches = decoder.enter(own[[*mine.values()]], spec.batch_tokens, True) if mine else []
    look = _Look(spec, decoder, layers, squared, processes, given)
    kinds, room = Kinds(decoder, False, processes.on_first), spare_memory(decoder.device, processes.here)
    losses: dict[str, Tensor] = {}
    tied: list[list[str]] = []
    for index in range(len(decoder.blocks)):
        decoder.load_block(index)
        forwards = Forwards(decoder, index, batches, kinds.of(index, batches).ends, Room(room), final=decoder.linears(index))
        wanted = {name: module for name, module in decoder.linears(index).items() if not layers[name].dense}
        groups = groups_of(decoder, index, wanted, forwards, processes) if wanted else []
        losses |= look.losses(index, forwards, groups)
        tied += _tied(decoder, groups)
        if index < len(decoder.blocks) - 1:
            forwards.propagate()
        decoder.drop_block(index)
    return Survey({name: losses[name] for name in layers if name in losses}, tied)


@dataclass(frozen=True, eq=False)
class _Look:
    """What is done with every block: arguments as of `survey`."""

    spec: RunSpec
    decoder: Decoder
    layers: Mapping[str, LayerSpec]
    squared: Mapping[str, Tensor]
    processes: Processes
    given: GivenBase | None

    def losses(self, index: int, forwards: Forwards, groups: list[list[str]]) -> dict[str, Tensor]:
        """`(widths, ranks)` by layer, the same on all processes, each of which finds those of its own layers."""
        linears, processes = self.decoder.linears(index), self.processes
        shapes = {name: linear_shape(module) for name, module in linears.items()}
        found = {}
        for together in self.decoder.rounds(groups, one_by_one=True):
            stats, _ = statistics(self.decoder, linears, together, forwards, processes)
            stats |= top_up_experts(self.decoder, linears, forwards, stats, processes)
            owner = shared_out(together, {name: shapes[name] for group in together for name in group}, processes.size)
            for group in together:
                seen = stats.pop(group[0])
                for name in group:
                    widths, ranks = possible(self.spec, name, self.layers[name], shapes[name])
                    if owner[name] == processes.rank:
                        weight = self.decoder.weight(name, linears[name])
                        left = torch.stack([self._left(name, weight, seen, width, ranks) for width in widths])
                        found[name] = left * self._won(weight, seen, ranks)
                    else:
                        found[name] = torch.zeros(len(widths), len(ranks), dtype=torch.float64)
        processes.add(found.values())
        return found

    @full_precision()
    def _left(self, name: str, weight: Tensor, seen: LayerStats, width: int, ranks: Sequence[int]) -> Tensor:
        """The loss by rank, with the closed form's factors."""
        undone = ranks if self.spec.lora.init != "zero" else [0] * len(ranks)
        return left_behind(weight - self._rounded(name, weight, seen, width), seen, self.squared[name], undone)

    @full_precision()
    def _won(self, weight: Tensor, seen: LayerStats, ranks: Sequence[int]) -> Tensor:
        """By rank: what rounds are foreseen to leave of it."""
        if self.spec.lora.rounds_on(given=self.given is not None) == 0 or _tokens(seen) == 0:
            return torch.ones(len(ranks), dtype=torch.float64)
        return size_left(weight, seen.gram, ranks)

    def _rounded(self, name: str, weight: Tensor, seen: LayerStats, width: int) -> Tensor:
        if self.given:
            return self.given.weight(name).dequantize().to(weight)
        if _tokens(seen) == 0:
            return weight  # whatever its codes, they cost nothing that the survey could see
        return quantizers.from_spec(self.layers[name].quant.replace(bits=width)).quantize(weight, seen).dequantize()


def _tokens(seen: LayerStats) -> int:
    return seen.n_tokens + seen.borrowed


def left_behind(error: Tensor, seen: LayerStats, squared: Tensor, ranks: Sequence[int]) -> Tensor:
    """By rank: `½ Σ_o h_o ‖(E − B A)_o S‖²` for each token with the best factors, float64; 0 where no token came.

    error: `(out, in)`. squared: `(out,)`, the mean of the squared gradients over tokens. ranks: 0, which is no factors, to `min(out, in)`.
    """
    if _tokens(seen) == 0:
        return torch.zeros(len(ranks), dtype=torch.float64)
    weighted = squared.to(error).clamp_min(0).sqrt()[:, None] * error
    found = lowrank.top_eigenvectors(weighted, seen.gram, max(1, *ranks))
    values = found.values.double().clamp_min(0)
    left = [0.0 if rank == min(error.shape) else max(found.trace - float(values[:rank].sum()), 0.0) for rank in ranks]
    return torch.tensor(left, dtype=torch.float64) / (2 * _tokens(seen))


def _tied(decoder: Decoder, groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Layers that share an input, which servers hold as one matrix; all of a block's experts, which they hold as one tensor."""
    found: dict[object, list[str]] = {}
    for group in groups:
        for name in group:
            expert = decoder.expert_layers.get(name)
            found.setdefault(expert.experts if expert else tuple(group), []).append(name)
    return [names for names in found.values() if len(names) > 1]
