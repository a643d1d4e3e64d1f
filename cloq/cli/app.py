"""The sub-commands. Each reads as: resolve what was asked, call one function, print what came of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cloq import __version__
from cloq.cli.settings import default_out, resolve, with_settings, with_settings_of_factors
from cloq.specs import RunSpec
from cloq.streaming.distributed import Processes

app = typer.Typer(
    name="cloq",
    help="Quantize a causal LLM to 2-4 bits and start its LoRA adapters where they undo the most of the damage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str | None, typer.Argument(help="Hub id or folder. Default: the embedded SmolLM2-135M-Instruct.", show_default=False)]
Config = Annotated[Path | None, typer.Option("--config", help="A run.yaml to start from; flags win over it.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run.", show_default="./MODEL-Nbit-INIT")]
Restart = Annotated[bool, typer.Option("--restart", help="Discard what is in the folder of the run and start over.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output instead of a progress bar and tables.")]
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
    restart: Restart = False,
    format: Annotated[str | None, typer.Option("--format", help="Of the base in OUT/model.", show_default="gptq")] = None,
    quiet: Quiet = False,
    json: Json = False,
    settings: dict[str, Any] = {},  # noqa: B006 - never mutated; filled by with_settings
) -> None:
    """Quantize a model, fit its factors, and write base, adapter and report into OUT. A killed run continues with the same command."""
    _run(lambda: resolve(model, config, settings), out, restart, format, quiet, json)


@app.command()
@with_settings_of_factors
def init(
    dense: Annotated[str, typer.Option("--dense", help="The original 16-bit model: hub id or folder.", show_default=False)],
    quantized: Annotated[
        str, typer.Option("--quantized", help="A base quantized by someone else: GPTQ, NF4, compressed-tensors.", show_default=False)
    ],
    out: Out = None,
    restart: Restart = False,
    quiet: Quiet = False,
    json: Json = False,
    settings: dict[str, Any] = {},  # noqa: B006
) -> None:
    """Fit factors to a base that someone else quantized, read exactly as it decodes. Writes OUT/adapter; the base is left alone."""
    _run(lambda: resolve(dense, None, settings | {"quantized": quantized}), out, restart, None, quiet, json)


def _run(resolved: Callable[[], RunSpec], out: Path | None, restart: bool, format: str | None, quiet: bool, json: bool) -> None:
    processes = Processes.start()
    with processes.together():  # what is wrong with the settings is said once
        spec = resolved()
    from cloq.api import run
    from cloq.cli.progress import progress
    from cloq.models import quiet_libraries
    from cloq.report import summary_lines

    quiet_libraries()
    with progress("quiet" if quiet or not processes.first else "json" if json else "bar") as emit:
        result = run(spec, out or default_out(spec), restart=restart, emit=emit, form=format)
        emit("done", {"out": str(result.out), "base": str(result.base), "adapter": str(result.adapter), "seconds": result.seconds})
    if processes.first and not quiet and not json:
        print("\n".join(summary_lines(result.report, result.out)))


@app.command()
@with_settings
def plan(model: Model = None, config: Config = None, json: Json = False, settings: dict[str, Any] = {}) -> None:  # noqa: B006
    """Print the work, time, memory and disk that a run will take, before anything starts."""
    from cloq.api import open_decoder
    from cloq.models import quiet_libraries
    from cloq.plan import plan as make_plan

    quiet_libraries()
    spec = resolve(model, config, settings)
    made = make_plan(spec, open_decoder(spec))
    _print(made.to_dict(), made.lines(), json)


@app.command()
def export(
    out: Run,
    format: Annotated[str | None, typer.Option("--format", help="gptq, dense, nf4, compressed-tensors, container.")] = None,
    one_rank: Annotated[bool, typer.Option("--one-rank", help="The adapter, padded to one rank, for servers that need that.")] = False,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Of --one-rank.", show_default="OUT/adapter")] = None,
    target: Annotated[
        Path | None, typer.Option("--to", help="Folder to write.", show_default="OUT/model-FORMAT, OUT/adapter-one-rank")
    ] = None,
) -> None:
    """Write the base of a finished run in another format, or its adapter with one rank."""
    from cloq import api
    from cloq.errors import SpecError
    from cloq.models import quiet_libraries

    if one_rank == (format is not None):
        raise SpecError("name what to write: --format gptq (dense, nf4, compressed-tensors, container) for the base, or --one-rank")
    if adapter is not None and not one_rank:
        raise SpecError("--adapter is of --one-rank; the base is the same for every adapter")
    quiet_libraries()
    print(f"wrote {api.export_one_rank(out, adapter, target) if one_rank else api.export(out, format, target)}")


@app.command()
def check(out: Run, json: Json = False) -> None:
    """Check that base and adapter are complete, belong together and decode to what was fitted. Exit code 1 if they don't."""
    from cloq.errors import RunError
    from cloq.models import quiet_libraries
    from cloq.use.check import check as findings_of

    quiet_libraries()
    if not out.is_dir():
        raise RunError(f"{out} is not a folder; name the folder of a finished run")
    findings = findings_of(out)
    _print([{"ok": f.ok, "what": f.what} for f in findings], [f"{'ok  ' if f.ok else 'FAIL'}  {f.what}" for f in findings], json)
    raise typer.Exit(0 if all(f.ok for f in findings) else 1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")] = Path("out-demo"),
    restart: Restart = False,
) -> None:
    """Quantize the embedded default model to 2 bits, evaluate it and generate a sentence, all within minutes on two cores."""
    from cloq.cli.demo import run_demo
    from cloq.models import quiet_libraries

    quiet_libraries()
    run_demo(out, restart)


def _print(values: Any, lines: list[str], as_json: bool) -> None:
    import json

    print(json.dumps(values, indent=1) if as_json else "\n".join(lines))
