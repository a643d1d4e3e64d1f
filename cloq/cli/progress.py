"""What a person watches while a run goes on, and what a script reads: three renderers of the same events."""

from __future__ import annotations

import functools
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from typing import Any, TextIO

Emit = Callable[[str, dict[str, Any]], None]

WARNINGS = ("damaged", "memory")
"""Events that are told in every mode."""


@contextmanager
def progress(mode: str, bar: Callable[[], AbstractContextManager[Emit]] | None = None) -> Iterator[Emit]:
    """mode: `bar` for people, `json` for one JSON object per line on standard output, `quiet` for nothing. bar: instead of the one for
    quantizing."""
    stdout = sys.stdout
    if mode == "json":
        with redirect_stdout(sys.stderr):  # libraries that greet and report on standard output
            yield functools.partial(_json_line, stdout)
    elif mode == "quiet":
        with redirect_stdout(io.StringIO()):
            yield _warning
    else:
        with (bar or _bar)() as emit:
            yield emit


def _warning(event: str, values: dict[str, Any]) -> None:
    """What is said even where nothing was asked for: the run went another way than it was told to."""
    if event in WARNINGS:
        print(f"note: {values['note']}", file=sys.stderr)


def _json_line(stream: TextIO, event: str, values: dict[str, Any]) -> None:
    stream.write(json.dumps({"event": event, **values}, default=str) + "\n")
    stream.flush()


@contextmanager
def _bar() -> Iterator[Emit]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("blocks"), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("{task.fields[left]}"), TextColumn("[dim]{task.fields[note]}"), console=console) as bars:
        task = bars.add_task("quantizing", total=None, left="", note="", visible=False)
        watch, told = _TimeLeft(), set[str]()

        def emit(event: str, values: dict[str, Any]) -> None:
            if event == "start":  # not before: an error in the settings should stand alone
                everything = values["finished"] == values["blocks"]  # else finished blocks are counted as they are run again
                bars.update(task, total=values["blocks"], completed=values["blocks"] if everything else 0, visible=True)
            elif event == "layer":
                name = values["name"].split(".", 2)[-1] if values["name"].count(".") > 2 else values["name"]
                bars.update(task, note=f"{name}  error {values['error_quantized']:.4f} → {values['error_corrected']:.4f}")
                for note in values["notes"]:
                    if note not in told:  # once: it may concern every expert of a mixture, and the report names them all
                        console.print(f"  {values['name']}: {note}", style="yellow", highlight=False, soft_wrap=True)
                    told.add(note)
            elif event in WARNINGS:
                console.print(f"note: {values['note']}", style="yellow", highlight=False, markup=False, soft_wrap=True)
            elif event == "replay":
                bars.update(task, note="finished before: forward only")
            elif event == "block":
                bars.update(task, completed=values["block"] + 1, left=watch.after(values))

        yield emit


class _TimeLeft:
    """An estimate from the blocks that were really computed, not from those read back."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def after(self, block: dict[str, Any]) -> str:
        if not block["replayed"]:
            self._seconds.append(block["seconds"])
        remaining = block["blocks"] - block["block"] - 1
        if not self._seconds or not remaining:
            return ""
        mean = sum(self._seconds[-5:]) / len(self._seconds[-5:])
        left = remaining * mean
        return time.strftime("%-M:%S left", time.gmtime(left)) if left < 3600 else f"{left / 3600:.1f} h left"


@contextmanager
def counting(what: str, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for a few passes in turn: called with a pass's name, steps done and steps in all."""
    if quiet:
        yield lambda name, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def count(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(f"{what} {name}")
            bars.update(tasks[name], completed=done, total=total)

        yield count
