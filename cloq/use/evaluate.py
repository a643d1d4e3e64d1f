"""Perplexity, streamed block by block like everything else: the whole model is never in memory.

The protocol has a name and stands beside every number: `chunks-L` is the text as one stream of tokens, cut into sequences of L without
overlap, every token but a sequence's first predicted, the mean over all predicted tokens. (WikiText-2's usual protocol has L = 2048.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from cloq.errors import CalibrationError
from cloq.models import Batch, Decoder, InHostMemory, Waiting
from cloq.streaming.memory import has_room

SetWeights = Callable[[int, dict[str, nn.Module]], None]
"""Changes the weights of block i, whose linear layers by name are given, before the block runs."""


@dataclass(frozen=True)
class Perplexity:
    """value: exp of the mean negative log-likelihood in nats. tokens: predicted ones. stderr: of the mean log-likelihood over sequences.
    losses: mean negative log-likelihood of every sequence."""

    value: float
    tokens: int
    stderr: float
    protocol: str
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Quality:
    """One model's perplexity on one text, as a report keeps it. model: `16-bit`, `base` or `base + adapter`. protocol and text say what
    was measured; stderr is of the mean log-likelihood, in nats."""

    model: str
    perplexity: float
    tokens: int
    stderr: float
    protocol: str
    text: str

    def to_dict(self) -> dict:
        return asdict(self)


def beginning(documents: Iterable[str], tokens: int | None) -> str:
    """The documents joined by blank lines; where a number of tokens is enough, only what surely holds it (sources may be endless)."""
    parts, characters = [], 0
    for document in documents:
        parts.append(document)
        characters += len(document)
        if tokens is not None and characters > 32 * tokens:
            break
    return "\n\n".join(parts)


def evaluation_tokens(text: str, tokenizer, seq_len: int, max_samples: int | None = None) -> Tensor:
    """`(sequences, seq_len)` int64, the text from its beginning. Raises `CalibrationError` if it does not fill one sequence."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    count = len(ids) // seq_len
    if count == 0:
        raise CalibrationError(
            f"the evaluation text has {len(ids)} tokens, fewer than one sequence of {seq_len}; give more text or lower --seq-len"
        )
    count = count if max_samples is None else min(count, max_samples)
    return torch.tensor(ids[: count * seq_len], dtype=torch.int64).reshape(count, seq_len)


@torch.no_grad()
def perplexity(
    decoder: Decoder, tokens: Tensor, batch_tokens: int = 4096, set_weights: SetWeights | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:  # fmt: skip
    """Perplexity of the model on `tokens (sequences, length)`, with the weights in the checkpoint or as `set_weights` changes them."""
    waiting = Waiting() if has_room(tokens.numel() * decoder.bytes_of_a_token, decoder.device) else InHostMemory()
    batches = decoder.enter(tokens, batch_tokens, waiting=waiting)
    for index in range(len(decoder.blocks)):
        decoder.load_block(index)
        if set_weights is not None:
            set_weights(index, decoder.linears(index))
        batches = [batch.onwards(decoder.run_block(index, batch)) for batch in batches]
        decoder.drop_block(index)
        if progress is not None:
            progress(index + 1, len(decoder.blocks))
    losses = sequence_losses(decoder, batches, tokens)
    stderr = float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else float("nan")
    return Perplexity(
        math.exp(float(losses.mean())), tokens.numel() - len(tokens), stderr, f"chunks-{tokens.shape[1]}", tuple(losses.tolist())
    )


@torch.no_grad()
def sequence_losses(decoder: Decoder, batches: list[Batch], tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of each sequence in nats, `(sequences,)` float64, from the last block's outputs. One sequence of
    logits is held at a time."""
    losses = []
    with decoder.outer():
        for batch, ids in zip(batches, tokens.split(batches[0].hidden.shape[0]), strict=True):
            for hidden, one in zip(batch.hidden.split(1), ids.split(1), strict=True):
                logits = decoder.leave(hidden, one)[0, :-1].float()
                losses.append(nn.functional.cross_entropy(logits, one[0, 1:].to(logits.device)).double().cpu())
    return torch.stack(losses)
