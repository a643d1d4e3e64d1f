"""`cloq merge` and `cloq generate`: what a finished run is for, short of training it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cloq.cli.app import Json, Run, _print, app
from cloq.errors import CloqError, SpecError

Adapter = Annotated[Path | None, typer.Option("--adapter", help="Another adapter, such as a trained one.", show_default="OUT/adapter")]
Base = Annotated[Path | None, typer.Option("--base", help="Another base.", show_default="OUT/model, else the one that the adapter names")]
TrustCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]


@app.command()
def merge(
    out: Run,
    target: Annotated[Path, typer.Option("--to", help="Folder to write.", show_default=False)],
    adapter: Adapter = None,
    base: Base = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the merged model: bfloat16, float16, float32.")] = "bfloat16",
    packed: Annotated[bool, typer.Option("--packed", help="Into the packed base: refused, with what it would cost.")] = False,
    trust_remote_code: TrustCode = False,
    json: Json = False,
) -> None:
    """Write base and adapter as one dense model, which loads and serves like any other."""
    from cloq.cli.progress import counting
    from cloq.models import quiet_libraries
    from cloq.use.merging import merge as write

    quiet_libraries()
    _mention_trained(out, adapter)
    with counting("merging", quiet=json) as count:
        merged = write(
            out, target, adapter=adapter, base=base, dtype="packed" if packed else dtype, trust_remote_code=trust_remote_code,
            progress=lambda done, total: count("layers", done, total),
        )  # fmt: skip
    _print(merged.to_dict(), merged.lines(), json)


@app.command()
def generate(
    out: Run,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue; - reads standard input.", show_default="ask again and again")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    adapter: Adapter = None,
    base: Base = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also the 16-bit model and the base alone.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="At most.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Share of probability to draw from.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    trust_remote_code: TrustCode = False,
) -> None:
    """See what base and adapter write, as they write it, through the libraries that you will load them with."""
    from cloq.models import quiet_libraries
    from cloq.use.generating import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    text = _prompt(prompt, compare)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling the packed kernels takes longer than a short text, and a C++ compiler
    quiet_libraries()
    try:
        _mention_trained(out, adapter)
        talk = _Talk(out, adapter, base, device, trust_remote_code, sampling, chat)
        if text is None:
            talk.converse()
        elif compare:
            talk.compare(text)
        else:
            talk.answer(text)
    except KeyboardInterrupt:
        print()
        raise SystemExit(130) from None  # without the word of main() on runs that can be continued


def _mention_trained(out: Path, adapter: Path | None) -> None:
    """The initial factors are what is meant without a word; where there are trained ones too, perhaps not."""
    trained = out / "trained"
    if adapter is None and (trained / "adapter_config.json").is_file():
        print(f"note: this is {out / 'adapter'}, as it was before training; --adapter {trained} takes the trained one", file=sys.stderr)


def _prompt(prompt: str | None, compare: bool) -> str | None:
    """The text, or `None` for a loop of questions."""
    if prompt == "-":
        prompt = sys.stdin.read()
    elif prompt is None and (compare or not sys.stdin.isatty()):
        why = "--compare needs a prompt" if compare else "no prompt, and standard input is not a terminal to ask for one"
        raise SpecError(f"{why}; give --prompt TEXT, or --prompt - to read it from standard input")
    if prompt is not None and not prompt.strip():
        raise SpecError("the prompt is empty; give some text to --prompt")
    return prompt


class _Talk:
    """One command's conversation: what it is had with, and on which terms. The tokenizer comes first and the model when a prompt has
    been found to be good."""

    def __init__(self, out: Path, adapter: Path | None, base: Path | None, device: str, trust: bool, sampling, chat: bool):
        from cloq.export.peft import AdapterFolder
        from cloq.export.read import read_config
        from cloq.models import load_config, load_tokenizer, max_positions
        from cloq.streaming.device import resolve_device
        from cloq.use.pairing import base_folder, refuse_unfit

        device = resolve_device(device)
        self.out, self.sampling, self.chat = out, sampling, chat
        factors = AdapterFolder(adapter or out / "adapter")
        folder = base or base_folder(out, factors)
        read_config(folder)  # a path that is no model folder should not be looked for on the hub
        refuse_unfit(factors, folder, None if base else out, trust)  # before the 16-bit model is loaded to be compared with
        self.limit = max_positions(load_config(folder, trust))
        self.tokenizer = load_tokenizer(folder, trust)
        self.options = {"trust_remote_code": trust} | ({} if device == "cpu" else {"device_map": {"": device}})
        self.where = {"base": base, "adapter": adapter}

    def answer(self, text: str) -> None:
        ids = self._ids(text)
        self._say(self._load(), ids)

    def compare(self, text: str) -> None:
        from cloq.api import RUN_FILE, read_run_file
        from cloq.models import locate
        from cloq.use.generating import with_each

        ids, spec = self._ids(text), read_run_file(self.out / RUN_FILE)

        def say(name: str, model) -> None:
            print(f"[{name}]")
            self._say(model, ids)

        with_each(self.out, locate(spec.model, spec.revision), say, **self.where, **self.options)

    def converse(self) -> None:
        """Prompt after prompt until the input ends; with --chat a conversation that remembers. Ctrl-C stops an answer, and between
        answers it ends."""
        self._ids("a")  # a missing chat template is said before the model is loaded
        model, messages = self._load(), []
        while (text := _line()) is not None:
            if not text.strip():
                continue
            messages.append({"role": "user", "content": text})
            try:
                reply = self._say(model, self._ids(messages if self.chat else text))
            except CloqError as error:
                print(f"error: {error}", file=sys.stderr)
                messages.pop()
            except KeyboardInterrupt:
                print()
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": reply})

    def _ids(self, prompt: str | list[dict[str, str]]):
        from cloq.use.generating import prompt_ids

        return prompt_ids(
            self.tokenizer, [{"role": "user", "content": prompt}] if self.chat and isinstance(prompt, str) else prompt, self.limit
        )

    def _load(self):
        from cloq.use.loading import load

        return load(self.out, **self.where, **self.options)

    def _say(self, model, ids) -> str:
        from cloq.use.generating import generate

        reply = generate(model, self.tokenizer, ids, self.sampling, lambda text: print(text, end="", flush=True), self.limit)
        print()
        if reply.full:
            print(f"the model's context of {self.limit} tokens is full", file=sys.stderr)
        return reply.text


def _line() -> str | None:
    """What a person types, `None` at the end."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
