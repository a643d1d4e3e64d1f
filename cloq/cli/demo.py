"""`cloq demo`: the whole job on the embedded default model, and what it was worth, in one table."""

from __future__ import annotations

import os
from pathlib import Path

from cloq.specs import RunSpec, run_spec

PROMPT = "The three largest cities of France are"
NEW_TOKENS = 24


def demo_spec() -> RunSpec:
    """2 bits, group 64, rank 64, 48 sequences of 512 tokens of the bundled text: minutes on two cores."""
    return run_spec(bits=2, calib="demo", calib_samples=48, seq_len=512, heldout=0.25)


def run_demo(out: Path, restart: bool) -> None:
    """Quantizes, evaluates on the held-out sequences, generates with plain transformers and PEFT, and prints one table."""
    from rich.console import Console

    from cloq.api import draw_tokens, evaluate_tokens, open_decoder, run
    from cloq.cli.progress import counting, progress

    console = Console()
    spec = demo_spec()
    with progress("bar") as emit:
        result = run(spec, out, restart=restart, emit=emit)
    heldout = draw_tokens(spec, open_decoder(spec)).heldout
    with counting("evaluating") as count:
        quality = evaluate_tokens(out, heldout, "held-out demo text", progress=count)
    with console.status("generating with transformers + peft"):
        sentences = generate_each(result, PROMPT)
    console.print(_table(quality, sentences))
    console.print(_verdict(quality, result))
    console.print(f"base     {result.base}\nadapter  {result.adapter.resolve()}\nreport   {(out / 'report.html').resolve()}")


def generate_each(result, prompt: str) -> list[str]:
    """Greedy continuations by the 16-bit model, the packed base, and base with adapter, through the libraries that users load with."""
    import torch

    from cloq.models import load_tokenizer, locate
    from cloq.use.generating import Sampling, generate, prompt_ids, with_each

    # the packed kernels' compiled path needs a C++ compiler; a short demonstration does without
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    folder = locate(result.spec.model)
    tokenizer = load_tokenizer(folder)
    ids = prompt_ids(tokenizer, prompt, None)

    def sentence(name: str, model) -> str:
        return generate(model, tokenizer, ids, Sampling(NEW_TOKENS), lambda text: None).text

    return with_each(result.out, folder, sentence, dtype=torch.float32)


def _table(quality, sentences: list[str]):
    from rich.table import Table

    table = Table(title=f"perplexity on {quality[0].text} ({quality[0].protocol}), lower is better", title_justify="left")
    table.add_column("model")
    table.add_column("perplexity", justify="right")
    table.add_column(f"“{PROMPT} …”", overflow="fold")
    for row, sentence in zip(quality, sentences, strict=True):
        table.add_row(row.model, f"{row.perplexity:,.1f}", " ".join(sentence.split()))
    return table


def _verdict(quality, result) -> str:
    from cloq.report.tables import from_dense

    return f"with the adapter it is {from_dense(quality)}; mean held-out layer error {result.report.mean('heldout_corrected'):.4f}"
