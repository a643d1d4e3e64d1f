"""`cloq merge` and `cloq generate`: what a finished run is for, short of training it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloq.cli.app import Json, Run, app

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
    from cloq.cli.app import _print
    from cloq.cli.progress import counting
    from cloq.merging import merge as write
    from cloq.models import quiet_libraries

    quiet_libraries()
    with counting("merging", quiet=json) as count:
        merged = write(
            out, target, adapter=adapter, base=base, dtype="packed" if packed else dtype, trust_remote_code=trust_remote_code,
            progress=lambda done, total: count("layers", done, total),
        )  # fmt: skip
    _print(merged.to_dict(), merged.lines(), json)
