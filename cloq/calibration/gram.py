"""Hooks on one block: which linear layers share an input, and the Gram matrices of those inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from cloq.types import LayerStats


class _Enough(Exception):
    """Raised inside a forward once the last wanted input has been seen: what follows in the block need not be computed."""


def shared_inputs(run: Callable[[], object], linears: dict[str, nn.Module]) -> list[list[str]]:
    """Groups of layers that are given the very same tensor, in the order in which one forward reaches them.

    run: one forward of the block. Layers that the forward never reaches come last, each alone. Inputs are compared by identity of
    storage while all of them are held, so a reused buffer cannot pass for an equal input.
    """
    groups: list[list[str]] = []
    held: list[Tensor] = []

    def hook_for(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0]
            if any(name in group for group in groups):
                raise ValueError(f"{name} runs more than once in one forward of its block; shared layers are not supported")
            for group, other in zip(groups, held, strict=True):
                if x.data_ptr() == other.data_ptr() and x.shape == other.shape and x.stride() == other.stride():
                    group.append(name)
                    return
            groups.append([name])
            held.append(x)

        return hook

    with _hooks({name: hook_for(name) for name in linears}, linears):
        run()
    reached = {name for group in groups for name in group}
    return groups + [[name] for name in linears if name not in reached]


def gram_matrices(runs: Iterable[Callable[[], object]], linears: dict[str, nn.Module], names: Sequence[str]) -> dict[str, LayerStats]:
    """`Σ x xᵀ` over all forwards, for one representative layer of each group in `names`.

    Every run is one forward of the block on one micro-batch; it is stopped as soon as the inputs of all `names` have been seen. Sums are
    float32, one product per micro-batch. A layer that saw nothing has a zero matrix and `n_tokens` 0.
    """
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(names, 0)
    pending: set[str] = set()

    def hook_for(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().flatten(0, -2).float()
            if name not in sums:
                sums[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            sums[name].addmm_(x.T, x)
            tokens[name] += x.shape[0]
            pending.discard(name)
            if not pending:
                raise _Enough

        return hook

    with _hooks({name: hook_for(name) for name in names}, linears):
        for run in runs:
            pending.update(names)
            try:
                run()
            except _Enough:
                pass
    return {name: LayerStats(sums[name], tokens[name]) if name in sums else _nothing_seen(linears[name]) for name in names}


def _nothing_seen(linear: nn.Module) -> LayerStats:
    width = linear.in_features if isinstance(linear, nn.Linear) else linear.weight.shape[0]
    return LayerStats(torch.zeros(width, width, device=linear.weight.device), 0)


class _hooks:
    """Forward pre-hooks that are gone afterwards, whatever happened."""

    def __init__(self, hooks: dict[str, Callable], linears: dict[str, nn.Module]):
        self._pairs = [(linears[name], hook) for name, hook in hooks.items()]

    def __enter__(self) -> None:
        self._handles = [module.register_forward_pre_hook(hook) for module, hook in self._pairs]

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
