"""The forwards of one block while its layers are replaced one after the other: what is final is computed once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from cloq.calibration import End, Ends, hooked, standing_in
from cloq.models.decoder import Batch, Decoder


class Room:
    """Bytes that may be kept, shared by all that keep something."""

    def __init__(self, size: float):
        self.left = size

    def take(self, tensor: Tensor) -> bool:
        """Whether there is room for it; then there is less."""
        fits = tensor.nbytes <= self.left
        self.left -= tensor.nbytes if fits else 0
        return fits

    def give(self, tensor: Tensor) -> None:
        self.left += tensor.nbytes


class Forwards:
    """Forwards of one block on the micro-batches of a stream.

    A part of the block that ends in a linear layer is not run again once all before that layer is final: the layer's input is kept and
    stands in for the part, and from when the layer is final too, its output. Only where what is asked for lies outside of the part, and
    as far as there is `room`; what is kept changes the time of a forward and not its result.

    ends: of `cloq.calibration.parts_that_end_in`. final: layers that are not going to change, by full name; `settle` adds some. What runs
    before a layer must be settled before the layer is asked for, as it is in the order of a forward.
    """

    def __init__(self, decoder: Decoder, index: int, batches: list[Batch], ends: Ends, room: Room, final: Iterable[str] = ()):
        self._decoder, self._index, self.batches, self._room, self._final = decoder, index, batches, room, set(final)
        self._parts = [_Part(decoder, index, name, end) for name, end in ends.items()]
        self._kept: list[dict[_Part, _Kept]] = [{} for _ in batches]

    def anew(self) -> Forwards:
        """The same, with nothing kept and nothing to keep: for blocks that are made to do something else for a while."""
        return Forwards(self._decoder, self._index, self.batches, {}, Room(0))

    def settle(self, names: Iterable[str]) -> None:
        """These layers are final."""
        self._final |= set(names)

    def run(self, position: int, asked: Collection[str] = (), watched: Collection[nn.Module] = ()) -> Tensor:
        """The block's output on the micro-batch at this position.

        asked: layers whose inputs the caller looks at, by full name. watched: other modules that it has hooks on. A part that holds one of
        either runs.
        """
        kept = self._kept[position]
        looked_at = {*watched, *(self._decoder.model.get_submodule(name) for name in asked)}
        with ExitStack() as stack:
            for part in self._parts:
                if part in kept and kept[part].changed:  # the model wrote into it
                    self._room.give(kept.pop(part).value)
                if part in kept and part.modules.isdisjoint(looked_at):
                    stack.enter_context(standing_in(part.module, lambda part=part: self._instead(kept, part)))
                elif part not in kept:
                    if part.layer in asked:
                        hook = self._keeping_input(kept, part)
                        stack.enter_context(hooked(part.last.register_forward_pre_hook(hook, prepend=True)))  # others may end the forward
                    if part.layer in self._final:
                        stack.enter_context(hooked(part.module.register_forward_hook(self._keeping_output(kept, part))))
            return self._decoder.run_block(self._index, self.batches[position])

    def propagate(self) -> None:
        """Takes the activations one block further, in place, so that old and new ones of all batches never stand side by side."""
        for position, batch in enumerate(self.batches):
            self.batches[position] = batch.onwards(self.run(position))
            for kept in self._kept[position].values():
                self._room.give(kept.value)
            self._kept[position].clear()

    def _instead(self, kept: dict[_Part, _Kept], part: _Part) -> Any:
        """What the part returns, from what was kept of it."""
        before = kept[part]
        if before.is_output:
            return part.end.returned(before.value)
        output = part.last(before.value)
        if part.layer in self._final:
            self._keep_output(kept, part, output)
        return part.end.returned(output)

    def _keeping_output(self, kept: dict[_Part, _Kept], part: _Part) -> Callable:
        def hook(module: nn.Module, args: tuple, returned: Any) -> None:
            self._keep_output(kept, part, returned if part.end.kind is None else returned[0])

        return hook

    def _keeping_input(self, kept: dict[_Part, _Kept], part: _Part) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            if args:
                self._keep(kept, part, args[0], is_output=False)

        return hook

    def _keep_output(self, kept: dict[_Part, _Kept], part: _Part, output: Tensor) -> None:
        """In the place of the input, if that was kept: the input stays where there is no room for the output."""
        before = kept.pop(part, None)
        if before is not None:
            self._room.give(before.value)
        if not self._keep(kept, part, output, is_output=True) and before is not None:
            self._keep(kept, part, before.value, is_output=False)

    def _keep(self, kept: dict[_Part, _Kept], part: _Part, value: Tensor, is_output: bool) -> bool:
        if value.is_inference() or not self._room.take(value):  # whether something writes to an inference tensor cannot be seen
            return False
        kept[part] = _Kept(value, is_output)
        return True


class _Part:
    """A part of a block and the layer that it ends in."""

    def __init__(self, decoder: Decoder, index: int, name: str, end: End):
        block = decoder.blocks[index]
        self.end, self.module, self.last = end, block.get_submodule(name), block.get_submodule(end.layer)
        self.layer = f"{decoder.block_name(index)}.{end.layer}"
        self.modules = frozenset(self.module.modules())


class _Kept:
    """A tensor that was kept, and whether anything has written to it since."""

    def __init__(self, value: Tensor, is_output: bool):
        self.value, self.is_output, self._version = value, is_output, value._version

    @property
    def changed(self) -> bool:
        return self.value._version != self._version
