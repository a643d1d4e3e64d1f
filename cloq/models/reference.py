"""The original model beside the one that is being compressed: its activations, and its weights while a block has others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cloq.calibration.paired import Junctions, junctions
from cloq.models.decoder import Batch, Decoder


class Reference:
    """Goes through the blocks together with the compressed model.

    batches: what the first block is given, not shared with the compressed model's: blocks may hand each other state in what they are
    called with. by_one: of several processes, calls what it is given on one and has the value on all. joined: layers of the block whose
    output is added to a stream → the module that is given the sum, `None` for the block's own output; see `cloq.calibration.junctions`.

    Per block, in this order: `enter`, any number of `run`, `propagate`. Costs another copy of the activations, and of one block's linear
    weights once they are replaced.
    """

    def __init__(self, decoder: Decoder, batches: list[Batch], by_one: Callable[[Callable[[], Any]], Any] = lambda find: find()):
        self._decoder, self.batches, self._by_one = decoder, batches, by_one
        self._index = 0
        self._originals: dict[nn.Module, nn.Parameter] = {}
        self._known: dict[tuple, Junctions] = {}
        self.joined: dict[str, nn.Module | None] = {}

    def enter(self, index: int, linears: dict[str, nn.Module]) -> None:
        """Keeps the weights that the block has now, the original's, and finds its sums where it is the first of its kind."""
        self._index, self._originals = index, {module: module.weight for module in linears.values()}
        block, prefix = self._decoder.blocks[index], self._decoder.block_name(index) + "."
        layers = [name.removeprefix(prefix) for name in linears if name not in self._decoder.expert_layers]
        kind = (type(block), *layers)
        if kind not in self._known:
            self._known[kind] = self._by_one(lambda: junctions(lambda: self._decoder.run_block(index, self.batches[0]), block, layers))
        self.joined = {prefix + name: block.get_submodule(to) if to else None for name, to in self._known[kind].items()}

    def run(self, batch: Batch) -> Tensor:
        """The original block's output on one of `batches`."""
        compressed = {module: module.weight for module in self._originals}
        try:
            _put(self._originals)
            return self._decoder.run_block(self._index, batch)
        finally:
            _put(compressed)

    def propagate(self) -> None:
        """Takes the activations one block further, in place."""
        for i, batch in enumerate(self.batches):
            self.batches[i] = Batch(self.run(batch), batch.calls)


def _put(weights: dict[nn.Module, nn.Parameter]) -> None:
    for module, weight in weights.items():
        module.weight = weight
