"""The original model beside the one that is being compressed: its activations, and its weights while a block has others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from cloq.calibration.paired import Junctions, Seen, adding_layers, junctions
from cloq.linears import linear_shape
from cloq.models.decoder import Batch, Decoder

KEPT_BYTES = 1 << 30
"""What a block's inputs may take that are kept instead of computed again for every round. It changes the time, not the result."""


class Reference:
    """Goes through the blocks together with the compressed model.

    batches: what the first block is given, not shared with the compressed model's: blocks may hand each other state in what they are
    called with. by_one: of several processes, calls what it is given on one and has the value on all. joined: layers of the block whose
    output is added to a stream → the module that is given the sum, `None` for the block's own output; see `cloq.calibration.junctions`.

    Per block, in this order: `enter`, `look` where its layers are to be compared, any number of `seen`, `propagate`. Costs another copy of
    the activations, and of one block's linear weights once they are replaced.
    """

    def __init__(self, decoder: Decoder, batches: list[Batch], by_one: Callable[[Callable[[], Any]], Any] = lambda find: find()):
        self._decoder, self.batches, self._by_one = decoder, batches, by_one
        self._index = 0
        self._linears: dict[str, nn.Module] = {}
        self._originals: dict[nn.Module, nn.Parameter] = {}
        self._known: dict[tuple, Junctions] = {}
        self._kept: list[Seen] = []
        self.joined: dict[str, nn.Module | None] = {}

    def enter(self, index: int, linears: dict[str, nn.Module]) -> None:
        """Keeps the weights that the block has now, the original's, and finds its sums where it is the first of its kind."""
        self._index, self._linears, self._kept = index, linears, []
        self._originals = {module: module.weight for module in linears.values()}
        block, prefix = self._decoder.blocks[index], self._decoder.block_name(index) + "."
        layers = [name.removeprefix(prefix) for name in linears if name not in self._decoder.expert_layers]
        kind = (type(block), *layers)
        if kind not in self._known:
            self._known[kind] = self._by_one(lambda: junctions(lambda: self._decoder.run_block(index, self.batches[0]), block, layers))
        self.joined = {prefix + name: block.get_submodule(to) if to else None for name, to in self._known[kind].items()}

    def look(self, groups: Sequence[Sequence[str]]) -> None:
        """Runs the block once and keeps what all of these layers are given, if that is not too much."""
        groups = [group for group in groups if group[0] not in self._decoder.expert_layers]
        tokens = sum(batch.hidden.shape[:2].numel() for batch in self.batches)
        names = [group[0] for group in groups]
        if names and fits(tokens, [linear_shape(self._linears[name])[1] for name in names]):
            adding = adding_layers(groups, self.joined)
            self._kept = [Seen(lambda b=b: self._run(b), self._linears, names, adding, through=True) for b in self.batches]

    def seen(self, position: int, names: Sequence[str], adding: dict[str, nn.Module | None]) -> Seen:
        """What the original block's layers are given on the batch at this position."""
        if self._kept:
            return self._kept[position]
        return Seen(lambda: self._run(self.batches[position]), self._linears, names, adding)

    def propagate(self) -> None:
        """Takes the activations one block further, in place."""
        for i, batch in enumerate(self.batches):
            kept = self._kept[i].output if self._kept else None
            self.batches[i] = Batch(self._run(batch) if kept is None else kept, batch.calls)
        self._kept = []

    def _run(self, batch: Batch) -> Tensor:
        """The original block's output."""
        compressed = {module: module.weight for module in self._originals}
        try:
            _put(self._originals)
            return self._decoder.run_block(self._index, batch)
        finally:
            _put(compressed)


def fits(tokens: int, widths: Sequence[int]) -> bool:
    """Whether inputs of these widths are few enough to be kept, in float32."""
    return 4 * tokens * sum(widths) <= KEPT_BYTES


def _put(weights: dict[nn.Module, nn.Parameter]) -> None:
    for module, weight in weights.items():
        module.weight = weight
