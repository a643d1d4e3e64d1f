"""How much the loss depends on what each layer returns: a backward pass through a model whose blocks come and go.

For an error `e` in a layer's output the loss rises by `½ eᵀ H e` in second order, with `H` the second moment of the loss's gradient with
respect to that output where labels are drawn from the model's own predictions (the Fisher information; Martens, arXiv:1412.1193, §9). Of it
the diagonal is taken: one number for each output.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from cloq.algebra.linalg import all_finite
from cloq.calibration import hooked
from cloq.calibration.gram import overflowed
from cloq.errors import ModelError
from cloq.linears import linear_shape
from cloq.models.decoder import Batch, Decoder
from cloq.models.waiting import InHostMemory, Waiting
from cloq.precision import forward_precision

LENGTH = 512
"""Tokens of a sequence at most."""

AT_A_TIME = 128
"""Tokens whose logits are in memory together."""

GIVEN = torch.bfloat16
"""What blocks were given, in a range no smaller than float32's, until the gradients come back through them. By the size of the model the
largest that a run holds, and a rounding of one in five hundred, value by value, in sums over thousands of tokens."""


def followed(length: int) -> int:
    """Tokens of a sequence of this length whose loss is followed back: whole pieces of `LENGTH`."""
    return length // min(LENGTH, length) * min(LENGTH, length)


def given_bytes(decoder: Decoder, tokens: int) -> int:
    """Of what all blocks were given, so many tokens followed back."""
    return len(decoder.blocks) * tokens * decoder.width * GIVEN.itemsize


def squared_gradients(
    decoder: Decoder, tokens: Tensor, batch_tokens: int, wanted: Container[str], numbers: Sequence[int] | None = None,
    aside: Waiting | None = None, kept: torch.dtype = GIVEN,
) -> dict[str, Tensor]:  # fmt: skip
    """`Σ g²` over all tokens, `(out,)` float32, with `g` the gradient of the loss with respect to a layer's output; by the layer's full
    name. Layers that no token reached have zeros.

    tokens: `(sequences, length)`, cut into pieces of at most `LENGTH`. wanted: full names of the layers to find it for. numbers: of the
    sequences, from 0 on if not given; they decide which labels are drawn from the model's predictions. Every block is loaded twice,
    forwards and backwards. aside: where what each was given waits in between, by default in host memory; kept: as what it waits. State
    that blocks hand each other besides the hidden states (Gemma 4's shared keys and values) is not followed. Raises `ModelError` for a
    model that cannot be followed backwards, and for activations and gradients that are not finite.
    """
    length = min(LENGTH, tokens.shape[1])
    pieces = followed(tokens.shape[1]) // length
    tokens = tokens[:, : pieces * length].reshape(-1, length)
    seeds = [number * pieces + piece for number in numbers or range(len(tokens) // pieces) for piece in range(pieces)]
    batches = decoder.enter(tokens, batch_tokens)
    names = [[name for name in decoder.linears(index) if name in wanted] for index in range(len(decoder.blocks))]
    aside = aside or InHostMemory()
    given: list[list[Tensor]] = []
    for index in range(len(decoder.blocks)):
        decoder.load_block(index)
        given.append([aside.keep(batch.hidden.to("cpu", kept)) for batch in batches])
        batches = [batch.onwards(_finite(decoder.run_block(index, batch), decoder.block_name(index))) for batch in batches]
        decoder.drop_block(index)
    with decoder.outer():
        rows = iter(zip(tokens.split(1), seeds, strict=True))
        gradients = [torch.cat([_of_the_loss(decoder, one, *next(rows)) for one in batch.hidden.split(1)]) for batch in batches]
    found: dict[str, Tensor] = {}
    for index in reversed(range(_first(names), len(decoder.blocks))):
        decoder.load_block(index)
        modules = {name: module for name, module in decoder.linears(index).items() if name in names[index]}
        for position, (batch, hidden) in enumerate(zip(batches, given.pop(), strict=True)):
            batch = Batch(hidden.to(decoder.device, batch.hidden.dtype).requires_grad_(), batch.calls)
            aside.rest(hidden)
            gradients[position] = _back(decoder, index, batch, gradients[position], modules, found)
        decoder.drop_block(index)
    return {name: found[name] for block in names for name in block}


def _finite(returned: Tensor, block: str) -> Tensor:
    if not all_finite(returned):
        raise overflowed(f"the outputs of {block}")
    return returned


def _first(names: Sequence[Sequence[str]]) -> int:
    """The first block with a layer that is wanted: no gradient is needed below it."""
    return next((index for index, block in enumerate(names) if block), len(names))


def _of_the_loss(decoder: Decoder, hidden: Tensor, tokens: Tensor, seed: int) -> Tensor:
    """Of one sequence's negative log-likelihood, summed over tokens, with respect to what the last block returns: each token's own."""
    draws = torch.rand(hidden.shape[1], 1, generator=torch.Generator().manual_seed(seed))
    parts = zip(hidden.detach().split(AT_A_TIME, 1), tokens.split(AT_A_TIME, 1), draws.split(AT_A_TIME), strict=True)
    return torch.cat([_of_tokens_loss(decoder, *part) for part in parts], 1)


def _of_tokens_loss(decoder: Decoder, hidden: Tensor, tokens: Tensor, draws: Tensor) -> Tensor:
    """draws: numbers from 0 to 1, one for each token, that choose its label among the model's predictions."""
    hidden = hidden.requires_grad_()
    logits = decoder.leave(hidden, tokens, gradients=True)[0].float()
    with torch.no_grad():
        gradient = logits.softmax(-1)
        chances = gradient.cumsum(-1)
        labels = torch.searchsorted(chances, draws.to(chances) * chances[:, -1:]).clamp_max_(logits.shape[-1] - 1)
        del chances
        gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, -1))  # of the loss, with respect to the logits
    return _followed(logits, hidden, gradient)


def _back(
    decoder: Decoder, index: int, batch: Batch, gradient: Tensor, modules: dict[str, nn.Module], found: dict[str, Tensor]
) -> Tensor:  # fmt: skip
    """The gradient with respect to what the block was given, from the one with respect to what it returned."""
    for name, module in modules.items():
        found.setdefault(name, torch.zeros(linear_shape(module)[0], device=gradient.device))

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda g: add(name, g))

        return hook

    def add(name: str, g: Tensor) -> None:
        total = g.detach().flatten(0, -2).float().square().sum(0)
        if not all_finite(total):
            raise ModelError(f"the loss's gradient at {name} is not finite on the calibration text; use --fisher 0")
        found[name] += total

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(hooked(module.register_forward_hook(watch(name))))
        returned = decoder.run_block(index, batch, gradients=True)
    return _followed(returned, batch.hidden, gradient.to(returned))


def _followed(returned: Tensor, given: Tensor, gradient: Tensor | None = None) -> Tensor:
    """The gradient with respect to what was given, from the one with respect to what was returned, 1 if there is none."""
    try:
        with forward_precision(returned.device):
            return torch.autograd.grad(returned, given, gradient)[0]
    except RuntimeError as error:
        if "does not require grad" in str(error) or "not have been used in the graph" in str(error):
            raise ModelError(
                f"the loss cannot be followed back through this model ({str(error).splitlines()[0]}); use --fisher 0"
            ) from error
        raise
