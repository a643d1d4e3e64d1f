"""The original model beside the one that is being compressed: its activations, and its weights while a block has others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from cloq.calibration import Seen
from cloq.models.decoder import Batch, Decoder
from cloq.models.forwards import Forwards, Room
from cloq.models.kinds import Kind


class Reference:
    """Goes through the blocks together with the compressed model.

    batches: what the first block is given, not shared with the compressed model's: blocks may hand each other state in what they are
    called with. joined: layers of the block whose output is added to a stream → the module that is given the sum, `None` for the block's
    own output; see `cloq.calibration.junctions`.

    Per block, in this order: `enter`, any number of `seen`, `propagate`. Costs another copy of the activations, of one block's linear
    weights once they are replaced, and what `Forwards` keeps.
    """

    def __init__(self, decoder: Decoder, batches: list[Batch]):
        self._decoder, self.batches = decoder, batches
        self._linears: dict[str, nn.Module] = {}
        self._originals: dict[nn.Module, nn.Parameter] = {}
        self.joined: dict[str, nn.Module | None] = {}

    def enter(self, index: int, linears: dict[str, nn.Module], kind: Kind, room: Room) -> None:
        """Keeps the weights that the block has now, the original's."""
        self._linears = linears
        self._originals = {module: module.weight for module in linears.values()}
        self._forwards = Forwards(self._decoder, index, self.batches, kind.ends, room, final=linears)
        self.joined = kind.joined(self._decoder, index)

    def seen(self, position: int, names: Sequence[str], adding: dict[str, nn.Module | None]) -> Seen:
        """What the original block's layers are given on the batch at this position."""
        watched = hooks_on(self._linears, adding)
        with self._original_weights():
            return Seen(lambda: self._forwards.run(position, names, watched), self._linears, names, adding)

    def propagate(self) -> None:
        """Takes the activations one block further, in place."""
        with self._original_weights():
            self._forwards.propagate()

    @contextmanager
    def _original_weights(self) -> Iterator[None]:
        compressed = {module: module.weight for module in self._originals}
        try:
            _put(self._originals)
            yield
        finally:
            _put(compressed)


def hooks_on(linears: dict[str, nn.Module], adding: dict[str, nn.Module | None]) -> set[nn.Module]:
    """The modules that `Seen` has hooks on besides the layers whose inputs it sees."""
    return {*(linears[name] for name in adding), *(junction for junction in adding.values() if junction is not None)}


def _put(weights: dict[nn.Module, nn.Parameter]) -> None:
    for module, weight in weights.items():
        module.weight = weight
