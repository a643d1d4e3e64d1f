"""A decoder-only model as a row of blocks: its layers by name, and tokens on their way in, through the blocks, and out.

The model's own forward is what runs on the way in and out, with every block's `forward` stood in for; so positions, masks, rotary tables,
per-layer variants, embedding scales and logit caps are whatever the model says they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from cloq.calibration.hooks import Enough
from cloq.linears import fused_experts, is_linear, linear_shape, routers
from cloq.models.experts import ExpertLayer, Experts, experts_of, rounds
from cloq.models.probe import returned_values
from cloq.models.streamed import Returned, StreamedModel
from cloq.models.waiting import Waiting
from cloq.precision import forward_precision

Call = tuple[tuple, dict[str, Any]]
"""Positional and keyword arguments of a block's forward, after the hidden states."""

GRAM_BYTES = 4 << 30
"""What the Gram matrices of experts side by side may take. Those that do not fit wait for another forward, which changes nothing but time:
no expert sees what another one makes."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its way through the blocks. hidden: `(sequences, tokens, width)`, where it waits for its forwards.
    calls: further arguments, for each block."""

    hidden: Tensor
    calls: list[Call]
    waiting: Waiting = field(default_factory=Waiting)

    def onwards(self, returned: Tensor) -> Batch:
        """The same behind a block that returned this, in place of this one: what it held may be gone."""
        return replace(self, hidden=self.waiting.keep(returned, self.hidden))


class Decoder(StreamedModel):
    """A causal language model, streamed block by block from a folder; opened as a `StreamedModel` is."""

    # -- its layers, without any weight --------------------------------------------------------------------------------

    def linears(self, index: int) -> dict[str, nn.Module]:
        """Linear layers of a block by full name, in the order of definition, every expert's among them, without the routers of experts."""
        block, left_out = self.blocks[index], set(routers(self.blocks[index]))
        return {f"{self.block_name(index)}.{n}": m for n, m in block.named_modules() if is_linear(m) and n not in left_out}

    def all_linears(self) -> list[str]:
        """Full names of the linear layers of all blocks, in order."""
        return [name for index in range(len(self.blocks)) for name in self.linears(index)]

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """`(out, in)` of the linear layers of all blocks, by full name, in order."""
        return {name: linear_shape(module) for index in range(len(self.blocks)) for name, module in self.linears(index).items()}

    def experts(self, index: int) -> dict[str, Experts]:
        """A block's experts that were taken apart, by full name."""
        return experts_of(self.blocks[index], self.block_name(index))

    @functools.cached_property
    def expert_layers(self) -> dict[str, ExpertLayer]:
        """Of all blocks, by full name."""
        every = experts_of(self.model)
        return {
            f"{path}.{name}": ExpertLayer(path, s.expert, s.leaf == "down_proj") for path, e in every.items() for name, s in e.slots.items()
        }

    def routers(self, index: int) -> list[str]:
        """Full names of a block's plain linear layers that choose or weigh experts; see `cloq.linears.routers`."""
        return [f"{self.block_name(index)}.{name}" for name in routers(self.blocks[index])]

    def fused_experts(self, index: int) -> list[str]:
        """Full names of a block's weights that belong to no linear layer and could not be taken apart; see
        `cloq.linears.fused_experts`."""
        return [f"{self.block_name(index)}.{name}" for name in fused_experts(self.blocks[index])]

    # -- the way in, through, and out ----------------------------------------------------------------------------------

    @torch.no_grad()
    def enter(
        self, tokens: Tensor, batch_tokens: int, first_alone: bool = False, waiting: Waiting | None = None
    ) -> list[Batch]:  # fmt: skip
        """Runs the model's own way in on `tokens (sequences, length)` and returns what the first block gets and what every
        block is called with, in micro-batches of about `batch_tokens` tokens. Equal arguments of different batches are kept once.

        first_alone: the first sequence is a micro-batch of its own, on which what is found out by running a block is found out cheaply.
        waiting: where hidden states are between forwards, by default where forwards leave them.
        """
        size = max(1, batch_tokens // tokens.shape[1])
        chunks = [*tokens[:1].split(1), *tokens[1:].split(size)] if first_alone and len(tokens) > 1 else tokens.split(size)
        kept: list[Tensor] = []
        with self.outer(head=False):
            self.check_streamable()
            return [self._enter_one(chunk.to(self.device), kept, waiting or Waiting()) for chunk in chunks]

    def _enter_one(self, tokens: Tensor, kept: list[Tensor], waiting: Waiting) -> Batch:
        first: list[Tensor] = []
        calls: list[Call] = []

        def record(index: int, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
            if index == 0:
                first.append(hidden)
            calls.append((_intern(args, kept), _intern(kwargs, kept)))
            if index == len(self.blocks) - 1:
                raise Enough
            return hidden

        self.go_through(record, tokens, self._returned)
        return Batch(waiting.keep(first[0]), calls, waiting)

    def run_block(self, index: int, batch: Batch, gradients: bool = False) -> Tensor:
        """The block's output hidden states for one micro-batch. Needs `load_block(index)`. gradients: can be followed back to the hidden
        states that go in, where these ask for it."""
        args, kwargs = batch.calls[index]
        try:
            with torch.set_grad_enabled(gradients), forward_precision(self.device):
                output = self.blocks[index](batch.hidden.to(self.device, non_blocking=True), *args, **kwargs)
        finally:  # hooks may end a forward
            batch.waiting.rest(batch.hidden)
        return output[0] if isinstance(output, (tuple, list)) else output

    def rounds(self, groups: list[list[str]], one_by_one: bool) -> list[list[list[str]]]:
        """Groups of layers that share an input → rounds, each of them calibrated in one forward: all in one, or one by one, where experts
        side by side count as one (see `cloq.models.experts.rounds`) as far as their Gram matrices fit into `GRAM_BYTES`."""
        if not one_by_one:
            return [groups] if groups else []
        return [part for together in rounds(groups, self.expert_layers.get) for part in self._fitting(together)]

    def _fitting(self, together: list[list[str]]) -> list[list[list[str]]]:
        parts: list[list[list[str]]] = [[]]
        held = 0
        for group in together:
            size = 4 * linear_shape(self.model.get_submodule(group[0]))[1] ** 2
            if parts[-1] and held + size > GRAM_BYTES:
                parts.append([])
                held = 0
            parts[-1].append(group)
            held += size
        return parts

    @contextlib.contextmanager
    def showing(self, names: Iterable[str], tokens: int, enough: int) -> Iterator[None]:
        """Inside, the experts that the named layers belong to are given other tokens than the router's, evenly drawn so that of `tokens`
        some `enough` remain, or all there are. What such a block returns means nothing."""
        shown: dict[str, set[int]] = {}
        for name in names:
            layer = self.expert_layers[name]
            shown.setdefault(layer.experts, set()).add(layer.index)
        with contextlib.ExitStack() as stack:
            for path, indices in shown.items():
                experts = cast(Experts, self.model.get_submodule(path))
                stack.enter_context(experts.showing(frozenset(indices), max(1, tokens // enough)))
            yield

    def leave(self, hidden: Tensor, tokens: Tensor, gradients: bool = False) -> Tensor:
        """Logits `(sequences, length, vocabulary)` from the last block's output. Needs `outer()`. gradients: as of `run_block`."""
        self.check_streamable()
        last = len(self.blocks) - 1
        with torch.set_grad_enabled(gradients), forward_precision(self.device):
            hidden = hidden.to(self.device)
            return self.stand_in(lambda index, h, args, kwargs: hidden if index == last else h, tokens.to(self.device), self._returned)

    def check_streamable(self) -> None:
        """Raises `ModelError` if the model's blocks cannot be run one by one in its stead: see `cloq.models.probe`. Looked at
        once; reads the outer parts and the first block of every kind."""
        self._returned  # noqa: B018 - computed on first access

    @functools.cached_property
    def _returned(self) -> Returned:
        return returned_values(self)


def _intern(value: Any, kept: list[Tensor]) -> Any:
    """The value with every tensor replaced by an equal one that was seen before, so that what batches share is stored once.

    Lists and dictionaries stay the objects that they are: blocks may hand each other state in one that all of them are given.
    """
    if isinstance(value, Tensor):
        for other in kept:
            if other is value or (other.shape == value.shape and other.dtype == value.dtype and torch.equal(other, value)):
                return other
        kept.append(value)
    elif type(value) is tuple:
        return tuple(_intern(item, kept) for item in value)
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            value[key] = _intern(item, kept)
    return value
