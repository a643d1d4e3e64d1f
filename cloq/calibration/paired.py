"""The compressed model's forward and the original's side by side: how far apart a layer's inputs are, and what its output is added to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import Tensor, nn

from cloq.algebra.drift import Drift
from cloq.algebra.linalg import all_finite
from cloq.calibration.gram import GramSums, overflowed
from cloq.calibration.hooks import Enough, hooked, inputs_of, muted, once, watching
from cloq.linears import linear_shape, weight_of
from cloq.precision import full_precision
from cloq.types import LayerStats

Run = Callable[[], Tensor]
"""One forward of a block on one micro-batch, which returns its hidden states."""

Junctions = dict[str, "str | None"]
"""Layers of a block whose output is added, as it is, to a stream → the part of the block that is given the sum; `None` where the block
returns it. Both by their names inside the block, so that blocks of one kind have them in common."""

_SAME = 1e-3
"""How well an addition has to be one, of the largest value."""

_LEAST = 1e-6
"""Mean square of a stream below which a token counts no more; what norms add to it before they divide."""

_TRANSPARENT = (nn.Dropout, nn.Identity)


@torch.no_grad()
def junctions(run: Run, block: nn.Module, layers: Iterable[str]) -> Junctions:
    """Finds the sums that the outputs of a block's layers end in, for any architecture, by moving an output and looking where it shows.

    A layer counts if the first thing behind it that changes, the input of some module or what the block returns, changes by exactly as
    much and is not the layer's output itself. So the output projections of a pre-norm block count, and those of a block that normalizes
    or scales them before adding do not.
    """
    modules = {m: name for name, m in block.named_modules() if name and not isinstance(m, _TRANSPARENT)}
    plain: list[Tensor] = []
    with inputs_of(modules, lambda module, x: plain.append(x)):
        returned = run()
    found: Junctions = {}
    for name in layers:
        shown = _first_shown(run, block, modules, block.get_submodule(name), plain, returned)
        if shown is not None:
            found[name] = modules.get(shown)
    return found


def _first_shown(
    run: Run, block: nn.Module, modules: dict[nn.Module, str], layer: nn.Module, plain: list[Tensor], returned: Tensor
) -> nn.Module | None:  # fmt: skip
    """The part of the block that is given a sum with the layer's output in it, or the block that returns it; `None` for neither."""
    moved: list[tuple[Tensor, Tensor]] = []  # the layer's output, and by how much it was moved
    shown: list[tuple[nn.Module, Tensor, Tensor]] = []  # the first that changed: whose input, before and after
    position = 0

    def move(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
        moved.append((y, noise * (y.float().square().mean().sqrt() + 1e-3).to(y)))
        return y + moved[-1][1]

    def look(module: nn.Module, x: Tensor) -> None:
        nonlocal position
        before, position = plain[position], position + 1
        if moved and not (x.shape == before.shape and torch.equal(x, before)):
            shown.append((module, before, x))
            raise Enough

    with inputs_of(modules, look), hooked(layer.register_forward_hook(move)), suppress(Enough):
        shown.append((block, returned, run()))
    if len(moved) != 1:
        return None
    (y, by), (module, before, after) = ([_rows(x) for x in moved[0]], (shown[0][0], *map(_rows, shown[0][1:])))
    if not before.shape == y.shape == after.shape or torch.equal(before, y):
        return None
    tolerance = _SAME * float(torch.maximum(before.abs().max(), by.abs().max()))
    return module if float((after - before - by).abs().max()) <= tolerance else None


def paired_statistics(
    pairs: Iterable[tuple[Run, See]], linears: dict[str, nn.Module], groups: Sequence[Sequence[str]],
    joined: dict[str, nn.Module | None], apart: Collection[str] = (),
) -> tuple[dict[str, LayerStats], dict[str, Drift]]:  # fmt: skip
    """Gram matrices of each group's first layer, as of `gram_matrices`, and the drift of every layer of the groups.

    pairs: for every micro-batch the compressed block's forward, and what is `Seen` in the original's of layers and sums (or of more).
    groups: layers that share an input. joined: those whose output is added to a stream → the module that is given the sum, `None` for the
    block's output; see `junctions`. In the groups they must have their original weight still. apart: layers that are not given the same
    tokens in both (experts); they have no drift.

    Tokens count alike but for a layer whose output is added to a stream: its are weighed by one over the mean square of the original's
    stream, which whatever reads the stream divides by. Otherwise the few tokens with massive activations would outweigh all others.
    """
    names, together = [group[0] for group in groups], [group for group in groups if group[0] not in apart]
    adding, first_of = adding_layers(together, joined), {name: group[0] for group in together for name in group}
    weighed = [name for group in together if len(group) == 1 for name in group if name in adding]  # whose Gram matrix is its own
    sums = GramSums(linears, names)
    drifts = {}
    for group in together:
        inputs = _zeros(linears[group[0]], 1, 1) if any(name not in adding for name in group) else None
        drifts |= {name: Drift(sums=_zeros(linears[name], 0, 1)) if name in adding else Drift(inputs) for name in group}
    drifting = {group[0]: drifts[name].inputs for group in together for name in group if name not in adding}
    alone = len(groups) == 1 and len(adding) == 1  # nothing that is looked at depends on what the layer makes of its inputs
    for run, original in pairs:
        true, seen = original([group[0] for group in together], adding), Seen(run, linears, names, adding, without=alone)
        for name in weighed:
            _weigh_by_stream(true, seen, name)
        for name, rows in seen.rows.items():
            sums.add(name, rows)
            if name in drifting and name in true.rows:
                _add(drifting[name], true.rows[name] - rows, rows)
        for name in adding:
            _add(drifts[name].sums, true.sums[name] - seen.sums[name], seen.rows[first_of[name]])
    statistics = sums.statistics()
    with full_precision():
        for name in adding if alone else ():  # `Σ W x xᵀ`, which was left out
            drifts[name].sums.addmm_(weight_of(linears[name]).float(), statistics[first_of[name]].gram, alpha=-1)
    for name, drift in drifts.items():
        if not all_finite(drift.total):
            raise overflowed(f"the activations around {name}")
    return statistics, drifts


def adding_layers(groups: Iterable[Sequence[str]], joined: dict[str, nn.Module | None]) -> dict[str, nn.Module | None]:
    """Those of `joined` that are in the groups."""
    return {name: joined[name] for group in groups for name in group if name in joined}


def _add(total: Tensor, difference: Tensor, rows: Tensor) -> None:
    with full_precision():
        total.addmm_(difference.T, rows)


def _weigh_by_stream(true: Seen, seen: Seen, name: str) -> None:
    """Divides what a layer is given, and both streams with its output in them, by the root mean square of the original's, by token."""
    scale = true.sums[name].square().mean(1, keepdim=True).clamp_min(_LEAST).rsqrt()
    for tensors in (seen.rows, true.sums, seen.sums):
        tensors[name] = tensors[name] * scale


def _zeros(layer: nn.Module, *sides: int) -> Tensor:
    """float32, `(out or in, out or in)` of a layer: 0 for out, 1 for in."""
    return torch.zeros([linear_shape(layer)[side] for side in sides], device=layer.weight.device)


class Seen:
    """One forward's inputs of the named layers, `rows[name] (tokens, in)`, and the sums that the outputs of `adding` are in,
    `sums[name] (tokens, out)`; float32. The forward is stopped as soon as both are known.

    without: the sums lack what those layers make of their inputs, all but their bias, and it is not computed.
    """

    def __init__(
        self, run: Run, linears: dict[str, nn.Module], names: Sequence[str], adding: dict[str, nn.Module | None], without: bool = False
    ):
        self.rows: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        added: set[str] = set()
        reached: set[str] = set()

        def see(name: str, x: Tensor) -> None:
            once(name, reached)
            self.rows[name] = _rows(x)
            enough()

        def join(name: str, total: Tensor) -> None:
            if name in added and name not in self.sums:
                self.sums[name] = _rows(total)
                enough()

        def enough() -> None:
            if len(self.rows) == len(names) and len(self.sums) == len(adding):
                raise Enough

        with torch.no_grad(), watching(linears, names, see), ExitStack() as stack, suppress(Enough):
            for name, junction in adding.items():
                if without:
                    stack.enter_context(muted(linears[name]))
                stack.enter_context(hooked(linears[name].register_forward_hook(lambda m, a, y, name=name: added.add(name))))
                if junction is not None:
                    stack.enter_context(inputs_of([junction], lambda module, x, name=name: join(name, x)))
            returned = run()
            for name, junction in adding.items():
                if junction is None:
                    join(name, returned)


See = Callable[[Sequence[str], "dict[str, nn.Module | None]"], Seen]
"""What is seen in a forward of the named layers' inputs, and of the sums that outputs of others are in."""


def _rows(x: Tensor) -> Tensor:
    return x.detach().flatten(0, -2).float()
