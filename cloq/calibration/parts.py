"""Which parts of a block end in a linear layer: an attention in its output projection, an MLP in its down projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cloq.calibration.hooks import calling, hooked


class End(NamedTuple):
    """layer: that a part ends in, by its name inside the block. kind, nones: how the part returns the layer's output: as it is (`None`), or
    in a tuple or list, ahead of so many `None`s."""

    layer: str
    kind: type | None
    nones: int

    def returned(self, output: Tensor) -> Any:
        return output if self.kind is None else self.kind([output, *[None] * self.nones])


Ends = dict[str, End]
"""Parts of a block, by their names inside of it, so that blocks of one kind have them in common."""


@torch.no_grad()
def parts_that_end_in(run: Callable[[], Tensor], block: nn.Module, layers: Iterable[str]) -> Ends:
    """The largest part of a block around each of its layers, if there is one, that returns exactly what the layer returns.

    run: one forward of the block. What such a part computes is known once its last layer's input is: `ends_in` puts that in the part's
    place, and here it is tried whether the block then returns the same. A part or a layer that runs twice is none, and a block has
    none if its forward does not call all of the layers: where the weight of one matters that is not called (Mamba's) cannot be seen.
    """
    names = {name: module for name, module in block.named_modules() if name}
    outputs: dict[nn.Module, list[Any]] = {}
    inputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        outputs.setdefault(module, []).append(output)
        if args and isinstance(args[0], Tensor):
            inputs[module] = args[0]

    around = {layer: [part for part in names if layer.startswith(part + ".")] for layer in layers}
    with ExitStack() as stack:
        for module in {names[name] for layer, parts in around.items() for name in (layer, *parts)}:
            stack.enter_context(hooked(module.register_forward_hook(keep)))
        returned = run()
    if not all(names[layer] in outputs for layer in around):
        return {}
    found: Ends = {}
    for layer, parts in around.items():
        if len(mine := outputs.get(names[layer], [])) == 1 and names[layer] in inputs:
            for part in parts:  # from the outside in, as named_modules goes
                if len(theirs := outputs.get(names[part], [])) == 1 and (end := _end(layer, mine[0], theirs[0])):
                    found[part] = end
                    break
    return {part: end for part, end in found.items() if _stands_in(run, names[part], end, names[end.layer], inputs, returned)}


def _stands_in(
    run: Callable[[], Tensor], part: nn.Module, end: End, last: nn.Module, inputs: dict[nn.Module, Tensor], returned: Tensor
) -> bool:  # fmt: skip
    """Whether the block returns the same with the layer alone in the place of the part."""
    try:
        with standing_in(part, lambda: end.returned(last(inputs[last]))):
            return torch.equal(run(), returned)
    except Exception:  # the model's own code without something that the part returns or leaves behind: anything can come
        return False


def _end(layer: str, output: Any, of_part: Any) -> End | None:
    """How a part returns what its layer returned; `None` if it does not, or if all of that is zero and means nothing. What else it returns
    (attention weights) is left out, if the block can do without."""
    kind = type(of_part) if type(of_part) in (tuple, list) else None
    y, *rest = of_part if kind and of_part else (of_part,)
    if not isinstance(y, Tensor) or not isinstance(output, Tensor):
        return None
    same = y.shape == output.shape and y.dtype == output.dtype and torch.equal(y, output) and bool(y.any())
    return End(layer, kind, len(rest)) if same else None


@contextmanager
def standing_in(module: nn.Module, compute: Callable[[], Any]) -> Iterator[None]:
    """`compute()` in the place of a module's forward, whatever that is called with."""
    with calling(module, lambda *args, **kwargs: compute()):
        yield
