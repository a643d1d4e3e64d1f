"""`cloq eval`: perplexity and tasks, of a run's models, of any other model, or of several beside each other."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from cloq.cli.app import app
from cloq.cli.use import TrustCode

TEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test"
ROWS_FILE = "evaluation.jsonl"
_TASKS, _COMPARE = "Tasks", "Comparison"

Models = Annotated[list[str], typer.Argument(metavar="OUT", help="Folder of a finished run, of an adapter or of a model; or a hub id.")]
Text = Annotated[str | None, typer.Option("--text", help="Evaluation text: a file, or any source that --calib takes.", show_default=TEXT)]
TextColumn = Annotated[
    str | None, typer.Option("--text-column", help="Column of the text, where it is not found by itself.", show_default=False)
]
SeqLen = Annotated[
    int | None,
    typer.Option("--seq-len", help="Tokens per sequence; part of the protocol's name.", show_default="2048, or the model's context"),
]
Samples = Annotated[int | None, typer.Option("--samples", help="Only the first sequences.", show_default="all")]
Dense = Annotated[bool, typer.Option("--dense/--no-dense", help="Also the 16-bit model that the run started from.")]
Adapters = Annotated[
    list[str],
    typer.Option("--adapter", help="Also the base with this adapter, PATH or NAME=PATH (repeatable).", show_default=False),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output instead of tables.")]
Tasks = Annotated[
    str | None, typer.Option("--tasks", help="Names with commas: arc_easy,piqa; cloq's own or lm-eval's.", rich_help_panel=_TASKS)
]
Data = Annotated[
    list[str], typer.Option("--task-data", help="File or folder of the tasks' data, or TASK=PATH (repeatable).", rich_help_panel=_TASKS)
]
Limit = Annotated[
    int | None, typer.Option("--limit", help="Rows of each task, drawn by the seed.", show_default="all", rich_help_panel=_TASKS)
]
Shots = Annotated[int | None, typer.Option("--shots", help="Examples before each row.", show_default="the task's", rich_help_panel=_TASKS)]
Seed = Annotated[int, typer.Option("--seed", help="Of rows, examples and intervals.", rich_help_panel=_TASKS)]
BatchTokens = Annotated[int, typer.Option("--batch-tokens", help="Tokens per forward.", rich_help_panel=_TASKS)]
NewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", help="Of a generated answer.", show_default="the task's", rich_help_panel=_TASKS)
]
Chat = Annotated[bool, typer.Option("--chat", help="Every row through the tokenizer's chat template.", rich_help_panel=_TASKS)]
Harness = Annotated[bool, typer.Option("--harness", help="By lm-eval, also tasks that cloq has itself.", rich_help_panel=_TASKS)]
Include = Annotated[Path | None, typer.Option("--include", help="Folder with lm-eval tasks of your own (YAML).", rich_help_panel=_TASKS)]
Decoded = Annotated[
    bool | None,
    typer.Option(
        "--decoded/--packed", help="Decode a packed base once into a dense model, or run its own kernels.",
        show_default="decoded on a CPU, else packed", rich_help_panel=_TASKS,
    ),
]  # fmt: skip
Rows = Annotated[Path | None, typer.Option("--rows", help="Keep every row's result here.", show_default=f"OUT/{ROWS_FILE}")]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare", help="Several models: runs, adapters, folders, stored rows, each PATH or NAME=PATH.", rich_help_panel=_COMPARE
    ),
]


@app.command(name="eval")
def evaluate(
    models: Models,
    text: Text = None,
    text_column: TextColumn = None,
    seq_len: SeqLen = None,
    samples: Samples = None,
    dense: Dense = True,
    adapter: Adapters = [],  # noqa: B006 - never mutated
    tasks: Tasks = None,
    task_data: Data = [],  # noqa: B006
    limit: Limit = None,
    shots: Shots = None,
    seed: Seed = 0,
    batch_tokens: BatchTokens = 4096,
    max_new_tokens: NewTokens = None,
    chat: Chat = False,
    harness: Harness = False,
    include: Include = None,
    decoded: Decoded = None,
    compare: Compare = False,
    rows: Rows = None,
    device: Device = "auto",
    trust_remote_code: TrustCode = False,
    json: Json = False,
) -> None:
    """Perplexity, and accuracy on tasks, of the 16-bit model, the base alone and the base with its adapter; or of any other models."""
    from cloq.benchmark import Asked, TextSettings, look
    from cloq.benchmark import evaluate as evaluated
    from cloq.cli.progress import counting
    from cloq.models import quiet_libraries
    from cloq.specs import require_seed
    from cloq.streaming.device import resolve_device
    from cloq.tasks import TaskSettings, prepare

    quiet_libraries()
    require_seed("--seed", seed)
    measured = TextSettings(text or TEXT, seq_len, samples, text_column)
    if tasks is not None:
        names = tuple(name.strip() for name in tasks.split(",") if name.strip())
        settings = TaskSettings(names, _data(task_data), limit, shots, seed, batch_tokens, max_new_tokens, chat, harness, include)
    subjects = _subjects(models, compare, adapter, dense)
    running = any(subject.base is not None for subject in subjects)
    run = None if compare else _run_folder(models[0])
    kept = (rows or (run / ROWS_FILE if run else None)) if running else None
    _refuse_unusable(run if running else None, kept)
    device = resolve_device(device)
    asked = Asked(
        measured if running and (text is not None or tasks is None) else None,
        prepare(settings) if running and tasks is not None else None,
        device,
        device == "cpu" if decoded is None else decoded,
        trust_remote_code,
    )
    for note in [rows.note for rows in asked.tasks.own if rows.note] if asked.tasks is not None else ():
        print(f"note: {note}", file=sys.stderr)
    with redirect_stdout(sys.stderr):  # libraries print there what is no result
        texts = look(subjects, asked)
        with counting("evaluating", quiet=json) as count:
            outcomes = evaluated(subjects, asked, texts, count)
    _keep(outcomes, run, kept)
    _print(outcomes, compare, seed, kept, json)


def _subjects(models: list[str], compare: bool, adapters: list[str], dense: bool) -> list:
    from cloq.benchmark import compared, subjects_of
    from cloq.errors import SpecError

    if compare:
        if adapters:
            raise SpecError("--adapter and --compare do not go together; name the adapter's folder among the models")
        return compared(models)
    if len(models) > 1:
        raise SpecError(f"{len(models)} models are named; to set them beside each other: cloq eval --compare {' '.join(models)}")
    return subjects_of(models[0], adapters, dense)


def _data(arguments: list[str]) -> dict[str, Path]:
    """`PATH` serves every task, `TASK=PATH` the one."""
    found: dict[str, Path] = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not separator or "/" in name or os.path.exists(argument):
            name, path = "", argument
        found[name] = Path(os.path.expanduser(path))
    return found


def _run_folder(model: str) -> Path | None:
    from cloq.benchmark import is_run

    return Path(model) if is_run(Path(model)) else None


def _refuse_unusable(run: Path | None, rows: Path | None) -> None:
    """Of what results will be added to, before there are any."""
    from cloq.report import read_report
    from cloq.tasks.records import refuse_unusable

    if run is not None:
        read_report(run)
    if rows is not None:
        refuse_unusable(rows)


def _keep(outcomes: list, run: Path | None, rows: Path | None) -> None:
    """In the run's report, and row by row in a file."""
    from cloq.report import add_quality, add_tasks
    from cloq.tasks.records import write_records

    quality, scores = ([one for outcome in outcomes for one in getattr(outcome, key)] for key in ("quality", "scores"))
    if run is not None and quality:
        add_quality(run, quality)
    if run is not None and scores:
        add_tasks(run, scores)
    computed = {outcome.subject.label: outcome.rows for outcome in outcomes if outcome.subject.base is not None}
    if rows is not None and computed:
        write_records(rows, computed)


def _print(outcomes: list, compare: bool, seed: int, rows: Path | None, as_json: bool) -> None:
    import json

    from cloq.benchmark import all_scores, comparisons
    from cloq.report import comparison_dict, quality_lines, score_lines

    quality = [one for outcome in outcomes for one in outcome.quality]
    scores = [one for outcome in outcomes for one in (all_scores(outcome, seed) if compare else outcome.scores)]
    tests = comparisons(outcomes, seed) if len(outcomes) > 1 and scores else []
    if as_json:
        found: Any = [one.to_dict() for one in (*quality, *scores)]
        found = found if not tests else {"results": found, "comparisons": [comparison_dict(one) for one in tests]}
        print(json.dumps(found, indent=1))
        return
    lines = quality_lines(quality) if quality and not compare else []
    lines += score_lines(scores, tests) if scores else []
    print("\n".join([*lines, *([f"every row: {rows}"] if rows and scores else [])]))
