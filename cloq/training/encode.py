"""What a row holds → token ids, and which of them the loss counts.

An answer's tokens are those that the model would have to generate after the prompt's: the two are tokenized together where the prompt's own
tokens are a beginning of that, else apart.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cloq.calibration import sequence_start
from cloq.calibration.rows import Content, Message, Turn, question, render
from cloq.errors import CalibrationError

FLAG = "--column, --prompt-column or --answer-column"
"""The options that name columns, for messages."""


class Prompted(NamedTuple):
    """An exchange whose prompt a template has written out already."""

    prompt: str
    answer: str


def encoded(content: Content | Prompted, where: str, tokenizer, completion_only: bool) -> tuple[list[int], list[bool]]:
    """The content as the model sees it, with what its tokenizer puts before and after a text, and whether the loss counts each token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if isinstance(content, Turn) and tokenizer.chat_template:
        asked, answer = question(content), content.answer.strip()
        content = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    if isinstance(content, list):
        parts = chat_parts(content, tokenizer, where) if completion_only else [(render(content, tokenizer, where, FLAG), True)]
        ids, mask = tokenize_parts(parts, tokenizer)
    else:
        ids, mask = tokenize_parts(_plain_parts(content), tokenizer)
        start = sequence_start(tokenizer)
        ids, mask = [*start, *ids, *end], [*[False] * len(start), *mask, *[True] * len(end)]
    return ids, mask if completion_only else [True] * len(ids)


def _plain_parts(content: str | Turn | Prompted) -> list[tuple[str, bool]]:
    if isinstance(content, str):
        return [(content, True)]
    prompt = content.prompt if isinstance(content, Prompted) else question(content) + "\n\n"
    return [(prompt, False), (content.answer.strip(), True)]


def chat_parts(conversation: list[Message], tokenizer, where: str) -> list[tuple[str, bool]]:
    """A conversation as its template writes it, in parts, and whether each is the assistant's.

    An assistant's part is what the template adds to the conversation before it and its own request for an answer. A template that
    writes earlier turns otherwise once later ones follow (as those that remove earlier reasoning do) gets its last answer alone.
    """
    text = render(conversation, tokenizer, where, FLAG)
    answers = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
    if not answers:
        return [(text, False)]
    spans = [_answer_span(conversation, i, text, tokenizer, where) for i in answers]
    if spans[-1] is None:
        raise CalibrationError(
            f"{where}: in the chat template's text the assistant's last turn cannot be told from the rest. Use --no-completion-only, "
            "or --template with columns of prompt and answer"
        )
    parts, at = [], 0
    for start, end in (span for span in spans if span is not None):
        parts += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [(part, answer) for part, answer in [*parts, (text[at:], False)] if part]


def _answer_span(conversation: list[Message], index: int, text: str, tokenizer, where: str) -> tuple[int, int] | None:
    before = render(conversation[:index], tokenizer, where, FLAG, ask=True) if index else ""
    after = render(conversation[: index + 1], tokenizer, where, FLAG)
    if not (text.startswith(after) and after.startswith(before)):
        return None
    return len(before), len(after)


def tokenize_parts(parts: list[tuple[str, bool]], tokenizer) -> tuple[list[int], list[bool]]:
    """Tokens of the parts in a row, and whether each belongs to a marked part."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    texts = [text for text, _ in parts]
    ids = tokens("".join(texts))
    beginnings = [tokens("".join(texts[: i + 1])) for i in range(len(texts) - 1)] + [ids]
    if any(ids[: len(beginning)] != beginning for beginning in beginnings):
        pieces = [tokens(text) for text in texts]
        lengths = [len(piece) for piece in pieces]
        ids = [token for piece in pieces for token in piece]
    else:
        lengths = np.diff([0, *map(len, beginnings)]).tolist()
    return ids, [marked for length, (_, marked) in zip(lengths, parts, strict=True) for _ in range(length)]
