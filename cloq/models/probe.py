"""Can a model's blocks be run one by one in its stead? Found out on a few tokens, for any architecture.

Streaming is right if and only if

    1. every block runs once per forward, in order, on hidden states `(sequences, tokens, width)`;
    2. what a block returns is what the next one gets: the model does nothing to hidden states in between;
    3. a block's other arguments do not depend on what earlier blocks computed, but for a container that all blocks of a forward
       are given (Gemma 4 hands keys and values on in one);
    4. a block leaves the hidden states that it is given as they are, for it is run on them more than once;
    5. a token's output does not depend on later tokens, or the model is not a decoder.

Each is checked by running the model's own forward twice with stand-ins in the blocks' places. Only the first block of every
class is really run, which also tells what its forward returns: hidden states alone, or a tuple that begins with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cloq.errors import CloqError, ModelError
from cloq.models.streamed import Returned, StreamedModel

_TOKENS = 8


@torch.no_grad()
def returned_values(streamed: StreamedModel) -> Returned:
    """What the model's blocks return. Raises `ModelError` if one of the five conditions does not hold, with the condition."""
    name = type(streamed.model).__name__
    tokens = torch.arange(_TOKENS, device=streamed.device)[None]
    try:
        with streamed.outer(head=False):
            return _run_twice(streamed, tokens)
    except CloqError:
        raise
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError) as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise ModelError(f"{name} cannot be run block by block ({type(error).__name__}: {first}); cloq cannot stream it") from error


def _run_twice(streamed: StreamedModel, tokens: Tensor) -> Returned:
    name = type(streamed.model).__name__
    returned: Returned = {}
    calls: list[tuple] = []
    previous: list[Tensor] = []

    def first(index: int, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        if index != len(calls):
            raise ModelError(f"{name} does not run its blocks once and in order; cloq cannot stream it")
        if hidden.ndim != 3 or hidden.shape[:2] != tokens.shape:
            raise ModelError(
                f"{name} hands its blocks hidden states of shape {tuple(hidden.shape)}; cloq streams (sequences, tokens, width)"
            )
        if index and not torch.equal(hidden, previous[0]):
            raise ModelError(f"{name} changes hidden states between block {index - 1} and {index}; cloq cannot stream it")
        calls.append((args, kwargs))
        kind = type(streamed.blocks[index])
        if kind not in returned:
            hidden, returned[kind] = _really(streamed, index, hidden, args, kwargs)
        previous[:] = [hidden]
        return hidden

    def second(index: int, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
        if not _same(calls[index], (args, kwargs)):
            raise ModelError(f"{name} calls block {index} with what earlier blocks computed; cloq cannot stream it")
        return hidden.flip(-1) + 1

    streamed.go_through(first, tokens, returned)
    if len(calls) != len(streamed.blocks):
        raise ModelError(f"{name} ran {len(calls)} of {len(streamed.blocks)} blocks in one forward; cloq cannot stream it")
    streamed.go_through(second, tokens, returned)
    return returned


def _really(streamed: StreamedModel, index: int, hidden: Tensor, args: tuple, kwargs: dict) -> tuple[Tensor, int | None]:
    """The block's own output and the number of values it returns; refuses a block that looks ahead."""
    block = streamed.blocks[index]
    was_empty = any(p.device.type == "meta" for p in block.parameters())
    if was_empty:
        streamed.load_block(index)
    forward = type(block).forward
    before, changed = hidden.clone(), hidden.clone()
    changed[:, -1] = changed[:, -1].flip(-1) + 1
    output = forward(block, hidden, *args, **kwargs)
    if not torch.equal(hidden, before):
        raise ModelError(f"{type(block).__name__} overwrites the hidden states that it is given; cloq cannot stream it")
    other = forward(block, changed, *args, **kwargs)
    if was_empty:
        streamed.drop_block(index)
    length = len(output) if isinstance(output, (tuple, list)) else None
    plain, other = (output, other) if length is None else (output[0], other[0])
    tolerance = (1e-5 if plain.dtype == torch.float32 else 1e-2) * float(plain.abs().max())
    if float((plain - other)[:, :-1].abs().max()) > tolerance:
        raise ModelError(
            f"{type(streamed.model).__name__} is not a causal decoder as config.json has it: a token's output depends on later "
            "tokens. cloq takes decoder-only causal language models"
        )
    return plain, length


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return True
