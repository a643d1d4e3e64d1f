"""`cloq train`: flags made from `TrainSpec`, a bar that shows the loss, and a few lines about what came of it."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cloq.cli.app import Json, Quiet, app
from cloq.cli.progress import Emit
from cloq.cli.settings import Flag, with_flags
from cloq.errors import CloqError
from cloq.training.recipes import FAMILIES
from cloq.training.spec import DEVICES, LONG, OPTIMIZERS, PACKINGS, PRECISIONS, REPORTS, SCHEDULES, TrainSpec

PANELS: dict[str, dict[str, str]] = {
    "Run": {
        "recipe": f"Settings to start from: {', '.join(FAMILIES)}, or with a width (gsm8k-2bit). Flags win over it.",
        "base": "Another base than the run's; the adapter must belong to it.",
        "adapter": "Another adapter than the run's, such as one trained before.",
        "device": f"{', '.join(DEVICES)}.",
        "report_to": f"Also log to (repeatable): {', '.join(REPORTS)}.",
        "seed": "Of order, dropout and held-out rows.",
        "trust_remote_code": "Run Python code that comes with the model.",
    },
    "Data": {
        "data": "Rows or text: a file or folder (.jsonl, .json, .parquet, .txt), a hub data set, wikitext2, c4, …",
        "eval_data": "For evaluation: any such source.",
        "eval_share": "Rows of the data held out for evaluation instead, as a share.",
        "column": "Column of plain text or conversations, where it is not found by itself.",
        "prompt_column": "Column of the prompt.",
        "context_column": "Column of what the prompt refers to.",
        "answer_column": "Column of the answer.",
        "template": "The prompt as text with {column} in it; \\n is a line break. Default: the tokenizer's chat template, or plain text.",
        "teacher": "Follow the predictions of a model: a folder, a hub id, or 'original', the run's own 16-bit model.",
        "distill": "The teacher's share of the loss; the rest is the text's own tokens.",
        "completion_only": "Only answers count in the loss.",
        "packing": f"{', '.join(PACKINGS)}: whole rows that share a sequence, or a stream of text that is cut.",
        "seq_len": "Tokens per sequence, at most.",
        "long": f"What happens to longer rows: {', '.join(LONG)}.",
    },
    "Training": {
        "epochs": "Passes over the data.",
        "steps": "Steps, instead of epochs.",
        "batch_size": "Sequences per process and forward.",
        "accumulation": "Forwards per step.",
        "lr": "Learning rate, at its highest.",
        "schedule": f"Of the learning rate: {', '.join(SCHEDULES)}.",
        "warmup": "Share of the steps.",
        "weight_decay": "On the factors; acts on the compensation of the quantization error too.",
        "dropout": "On the factors' input; switches parts of the compensation off.",
        "optimizer": f"{', '.join(OPTIMIZERS)}.",
        "max_grad_norm": "Larger gradients are scaled down to it.",
        "gradient_checkpointing": "Less memory, a third more time.",
        "precision": f"{', '.join(PRECISIONS)}.",
    },
    "Rhythm": {
        "eval_every": "Steps between evaluations; 0 is every epoch.",
        "save_every": "Steps between checkpoints; 0 is every epoch.",
        "save_limit": "Checkpoints that are kept.",
    },
}


def _flags() -> Iterator[Flag]:
    hints, defaults = typing.get_type_hints(TrainSpec), {f.name: f.default for f in dataclasses.fields(TrainSpec)}
    for panel, helps in PANELS.items():
        for name, text in helps.items():
            kinds = [k for k in (typing.get_args(hints[name]) or (hints[name],)) if k is not types.NoneType]
            several = typing.get_origin(hints[name]) is tuple
            shown = False if several or defaults[name] in (None, "") else str(defaults[name])
            yield Flag(name, list[str] if several else kinds[0], text, shown, panel)


def _converted(name: str, value: Any) -> Any:
    if name == "template":
        return value.replace("\\n", "\n")  # shells have no easy way to write a line break
    return tuple(value) if isinstance(value, list) else value


@app.command()
@with_flags(list(_flags()), _converted)
def train(
    run: Annotated[Path | None, typer.Argument(metavar="OUT", help="Folder of a finished run.", show_default=False)] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder of the trained adapter.", show_default="OUT/trained")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A train.yaml to start from; flags win over it.", show_default=False)
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an earlier training in that folder and start over.")] = False,
    quiet: Quiet = False,
    json: Json = False,
    settings: dict[str, Any] = {},  # noqa: B006 - never mutated; filled by with_flags
) -> None:
    """Fine-tune the adapter of a finished run on the packed base. A killed training continues with the same command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from cloq.streaming.distributed import is_first

    try:
        _train(run, to, config, restart, "json" if json else "quiet" if quiet else "bar", settings)
    except CloqError as error:
        if is_first():
            raise
        raise typer.Exit(2) from error  # said once, by the first process


def _train(run: Path | None, to: Path | None, config: Path | None, restart: bool, mode: str, settings: dict[str, Any]) -> None:
    from cloq.cli.progress import progress
    from cloq.training import resolve

    spec = resolve(run, config, settings)  # before the heavy imports
    from cloq.models import quiet_libraries

    quiet_libraries()
    from cloq.streaming.distributed import is_first
    from cloq.training.run import run as execute

    with progress(mode if is_first() else "quiet", _bar) as emit:
        result = execute(spec, to, restart=restart, emit=emit)
        emit("done", {"adapter": str(result.adapter), "steps": len(result.report["steps"]), "seconds": result.report["seconds"]})
    if mode == "bar" and is_first():
        print("\n".join(summary(result)))


def summary(result) -> list[str]:
    """What a person wants to know at the end."""
    report = result.report
    steps, evaluations = report["steps"], report["evaluations"]
    first, last = steps[0]["loss"], steps[-1]["loss"]
    course = f"{first:.4f} → {last:.4f} in {len(steps)} steps" if len(steps) > 1 else f"{first:.4f} before the one step"
    lines = [f"loss        {course}, {report['seconds']:.0f} s"]
    if evaluations:
        first, last = evaluations[0]["loss"], evaluations[-1]["loss"]
        lines.append(f"evaluation  {first:.4f} → {last:.4f} nats per token (perplexity {_perplexity(first)} → {_perplexity(last)})")
    lines.append(f"adapter     {result.adapter.resolve()}")
    lines.append(f"use it      cloq.load({str(result.spec.run)!r}, adapter={str(result.adapter)!r})")
    return lines


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 700 else "infinite"


@contextmanager
def _bar() -> Iterator[Emit]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = [TextColumn("training"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn()]
    with Progress(*columns, TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"), console=console) as bars:
        task = bars.add_task("training", total=None, note="", visible=False)

        def emit(event: str, values: dict[str, Any]) -> None:
            if event == "start":
                for line in data_lines(values):
                    console.print(line, highlight=False)
                bars.update(task, visible=True)
            elif event == "step":
                bars.update(task, completed=values["step"], total=values["steps"], note=f"loss {values['loss']:.4f}")
            elif event == "eval":
                console.print(f"step {values['step']}: evaluation loss {values['loss']:.4f}", highlight=False)

        yield emit


def data_lines(values: dict[str, Any]) -> list[str]:
    """What was read, and what became of rows that did not fit."""
    lines = [f"continued after step {values['continued']}"] if values["continued"] else []
    for name, counts in (("data", values["data"]), ("evaluation", values["eval_data"])):
        if counts is None:
            continue
        rows = (
            f"{counts['rows']} rows, {counts['examples']} sequences"
            if counts["rows"]
            else f"{counts['examples']} other sequences of these rows"
        )
        what = f"{rows}, {counts['tokens']} tokens, {counts['predicted']} of them predicted"
        notes = [f"{counts['empty']} rows without text or answer left out"] if counts["empty"] else []
        if counts["long"]:
            notes.append(f"{counts['long']} rows of more than {values['seq_len']} tokens: --long {values['long']}")
        if counts["dropped"]:
            notes.append(f"{counts['dropped']} rows left out, no answer within {values['seq_len']} tokens")
        if counts["leftover"]:
            notes.append(f"{counts['leftover']} tokens at the end fill no sequence")
        lines.append("; ".join([f"{name}: {what}", *notes]))
    return lines
