"""The Gram matrices of linear layers' inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from cloq.calibration.hooks import Enough, once, watching
from cloq.errors import ModelError
from cloq.linears import linear_shape
from cloq.precision import full_precision
from cloq.types import LayerStats

PANEL = 256
"""Columns of a Gram matrix that are added to in one product."""


def gram_matrices(runs: Iterable[Callable[[], object]], linears: dict[str, nn.Module], names: Sequence[str]) -> dict[str, LayerStats]:
    """`Σ x xᵀ` over all forwards, for one representative layer of each group in `names`.

    Every run is one forward of the block on one micro-batch; it is stopped as soon as the inputs of all `names` have been seen.
    Sums are float32 whatever the type of the activations (TF32 off), and exactly symmetric. A layer that saw nothing has a
    zero matrix and `n_tokens` 0. Raises `ModelError` for a layer that runs twice in one forward, and for activations that are NaN
    or Inf.
    """
    sums = GramSums(linears, names)
    reached: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        once(name, reached)
        sums.add(name, x.detach().flatten(0, -2).float())
        if len(reached) == len(names):
            raise Enough

    with torch.no_grad(), watching(linears, names, see):
        for run in runs:
            reached.clear()
            with suppress(Enough):
                run()
    return sums.statistics()


class GramSums:
    """`Σ x xᵀ` of several layers' inputs, growing row by row; what `gram_matrices` says of sums holds here."""

    def __init__(self, linears: dict[str, nn.Module], names: Sequence[str]):
        self._linears = linears
        self._sums: dict[str, Tensor] = {}
        self._tokens = dict.fromkeys(names, 0)

    def add(self, name: str, rows: Tensor) -> None:
        """rows: `(tokens, in)` float32."""
        if name not in self._sums:
            self._sums[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        with full_precision():
            _add_upper_triangle(self._sums[name], rows)
        self._tokens[name] += rows.shape[0]

    def statistics(self) -> dict[str, LayerStats]:
        """Ends the sums. Raises `ModelError` for activations that were NaN or Inf."""
        for name, gram in self._sums.items():
            _check_finite(name, gram)
        for gram in self._sums.values():
            _mirror(gram)
        seen, tokens = self._sums, self._tokens
        return {name: LayerStats(seen[name], n) if name in seen else _nothing_seen(self._linears[name]) for name, n in tokens.items()}


def summed(
    own: dict[str, LayerStats], total: Callable[[dict[str, int]], dict[str, int]], add: Callable[[Iterator[Tensor]], None]
) -> dict[str, LayerStats]:  # fmt: skip
    """The statistics of all processes from each one's own, whose matrices are overwritten.

    total: sums numbers of tokens over the processes, by name. add: sums tensors over them, in place, each before it asks for the next; it
    is given one triangle of every matrix, in panels. The result is exactly symmetric. Raises `ModelError` for sums beyond float32.
    """
    tokens = total({name: stats.n_tokens for name, stats in own.items()})
    seen = [name for name in own if tokens[name]]
    add(panel for name in seen for panel in _panels(own[name].gram))
    for name in seen:
        _check_finite(name, own[name].gram)
        _mirror(own[name].gram)
    return {name: LayerStats(stats.gram, tokens[name]) for name, stats in own.items()}


def topped_up(own: LayerStats, others: LayerStats, least: int) -> LayerStats:
    """`G + (least − n) · Ḡ`, where an expert saw `n < least` tokens and `Ḡ` is the mean of `x xᵀ` over tokens that it is shown although the
    router sends them elsewhere; with `n >= least` tokens the expert's own Gram matrix as it is.

    So the mean of `x xᵀ` that the solve sees is `(1 − α) · own + α · others` with `α = max(0, 1 − n / least)`: an expert that saw nothing
    is calibrated on what it would make of any token, one that saw enough on its own tokens alone, and nothing jumps in between. Where the
    others are fewer than `least` themselves, inputs in all directions alike, of the same mean square, stand for those that are not there.
    """
    missing = least - own.n_tokens
    if missing <= 0 or others.n_tokens == 0:
        return own
    absent = max(0, least - others.n_tokens)
    square = others.gram.diagonal().mean() / others.n_tokens
    pool = others.gram + absent * square * torch.eye(len(others.gram), device=others.gram.device)
    return LayerStats(own.gram + pool * (missing / (others.n_tokens + absent)), own.n_tokens, missing)


def _add_upper_triangle(gram: Tensor, rows: Tensor) -> None:
    """Adds `rowsᵀ rows` to the panels of `gram (in, in)` that lie on or right of the diagonal: little more than half the operations."""
    for start in range(0, rows.shape[1], PANEL):
        gram[start : start + PANEL, start:].addmm_(rows[:, start : start + PANEL].T, rows[:, start:])


def _panels(gram: Tensor) -> Iterator[Tensor]:
    """What lies on or right of the diagonal, panel by panel; what becomes of a panel before the next one is asked for is put back."""
    for start in range(0, len(gram), PANEL):
        panel = gram[start : start + PANEL, start:].contiguous()
        yield panel
        gram[start : start + PANEL, start:] = panel


def _check_finite(name: str, gram: Tensor) -> None:
    if not bool(torch.isfinite(gram.diagonal()).all()):  # sums of squares: they show whatever is not finite in any row
        raise overflowed(f"the inputs of {name}")


def overflowed(activations: str) -> ModelError:
    """For activations, as a message names them, that are not finite."""
    return ModelError(f"{activations} hold NaN, Inf or values beyond float32 on the calibration text; the model itself overflows")


def _mirror(gram: Tensor) -> None:
    """Copies what lies above the diagonal to below it, in place, panel by panel: exactly symmetric, and no second matrix."""
    for start in range(0, len(gram), PANEL):
        panel = gram[start : start + PANEL]
        square = panel[:, start : start + PANEL]
        square.copy_(square.triu() + square.triu(1).T)
        gram[start + PANEL :, start : start + PANEL] = panel[:, start + PANEL :].T


def _nothing_seen(linear: nn.Module) -> LayerStats:
    width = linear_shape(linear)[1]
    return LayerStats(torch.zeros(width, width, device=linear.weight.device), 0)
