"""What is found out about a block by running it, once for every kind of block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from cloq.calibration import Ends, Junctions, junctions, parts_that_end_in
from cloq.models.decoder import Batch, Decoder


@dataclass(frozen=True)
class Kind:
    """junctions: where outputs of layers are added to a stream, if that was asked for. ends: the parts that end in a layer. By names inside
    the block."""

    junctions: Junctions
    ends: Ends

    def joined(self, decoder: Decoder, index: int) -> dict[str, nn.Module | None]:
        """Layers of a block of this kind, by full name → the module that is given the sum, `None` for the block's own output."""
        block, prefix = decoder.blocks[index], decoder.block_name(index) + "."
        return {prefix + name: block.get_submodule(to) if to else None for name, to in self.junctions.items()}


class Kinds:
    """Looks at a block of every kind. sums: at its junctions too. by_one: of several processes, calls what it is given on one and has the
    value on all."""

    def __init__(self, decoder: Decoder, sums: bool = True, by_one: Callable[[Callable[[], Any]], Any] = lambda find: find()):
        self._decoder, self._sums, self._by_one = decoder, sums, by_one
        self._known: dict[tuple, Kind] = {}

    def of(self, index: int, batches: list[Batch]) -> Kind:
        """Needs `load_block(index)`, and a micro-batch on the process that looks."""
        decoder, prefix = self._decoder, self._decoder.block_name(index) + "."
        layers = tuple(name.removeprefix(prefix) for name in decoder.linears(index) if name not in decoder.expert_layers)
        key = (type(decoder.blocks[index]), layers)
        if key not in self._known:
            self._known[key] = self._by_one(lambda: self._look(index, layers, batches[0]))
        return self._known[key]

    def _look(self, index: int, layers: tuple[str, ...], batch: Batch) -> Kind:
        def run():
            return self._decoder.run_block(index, batch)

        block = self._decoder.blocks[index]
        return Kind(junctions(run, block, layers) if self._sums else {}, parts_that_end_in(run, block, layers))
