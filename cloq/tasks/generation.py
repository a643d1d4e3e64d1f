"""Greedy text after prompts, batched by length.

Batches are padded on the left and masked; positions count from each prompt's own first token, so padding changes no text. A row ends at an
end-of-text token, at a stop string, or after `max_new_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cloq.errors import TaskError
from cloq.tasks.model import TaskModel
from cloq.tasks.rows import Asked, TaskRows
from cloq.tasks.spec import RowResult

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prompt:
    """ids: the tokens. truncated: its beginning was left out."""

    ids: tuple[int, ...]
    truncated: bool = False


def encode_prompt(model: TaskModel, text: str, max_new_tokens: int, special: bool = True) -> Prompt:
    """special: the tokenizer adds its begin-of-text token (a chat template has written its own). What leaves no room for the answer loses
    its beginning; `TaskError` if there is room for no prompt at all."""
    ids = model.tokenizer(text, add_special_tokens=special, verbose=False).input_ids or [model.start]
    room = room_beside(max_new_tokens, model.max_positions)
    return Prompt(tuple(ids)) if room is None else Prompt(tuple(ids[-room:]), len(ids) > room)


def room_beside(max_new_tokens: int, limit: int | None) -> int | None:
    """Tokens that a context of `limit` leaves for a prompt; `None` without a limit. Raises `TaskError` if that is none."""
    if limit is not None and limit <= max_new_tokens:
        raise TaskError(f"{max_new_tokens} new tokens do not fit a context of {limit}; lower --max-new-tokens")
    return None if limit is None else limit - max_new_tokens


def generate_texts(
    model: TaskModel, prompts: Sequence[Prompt], stop: Sequence[str], max_new_tokens: int, batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[str]:  # fmt: skip
    """The texts after the prompts, in their order, cut before the first stop string. batch_tokens: padded tokens, new ones among them."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].ids))
    texts: dict[int, str] = {}
    while len(texts) < len(prompts):
        longest = len(prompts[order[len(texts)]].ids) + max_new_tokens
        batch = order[len(texts) : len(texts) + max(1, batch_tokens // longest)]
        new = _generate(model, [prompts[number].ids for number in batch], stop, max_new_tokens)
        for number, ids in zip(batch, new, strict=True):
            texts[number] = cut(_decode(model, ids), stop)
        if progress is not None:
            progress(len(texts), len(prompts))
    return [texts[number] for number in range(len(prompts))]


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


@torch.inference_mode()
def _generate(model: TaskModel, prompts: list[tuple[int, ...]], stop: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    from transformers import GenerationConfig, StoppingCriteriaList

    longest, padding = max(map(len, prompts)), model.end[0] if model.end else model.start
    tokens = torch.full((len(prompts), longest), padding, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, (ids, seen) in enumerate(zip(tokens, mask, strict=True)):
        ids[longest - len(prompts[row]) :] = torch.tensor(prompts[row])
        seen[longest - len(prompts[row]) :] = 1
    plain = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(model.end) or None, pad_token_id=padding)
    with _generating_by(model, plain):
        output = model.model.generate(
            input_ids=tokens.to(model.device),
            attention_mask=mask.to(model.device),
            stopping_criteria=StoppingCriteriaList([_Stop(model, stop, longest)]),
        )
    return output[:, longest:].tolist()


@contextmanager
def _generating_by(model: TaskModel, settings) -> Iterator[None]:
    """The model's own settings may sample, or punish repetition: they are put aside meanwhile."""
    own, model.model.generation_config = model.model.generation_config, settings
    try:
        yield
    finally:
        model.model.generation_config = own


class _Stop:
    """Rows whose new text holds a stop string are done."""

    def __init__(self, model: TaskModel, stop: Sequence[str], start: int):
        self._model, self._stop, self._start = model, tuple(stop), start

    def __call__(self, tokens: Tensor, scores, **_) -> Tensor:
        texts = [_decode(self._model, ids) for ids in tokens[:, self._start :].tolist()]
        return torch.tensor([any(one in text for one in self._stop) for text in texts], device=tokens.device)


def _decode(model: TaskModel, ids: list[int]) -> str:
    """New tokens as text, up to the first that ends it."""
    at = next((i for i, token in enumerate(ids) if token in model.end), len(ids))
    return model.tokenizer.decode(ids[:at], skip_special_tokens=True)


# -- rows --------------------------------------------------------------------------------------------------------------


def answer_questions(
    model: TaskModel, rows: TaskRows, batch_tokens: int = 4096, max_new_tokens: int | None = None, chat: bool = False,
    progress: Progress | None = None,
) -> list[RowResult]:  # fmt: skip
    """Every row's result, in order. chat: the row's own words go through the tokenizer's chat template, instead of the task's prompt."""
    most = max_new_tokens or rows.task.max_new_tokens
    texts_asked = [chat_prompt(model, row.item.instruction) if chat else row.item.prompt for row in rows.rows]
    prompts = [encode_prompt(model, text, most, special=not chat) for text in texts_asked]
    texts = generate_texts(model, prompts, rows.task.stop, most, batch_tokens, progress)
    return [_result(rows, *one) for one in zip(rows.rows, prompts, texts, strict=True)]


def _result(rows: TaskRows, row: Asked, prompt: Prompt, text: str) -> RowResult:
    metrics, detail = rows.task.judge(text, row.item), {"text": text, "gold": list(row.item.golds)}
    return RowResult(rows.task.name, row.index, row.key, rows.protocol, metrics, prompt.truncated, detail)


def chat_prompt(model: TaskModel, instruction: str) -> str:
    """The instruction as a user's turn, up to where the assistant's begins."""
    if not model.tokenizer.chat_template:
        raise TaskError("the model's tokenizer has no chat template; leave --chat out")
    try:
        return model.tokenizer.apply_chat_template([{"role": "user", "content": instruction}], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it raises what its author chose
        raise TaskError(f"the tokenizer's chat template refuses a row ({str(error).splitlines()[0][:200]}); leave --chat out") from error
