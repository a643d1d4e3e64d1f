"""Rows of a data set → examples: token ids, and which of them the loss counts.

Plain text, instruction rows and conversations are read by the same code as calibration text (`cloq.calibration.rows`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from cloq.calibration import cut_sequences, sequence_start
from cloq.calibration.options import Options
from cloq.calibration.passages import Unfinished
from cloq.calibration.rows import (
    ANSWER_COLUMNS,
    Columns,
    Content,
    Row,
    Turn,
    first_of,
    name_one,
    row_contents,
    text_value,
    without_surrogates,
)
from cloq.calibration.sources import passages, single, source_rows
from cloq.errors import CalibrationError, TrainingError
from cloq.training.encode import FLAG, Prompted, encoded
from cloq.training.spec import TrainSpec, template_columns

NO_LIMIT = 1 << 62


class Example(NamedTuple):
    """input_ids: `(n,)` int32. completion_mask: `(n,)` bool, the tokens that the loss counts. lengths: of the rows that share it."""

    input_ids: np.ndarray
    completion_mask: np.ndarray
    lengths: tuple[int, ...]

    def predicted(self) -> int:
        """Tokens that the loss counts: of each row's, not the first, which nothing predicts."""
        starts = np.cumsum((0, *self.lengths[:-1]))
        return int(self.completion_mask.sum() - self.completion_mask[starts].sum())


@dataclass
class Counts:
    """rows: read. empty: without text or answer (a conversation: without a turn of the assistant's), left out. long: of more than the
    allowed tokens. dropped: left out because of their length, or because no token of an answer was left. tokens: in the examples, of
    which predicted ones count in the loss. leftover: tokens at the end of a stream that fill no sequence.

    A share that is held out has examples and tokens alone; the rest concerns the whole source, and is with what is trained on.
    """

    rows: int = 0
    empty: int = 0
    long: int = 0
    dropped: int = 0
    examples: int = 0
    tokens: int = 0
    predicted: int = 0
    leftover: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Examples:
    """All examples of one source, in its order. kind: `text`, `turns` or `chats`."""

    kind: str
    examples: list[Example]
    counts: Counts = field(default_factory=Counts)

    def fingerprint(self) -> str:
        """SHA-256 over all that the model will see."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(np.asarray(example.lengths, np.int64).tobytes())
            digest.update(example.input_ids.tobytes() + example.completion_mask.tobytes())
        return digest.hexdigest()


def read_examples(spec: TrainSpec, source: str, tokenizer, option: str = "--data") -> Examples:
    """Everything in a source, as examples of at most `seq_len` tokens. option: the one that named it, for messages.

    Raises `TrainingError` or `CalibrationError`, with the place, for rows that cannot be used and for a source without any.
    """
    source, options = single(source), Options(option, FLAG, calibrates=False)
    contents = _contents(spec, source, options)
    first = next((item for item in contents if item.content != ""), None)
    if first is None:
        raise TrainingError(f"{source} holds no row with text in it; give other data to {option}")
    kind = "text" if isinstance(first.content, str) else "turns" if isinstance(first.content, Turn | Prompted) else "chats"
    packing = ("stream" if kind == "text" else "none") if spec.packing == "auto" else spec.packing
    if packing == "stream":
        found = _stream(spec, source, tokenizer, kind, options)
    else:
        found = _separate(spec, chain([first], contents), tokenizer, kind)
        found = _packed(found, spec.seq_len) if packing == "rows" else found
    if not found.examples:
        raise TrainingError(_nothing_left(source, found.counts, spec))
    return replace(found, counts=_counted(found.counts, found.examples))


def held_out(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """The examples without a share of them, and that share (at least one), drawn by the seed."""
    count = max(1, round(share * len(examples.examples)))
    if count >= len(examples.examples):
        raise TrainingError(f"--eval-share {share} leaves no example of {len(examples.examples)} to train on; give more data")
    order = np.random.default_rng(seed).permutation(len(examples.examples))
    out = set(order[:count].tolist())
    parts = [[e for i, e in enumerate(examples.examples) if (i in out) == wanted] for wanted in (False, True)]
    return tuple(
        Examples(examples.kind, part, _counted(counts, part)) for counts, part in zip((examples.counts, Counts()), parts, strict=True)
    )


def _counted(counts: Counts, examples: list[Example]) -> Counts:
    tokens, counted = sum(len(e.input_ids) for e in examples), sum(e.predicted() for e in examples)
    return replace(counts, examples=len(examples), tokens=tokens, predicted=counted)


def _nothing_left(source: str, counts: Counts, spec: TrainSpec) -> str:
    if spec.packing in ("auto", "stream") and counts.leftover:
        return f"{source} has {counts.leftover} tokens, fewer than one sequence of {spec.seq_len}; give more text or lower --seq-len"
    reasons = [f"{counts.empty} have no answer"] if counts.empty else []
    reasons += [f"{counts.dropped} have none within {spec.seq_len} tokens"] if counts.dropped else []
    remedy = "raise --seq-len or give other data" if counts.dropped else "give other data"
    return f"none of the {counts.rows} rows of {source} can be used: {', '.join(reasons)}; {remedy}"


# -- content -----------------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    where: str
    content: Content | Prompted


def _contents(spec: TrainSpec, source: str, options: Options) -> Iterator[_Found]:
    rows = source_rows(source, options)
    if spec.template is not None:
        return _templated(rows, spec.template, spec.answer_column)
    columns = Columns(spec.column, spec.prompt_column, spec.context_column, spec.answer_column, FLAG)
    return (_Found(where, content) for where, _, content in row_contents(rows, columns))


def _templated(rows: Iterator[Row], template: str, answer: str | None) -> Iterator[_Found]:
    names = template_columns(template)
    for where, row in rows:
        if not isinstance(row, dict):
            raise CalibrationError(f"{where} is no object with named columns, which --template needs; leave it out for plain text")
        missing = [name for name in names if name not in row]
        if missing:
            raise CalibrationError(f"{where} has no column {missing[0]!r}, which the template names; there are: {', '.join(row)}")
        answer = answer or first_of(tuple(name for name in ANSWER_COLUMNS if name not in names), row)
        if answer is None:
            raise CalibrationError(f"{where}: none of its columns is known to hold the answer. {name_one(row, '--answer-column')}")
        completion = text_value(row, answer, where, "--answer-column").strip()
        prompt = template.format_map({name: _cell(row[name]) for name in names})
        yield _Found(where, Prompted(*map(without_surrogates, (prompt, completion))) if completion else "")


def _cell(found: Any) -> str:
    return "" if found is None else str(found)


# -- one row is one example --------------------------------------------------------------------------------------------


def _separate(spec: TrainSpec, contents: Iterator[_Found], tokenizer, kind: str) -> Examples:
    counts, examples = Counts(), []
    for where, content in contents:
        counts.rows += 1
        if _nothing_in(content, spec.completion_only):
            counts.empty += 1
            continue
        ids, mask = encoded(content, where, tokenizer, spec.completion_only)
        counts.long += len(ids) > spec.seq_len
        pieces = [e for e in _fitted(ids, mask, spec.seq_len, spec.long) if e.predicted()]
        counts.dropped += not pieces
        examples += pieces
    return Examples(kind, examples, counts)


def _nothing_in(content: Content | Prompted, completion_only: bool) -> bool:
    """Whether there is nothing to learn: no text, or a conversation in which nobody answers."""
    if isinstance(content, list):
        return completion_only and all(message["role"] != "assistant" for message in content)
    return isinstance(content, str) and not content.strip()


def _fitted(ids: list[int], mask: list[bool], seq_len: int, long: str) -> Iterator[Example]:
    """The example in pieces of at most `seq_len` tokens: one, none, or several."""
    if len(ids) > seq_len and long == "drop":
        return
    end = len(ids) if long == "split" else min(len(ids), seq_len)
    for start in range(0, end, seq_len):
        piece = slice(start, min(start + seq_len, end))
        yield Example(np.asarray(ids[piece], np.int32), np.asarray(mask[piece], bool), (len(ids[piece]),))


# -- several rows in one sequence --------------------------------------------------------------------------------------


def _stream(spec: TrainSpec, source: str, tokenizer, kind: str, options: Options) -> Examples:
    if kind != "text":
        raise TrainingError(f"{source} holds {kind}, and --packing stream is for plain text; use --packing rows or none")
    counts = Counts()

    def counted() -> Iterator[str]:
        for passage in passages(source, spec.column, tokenizer, options):
            counts.rows += not isinstance(passage, Unfinished)
            yield passage

    sequences, tokens = cut_sequences(counted(), tokenizer, spec.seq_len, NO_LIMIT)
    counts.leftover = tokens - len(sequences) * (spec.seq_len - len(sequence_start(tokenizer)))
    ids = sequences.numpy().astype(np.int32)
    everything = np.ones(spec.seq_len, bool)
    return Examples(kind, [Example(row, everything, (spec.seq_len,)) for row in ids], counts)


def _packed(examples: Examples, seq_len: int) -> Examples:
    """Best fit, longest first: each row goes where it leaves least room. Deterministic."""
    by_room: list[list[list[Example]]] = [[] for _ in range(seq_len + 1)]
    for example in sorted(examples.examples, key=lambda e: -len(e.input_ids)):
        length = len(example.input_ids)
        room = next((r for r in range(length, seq_len) if by_room[r]), None)
        group = by_room[room].pop() if room is not None else []
        group.append(example)
        by_room[(seq_len if room is None else room) - length].append(group)
    groups = [group for groups in by_room for group in groups]
    return Examples(examples.kind, [_joined(group) for group in groups], examples.counts)


def _joined(group: list[Example]) -> Example:
    ids, masks, lengths = zip(*group, strict=True)
    return Example(np.concatenate(ids), np.concatenate(masks), tuple(chain.from_iterable(lengths)))
