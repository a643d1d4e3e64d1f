"""Log-likelihoods of continuations, batched by length.

A sequence is `context + continuation`, tokenized together as text is, and cut where the tokens of the context alone end. Batches are padded
on the right: in a causal model no token sees what follows it, so padding changes no score. What several sequences begin with is run once,
and logits are made only where a continuation stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from cloq.errors import TaskError
from cloq.tasks.generation import chat_prompt
from cloq.tasks.model import TaskModel, new_cache
from cloq.tasks.rows import Asked, TaskRows
from cloq.tasks.spec import Options, RowResult

Progress = Callable[[int, int], None]

_WORTH_SHARING = 4
"""Tokens that a common beginning must have to be run by itself."""


@dataclass(frozen=True)
class Encoded:
    """A context with its continuation. ids: the tokens. length: how many of the last ones are the continuation. truncated: tokens at the
    beginning were left out."""

    ids: tuple[int, ...]
    length: int
    truncated: bool = False


@dataclass(frozen=True)
class Likelihood:
    """log-likelihood of a continuation in nats, and whether greedy decoding would give it."""

    value: float
    greedy: bool


def encode(model: TaskModel, context: str, continuation: str, special: bool = True) -> Encoded:
    """Both texts as one sequence. Spaces at the end of the context belong to the continuation, as tokenizers have it. What does not fit the
    model's context loses its beginning; `TaskError` if the continuation alone does not fit, or has no token of its own. special: the
    tokenizer adds its begin-of-text token (a chat template has written its own)."""
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    if context:
        ids = model.tokenizer(context + continuation, add_special_tokens=special, verbose=False).input_ids
        before = len(model.tokenizer(context, add_special_tokens=special, verbose=False).input_ids)
    else:
        ids = [model.start, *model.tokenizer(continuation, add_special_tokens=False, verbose=False).input_ids]
        before = 1
    length, limit = len(ids) - before, model.max_positions
    if length < 1:
        raise TaskError(f"the continuation {continuation!r} has no token of its own after its context; this model cannot be asked so")
    if limit is not None and length > limit:
        raise TaskError(f"a continuation has {length} tokens, and the model's context is {limit}: {continuation[:60]!r}…")
    too_long = limit is not None and len(ids) > limit + 1  # the last token is predicted, never read
    return Encoded(tuple(ids[-(limit + 1) :] if too_long else ids), length, too_long)


@torch.inference_mode()
def likelihoods(
    model: TaskModel, groups: Sequence[Sequence[Encoded]], batch_tokens: int = 4096, progress: Progress | None = None
) -> list[list[Likelihood]]:  # fmt: skip
    """For every group of sequences, which may have a beginning in common, in the order in which they came.

    On a CPU, where time is spent per token, a group's common beginning is run once and its sequences go on from there; elsewhere sequences
    of all groups are batched. batch_tokens: padded tokens per forward, at least one sequence.
    """
    if model.shares_prefixes and model.device.type == "cpu":
        found = []
        for group in groups:
            found.append(_from_common_prefix(model, group, batch_tokens))
            if progress is not None:
                progress(len(found), len(groups))
        return found
    flat = iter(_batched(model, [sequence for group in groups for sequence in group], batch_tokens, progress))
    return [[next(flat) for _ in group] for group in groups]


def _batched(model: TaskModel, sequences: Sequence[Encoded], batch_tokens: int, progress: Progress | None = None) -> list[Likelihood]:
    """Whole sequences; those with the same tokens before their last one are run once."""
    inputs: dict[tuple[int, ...], list[int]] = {}
    for number, sequence in enumerate(sequences):
        inputs.setdefault(sequence.ids[:-1], []).append(number)
    found: dict[int, Likelihood] = {}
    for batch in _batches(sorted(inputs, key=lambda ids: (-len(ids), ids)), batch_tokens):
        first = min(len(ids) - sequences[number].length for ids in batch for number in inputs[ids])
        for ids, logits in zip(batch, _logits(model, batch, first), strict=True):
            for number in inputs[ids]:
                start = len(ids) - sequences[number].length - first
                found[number] = _likelihood(logits[start : len(ids) - first], sequences[number])
        if progress is not None:
            progress(len(found), len(sequences))
    return [found[number] for number in range(len(sequences))]


def _from_common_prefix(model: TaskModel, group: Sequence[Encoded], batch_tokens: int) -> list[Likelihood]:
    """The sequences of one group: their common beginning once, then what follows it of each, padded on the right."""
    inputs = list(dict.fromkeys(sequence.ids[:-1] for sequence in group))
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*inputs, strict=False)))
    rests = [ids[common:] for ids in inputs]
    if common < _WORTH_SHARING or len(inputs) * max(map(len, rests)) > batch_tokens:
        return _batched(model, group, batch_tokens)
    first = min(common - 1, min(len(sequence.ids) - 1 - sequence.length for sequence in group))
    cache = new_cache(model.model)
    before = _logits(model, [inputs[0][:common]], first, cache)[0]
    after = _continued(model, rests, cache) if any(rests) else [before[:0]] * len(rests)
    found = []
    for sequence in group:
        ids = sequence.ids[:-1]
        rest = after[inputs.index(ids)][: len(ids) - common]
        found.append(_likelihood(torch.cat([before, rest])[-sequence.length :], sequence))
    return found


def _continued(model: TaskModel, rests: list[tuple[int, ...]], cache) -> Tensor:
    """Logits after the cached beginning, `(sequences, positions, vocabulary)`."""
    cache.batch_repeat_interleave(len(rests))
    return model.model(input_ids=_padded(model, rests), past_key_values=cache, use_cache=True).logits


def _batches(inputs: list[tuple[int, ...]], batch_tokens: int) -> list[list[tuple[int, ...]]]:
    """Longest first, so that a batch's first sequence says how long all of it is padded to."""
    batches: list[list[tuple[int, ...]]] = []
    for ids in inputs:
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0]) <= batch_tokens:
            batches[-1].append(ids)
        else:
            batches.append([ids])
    return batches


def _logits(model: TaskModel, batch: list[tuple[int, ...]], first: int, cache=None) -> Tensor:
    """`(sequences, positions, vocabulary)` from position `first` on."""
    tokens = _padded(model, batch)
    kept = {"logits_to_keep": tokens.shape[1] - first} if model.keeps_logits else {}
    kept |= {"past_key_values": cache} if cache is not None else {}
    logits = model.model(input_ids=tokens, use_cache=cache is not None, **kept).logits
    return logits if model.keeps_logits else logits[:, first:]


def _padded(model: TaskModel, batch: Sequence[tuple[int, ...]]) -> Tensor:
    tokens = torch.full((len(batch), max(map(len, batch))), model.start, dtype=torch.int64)
    for row, ids in zip(tokens, batch, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return tokens.to(model.device)


def _likelihood(logits: Tensor, sequence: Encoded) -> Likelihood:
    """From the logits that predict the continuation, one row per token of it."""
    logs, tokens = logits.float().log_softmax(-1), torch.tensor(sequence.ids[-sequence.length :], device=logits.device)
    value = logs.gather(-1, tokens[:, None]).double().sum()
    return Likelihood(float(value), bool((logs.argmax(-1) == tokens).all()))


# -- rows --------------------------------------------------------------------------------------------------------------


def answer_options(
    model: TaskModel, rows: TaskRows, batch_tokens: int = 4096, chat: bool = False, progress: Progress | None = None
) -> list[RowResult]:  # fmt: skip
    """Every row's result, in order. chat: contexts go through the tokenizer's chat template."""
    asked = [in_chat(model, row.item) if chat else row.item for row in rows.rows]
    encoded = [[encode(model, *pair, special=not chat) for pair in item.pairs] for item in asked]
    answered = likelihoods(model, encoded, batch_tokens, progress)
    return [
        _result(rows, row, found, any(sequence.truncated for sequence in sequences))
        for row, sequences, found in zip(rows.rows, encoded, answered, strict=True)
    ]


def in_chat(model: TaskModel, item: Options) -> Options:
    """As lm-eval asks: each context is a user's turn and each option what the assistant answers, so that no space joins the two."""
    joint = " " if len(item.pairs) > 1 else ""
    pairs = tuple((chat_prompt(model, context), rest.removeprefix(joint)) for context, rest in item.pairs)
    return Options(pairs, item.gold, item.lengths)


def _result(rows: TaskRows, row: Asked, found: list[Likelihood], truncated: bool) -> RowResult:
    scores = [one.value for one in found]
    metrics = {name: value for name, value in option_metrics(row.item, found).items() if name in rows.task.metrics}
    return RowResult(
        rows.task.name, row.index, row.key, rows.protocol, metrics, truncated, {"log_likelihoods": scores, "gold": row.item.gold}
    )


def option_metrics(item: Options, found: list[Likelihood]) -> dict[str, float]:
    """`acc`: the likeliest option is the right one (of one option alone: greedy decoding gives it). `acc_norm`: the same, log-likelihoods
    divided by characters, as lm-eval does. `perplexity`: the right option's log-likelihood, from which its mean over the rows makes one."""
    scores = [one.value for one in found]
    if len(scores) == 1:
        return {"acc": float(found[0].greedy), "perplexity": scores[0]}
    normed = [score / length for score, length in zip(scores, item.lengths, strict=True)]
    return {"acc": float(scores.index(max(scores)) == item.gold), "acc_norm": float(normed.index(max(normed)) == item.gold)}
