"""The sub-commands. Each reads as: resolve what was asked, call one function, print what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from cloq import __version__
from cloq.cli.settings import default_out, resolve, with_settings

app = typer.Typer(
    name="cloq",
    help="Quantize a causal LLM to 2-4 bits and start its LoRA adapters where they undo the most of the damage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[Optional[str], typer.Argument(help="Hub id or folder. Default: the embedded SmolLM2-135M-Instruct.", show_default=False)]
Config = Annotated[Optional[Path], typer.Option("--config", help="A run.yaml to start from; flags win over it.", show_default=False)]
Out = Annotated[Optional[Path], typer.Option("--out", "-o", help="Folder of the run.", show_default="./MODEL-Nbit-cloq")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line on standard output instead of the progress bar.")]
Run = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a finished run.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"cloq {__version__}")
        raise typer.Exit


@app.command()
@with_settings
def quantize(
    model: Model = None,
    out: Out = None,
    config: Config = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what is in the folder of the run and start over.")] = False,
    format: Annotated[Optional[str], typer.Option("--format", help="Of the base in OUT/model.", show_default="gptq")] = None,
    quiet: Quiet = False,
    json: Json = False,
    settings: dict[str, Any] = {},  # noqa: B006 - never mutated; filled by with_settings
) -> None:
    """Quantize a model, fit its factors, and write OUT/model, OUT/adapter and a report. A killed run continues with the same command."""
    from cloq.api import run
    from cloq.cli.progress import progress

    spec = resolve(model, config, settings)
    with progress("json" if json else "quiet" if quiet else "bar") as emit:
        result = run(spec, out or default_out(spec), restart=restart, emit=emit, form=format)
    if not quiet and not json:
        print(f"{result.seconds:.0f} s; base {result.model}, adapter {result.adapter}")
