"""Text → token batches: concatenated, cut into sequences of one length, and drawn by a seed.

No padding ever: every token of every sequence is a real one and counts in the Gram matrices. Where documents follow one another
there is one end-of-text token between them, as in pretraining; inside a document, however long, there is none. Where the
tokenizer begins a text with a begin-of-text token, every sequence begins with it, because such models (Gemma's above all) compute
something else without it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cloq.calibration.mixture import parse_mixture, shares
from cloq.calibration.passages import Unfinished
from cloq.calibration.sources import check, passages
from cloq.errors import CalibrationError
from cloq.specs import CalibSpec

SampleText = Callable[[int, int, int], Tensor]
"""`(sequences, length, seed)` → `(sequences, length)` int64: tokens that the model itself samples."""

_PIECE = 1 << 16
"""Characters handed to the tokenizer at a time."""

_POOL = 4
"""Sequences are drawn from this many times the wanted number where the source has them, so that a large source is not read to its
end."""

_SHORTEST = 8
"""The shortest sequence that `CalibSpec` allows."""


class CalibrationTokens(NamedTuple):
    """calibration: `(samples, seq_len)` int64 for the Gram matrices; heldout: further sequences, for the held-out error, maybe
    none."""

    calibration: Tensor
    heldout: Tensor

    def fingerprint(self) -> str:
        """SHA-256 of all tokens in order."""
        digest = hashlib.sha256()
        for part in self:
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()


class _Count(NamedTuple):
    """Sequences wanted of one source."""

    samples: int
    heldout: int


def calibration_tokens(
    spec: CalibSpec, tokenizer, sample_text: SampleText | None = None, max_positions: int | None = None
) -> CalibrationTokens:  # fmt: skip
    """The tokens that a run is calibrated on, and the held-out ones, from whatever `spec.source` names.

    sample_text: for the source `self`. max_positions: the longest sequence that the model takes. The sequences of a mixture are
    in an order drawn by the seed. Raises `CalibrationError` for every source that is unknown, unreachable, unreadable or too
    short.
    """
    if max_positions is not None and spec.seq_len > max_positions:
        raise CalibrationError(
            f"seq_len is {spec.seq_len}, but the model takes at most {max_positions} tokens; use --seq-len {max_positions}"
        )
    parts = parse_mixture(spec.source)
    for part in parts:  # all names before any text
        check(part.source)
    weights = [part.weight for part in parts]
    drawn = []
    for index, part in enumerate(parts):
        count = _counts(spec, weights)[index]
        if count.samples == 0:
            raise CalibrationError(
                f"the share of {part.source} in the mixture, {part.weight:.3g} of {spec.samples} samples, is less than one "
                "sequence; raise --calib-samples or its weight, or leave it out"
            )
        if part.source == "self":
            drawn.append(_sampled(sample_text, spec, count))
        else:
            text = passages(part.source, spec.column, tokenizer)
            drawn.append(_drawn(text, tokenizer, spec, part.source, weights, index))
    return drawn[0] if len(drawn) == 1 else CalibrationTokens(*(_shuffled(torch.cat(both), spec.seed) for both in zip(*drawn, strict=True)))


def draw_sequences(documents: Iterable[str], tokenizer, spec: CalibSpec, source: str | None = None) -> CalibrationTokens:
    """Draws `samples` sequences and the held-out ones, disjoint, from a stream of documents.

    A pool of sequences is cut from the beginning of the stream, permuted by the seed, and split; the stream is not read beyond
    the pool. source: what the text is called in a message. Raises `CalibrationError` if the text is too short, with the numbers
    that would fit.
    """
    return _drawn(documents, tokenizer, spec, source or spec.source, [1.0], 0)


def sequence_start(tokenizer) -> list[int]:
    """What the tokenizer puts before every text: `[begin-of-text]`, or nothing for most models."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a").input_ids[:1] == [begin] else []


# -- how many ----------------------------------------------------------------------------------------------------------


def _counts(spec: CalibSpec, weights: list[float]) -> list[_Count]:
    return [_Count(*both) for both in zip(shares(weights, spec.samples), shares(weights, spec.heldout_samples), strict=True)]


def _too_short(source: str, tokens: int, sequences: int, spec: CalibSpec, weights: list[float], index: int) -> CalibrationError:
    count = _counts(spec, weights)[index]
    if tokens == 0:
        return CalibrationError(f"the calibration text {source!r} is empty; give other text to --calib")
    fits = []
    for samples in range(min(spec.samples - 1, int(sequences / weights[index]) + 1), 0, -1):
        fewer = _counts(spec.replace(samples=samples), weights)
        if sum(fewer[index]) <= sequences and all(other.samples for other in fewer):
            fits.append(f"--calib-samples {samples}")
            break
    if tokens // sum(count) >= _SHORTEST:
        fits.append(f"--seq-len {min(tokens // sum(count), spec.seq_len - 1)}")
    what = f"What it allows: {' or '.join(fits)}. Otherwise give more text" if fits else "Give more text"
    return CalibrationError(
        f"the calibration text {source!r} has {tokens} tokens, which make {sequences} sequences of {spec.seq_len}, "
        f"but {sum(count)} are needed ({count.samples} samples and {count.heldout} held out). {what}"
    )


# -- drawing -----------------------------------------------------------------------------------------------------------


def _drawn(text: Iterable[str], tokenizer, spec: CalibSpec, source: str, weights: list[float], index: int) -> CalibrationTokens:
    count = _counts(spec, weights)[index]
    pool, tokens = cut_sequences(text, tokenizer, spec.seq_len, sum(count) * _POOL)
    if len(pool) < sum(count):
        raise _too_short(source, tokens, len(pool), spec, weights, index)
    drawn = _shuffled(pool, spec.seed)[: sum(count)]
    return CalibrationTokens(drawn[: count.samples], drawn[count.samples :])


def _shuffled(rows: Tensor, seed: int) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def _sampled(sample_text: SampleText | None, spec: CalibSpec, count: _Count) -> CalibrationTokens:
    if sample_text is None:
        raise CalibrationError(
            "the source 'self' is text that the model samples, and nothing here can sample it; name a text, a file or a data set"
        )
    tokens = sample_text(sum(count), spec.seq_len, spec.seed)
    if tuple(tokens.shape) != (sum(count), spec.seq_len) or tokens.dtype != torch.int64:
        raise ValueError(f"sample_text gave {tuple(tokens.shape)} {tokens.dtype}, wanted {(sum(count), spec.seq_len)} int64")
    tokens = tokens.cpu()
    return CalibrationTokens(tokens[: count.samples], tokens[count.samples :])


# -- text to tokens ----------------------------------------------------------------------------------------------------


def cut_sequences(text: Iterable[str], tokenizer, seq_len: int, limit: int) -> tuple[Tensor, int]:
    """Up to `limit` sequences `(n, seq_len)` from the beginning of a stream of documents, and the number of tokens read."""
    start = torch.tensor(sequence_start(tokenizer), dtype=torch.int64)
    body = seq_len - len(start)
    rows: list[Tensor] = []
    rest: list[int] = []
    count = tokens = 0
    for ids in _token_stream(text, tokenizer):
        tokens += len(ids)
        rest += ids
        if len(rest) >= body:
            whole = len(rest) // body
            cut = torch.tensor(rest[: whole * body], dtype=torch.int64).reshape(whole, body)
            rows.append(torch.cat([start.expand(whole, -1), cut], 1))
            rest = rest[whole * body :]
            count += whole
        if count >= limit:
            break
    return (torch.cat(rows)[:limit] if rows else torch.empty(0, seq_len, dtype=torch.int64)), tokens


def _token_stream(text: Iterable[str], tokenizer) -> Iterator[list[int]]:
    """Token ids, piece by piece, with an end-of-text token between documents.

    A conversation whose template has closed it with that token, perhaps and a line break, gets no second one.
    """
    end = tokenizer.eos_token_id
    last: list[int] = []  # the document before, its last tokens
    new_document = False
    for piece, ends in _pieces(text):
        ids = tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
        if ids:
            if new_document and end is not None and end not in last:
                yield [end]
            yield ids
            last, new_document = (last + ids)[-2:], False
        new_document = new_document or (ends and bool(last))


_SAFE_CUT = re.compile(r"(?<=\w)(?= \w)")


def _pieces(text: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Pieces of at most `_PIECE` characters and whether a document ends after each."""
    rest = ""
    for passage in text:
        rest += passage
        at = 0
        while len(rest) - at > _PIECE:
            cut = _cut(rest, at)
            yield rest[at:cut], False
            at = cut
        rest = rest[at:]
        if not isinstance(passage, Unfinished):
            yield rest, True
            rest = ""
    if rest:
        yield rest, True


def _cut(text: str, at: int) -> int:
    """Where to end a piece that starts at `at`: in front of a single space between two words, where every byte-level tokenizer
    splits anyway and the tokens are those of the uncut text; where there is none, in front of any white space; else anywhere."""
    end = at + _PIECE
    near = max(at + 1, end - 4096)
    places = [found.start() for found in _SAFE_CUT.finditer(text, near, end)]
    spaces = [] if places else [near + found.start() for found in re.finditer(r"\s+", text[near:end])]
    return (places or spaces or [end])[-1]
