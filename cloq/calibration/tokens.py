"""Text → token batches: concatenated, cut into sequences of one length, and drawn by a seed.

No padding ever: every token of every sequence is a real one and counts in the Gram matrices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cloq.errors import CalibrationError
from cloq.specs import CalibSpec

_TEXT_PER_TOKENIZER_CALL = 1 << 16
"""Characters handed to the tokenizer at a time; documents are joined up to this size."""

_POOL = 4
"""Sequences are drawn from this many times the wanted number where the source has them, so that a large source is not read to its end."""


class CalibrationTokens(NamedTuple):
    """calibration: `(samples, seq_len)` int64 for the Gram matrices; heldout: further sequences, for the held-out error, maybe none."""

    calibration: Tensor
    heldout: Tensor

    def fingerprint(self) -> str:
        """SHA-256 of all tokens in order."""
        digest = hashlib.sha256()
        for part in self:
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.contiguous().numpy().tobytes())
        return digest.hexdigest()


def draw_sequences(documents: Iterator[str], tokenizer, spec: CalibSpec, source: str | None = None) -> CalibrationTokens:
    """Draws `samples` sequences and the held-out ones, disjoint, from a stream of documents.

    Documents are joined by the tokenizer's end-of-text token and cut; a pool of sequences is read, permuted by the seed, and split.
    Raises `CalibrationError` if the text is too short, with the numbers that would fit.
    """
    wanted = spec.samples + spec.heldout_samples
    pool = _pool(documents, tokenizer, spec.seq_len, wanted * _POOL)
    if len(pool) < wanted:
        raise CalibrationError(
            f"the calibration text {source or spec.source!r} gives {len(pool)} sequences of {spec.seq_len} tokens, but {wanted} are needed "
            f"({spec.samples} samples and {spec.heldout_samples} held out). Give more text, or lower --calib-samples or --seq-len"
        )
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(spec.seed))[:wanted]
    drawn = pool[order]
    return CalibrationTokens(drawn[: spec.samples], drawn[spec.samples :])


def _pool(documents: Iterator[str], tokenizer, seq_len: int, limit: int) -> Tensor:
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    rest: list[int] = []
    rows: list[Tensor] = []
    count = 0
    for document in documents:
        for start in range(0, len(document), _TEXT_PER_TOKENIZER_CALL):
            rest += tokenizer(document[start : start + _TEXT_PER_TOKENIZER_CALL], add_special_tokens=False, verbose=False).input_ids
        rest += separator
        whole = len(rest) // seq_len
        if whole:
            rows.append(torch.tensor(rest[: whole * seq_len], dtype=torch.int64).reshape(whole, seq_len))
            rest = rest[whole * seq_len :]
            count += whole
        if count >= limit:
            break
    return torch.cat(rows)[:limit] if rows else torch.empty(0, seq_len, dtype=torch.int64)
