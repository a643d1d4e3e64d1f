"""A look at what a model writes: a prompt → tokens → text as it comes, through transformers' own `generate`.

ids = prompt_ids(tokenizer, "Once upon a time", limit=2048)
said = generate(model, tokenizer, ids, Sampling(), on_text=print)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cloq.errors import ModelError, SpecError
from cloq.specs import require_seed
from cloq.use.loading import default_dtype, load

Messages = list[dict[str, str]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Sampling:
    """max_new_tokens: at most. temperature: 0 always takes the likeliest token. top_p: the share of probability that is drawn from.
    seed: equal seeds draw equal tokens. What else the model's generation_config.json asks for, such as end tokens, stays."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise SpecError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature <= 100:
            raise SpecError(f"temperature is {self.temperature}; allowed: 0 (always the likeliest token) to 100, 0.7 is usual")
        if not 0 < self.top_p <= 1:
            raise SpecError(f"top_p is {self.top_p}; it is a share of probability, above 0 and at most 1")
        if self.top_p < 1 and self.temperature == 0:
            raise SpecError(f"top_p is {self.top_p}, but at temperature 0 nothing is drawn; set a temperature, such as 0.7")
        require_seed("seed", self.seed)

    def arguments(self) -> dict[str, Any]:
        """For transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class Reply:
    """text: what was written, without the prompt. full: it was cut off because the model's context was."""

    text: str
    full: bool


def prompt_ids(tokenizer, prompt: str | Messages, limit: int | None):
    """`{"input_ids", "attention_mask"}` of a text to be continued, or of a conversation to be answered, which goes through the chat
    template. limit: tokens that the model takes.

    Raises `SpecError` for an empty prompt, one that leaves no room for an answer, and a conversation without a template for it.
    """
    chat = not isinstance(prompt, str)
    if not (prompt[-1]["content"] if chat else prompt).strip():
        raise SpecError("the prompt is empty; give some text")
    ids = _chat_ids(tokenizer, prompt) if chat else tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, verbose=False)
    length = ids["input_ids"].shape[1]
    if length == 0:
        raise SpecError("the prompt has no tokens for this model's tokenizer; give other text")
    if limit is not None and length >= limit:
        what = "conversation" if chat and len(prompt) > 1 else "prompt"
        raise SpecError(f"the {what} has {length} tokens, but the model takes at most {limit}, its answer included; shorten it")
    return ids


def _chat_ids(tokenizer, messages: Messages):
    if not tokenizer.chat_template:
        raise SpecError("the model's tokenizer has no chat template (a base model rarely has one); leave out --chat to continue plain text")
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    except Exception as error:  # a template is a program: it raises what its author chose
        raise ModelError(f"the tokenizer's chat template refuses the conversation ({str(error).splitlines()[0][:200]})") from error


def generate(model, tokenizer, ids, sampling: Sampling, on_text: Callable[[str], None], limit: int | None = None) -> Reply:
    """Lets a model continue, and hands over text as soon as it is certain. Changes neither the model nor the random state.

    limit: as in `prompt_ids`; fewer than `max_new_tokens` are written where it leaves no room for them.
    """
    import torch
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            parts.append(text)
            on_text(text)

    parts: list[str] = []
    length = ids["input_ids"].shape[1]
    most = sampling.max_new_tokens if limit is None else min(sampling.max_new_tokens, limit - length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sampling.seed)
        output = model.eval().generate(
            **{name: tensor.to(model.device) for name, tensor in ids.items()},
            **sampling.arguments(),
            max_new_tokens=most,
            pad_token_id=pad,
            streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    return Reply("".join(parts), most < sampling.max_new_tokens and output.shape[1] - length == most)


def load_dense(folder: str | Path, **kwargs):
    """A model that is not quantized through plain transformers, in the precision that `cloq.load` would choose."""
    from transformers import AutoModelForCausalLM

    from cloq.export.read import read_config

    kwargs.setdefault("dtype", default_dtype(read_config(Path(folder))))
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def with_each(out: str | Path, dense: Path, use: Callable[[str, Any], Result], *, base=None, adapter=None, **kwargs) -> list[Result]:
    """What `use` makes of the 16-bit model, the base alone and the base with its adapter, by name and one after the other: the first
    is freed before the others, which are one, are loaded. Further arguments are `cloq.load`'s."""
    results = [use("16-bit", load_dense(dense, **kwargs))]
    model = load(out, base=base, adapter=adapter, **kwargs)
    with model.disable_adapter():
        results.append(use("base", model))
    return [*results, use("base + adapter", model)]
