"""The command line: one sub-command is one short function; heavy imports happen inside it."""

from __future__ import annotations

import errno
import sys

import typer

import cloq.cli.evaluate
import cloq.cli.train
import cloq.cli.use  # noqa: F401 - they add their commands
from cloq.cli.app import app
from cloq.errors import CloqError, ProcessError
from cloq.streaming.distributed import is_first

_USAGE = typer.BadParameter.__mro__[2]  # ClickException: typer carries a click of its own or imports one, this names the right class
INTERRUPTED = 130
USER_ERROR = 2
LONGEST = 2000
"""Characters of a message."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Errors that a user can mend are printed in a line or two, with exit code 2 and no traceback; of several processes
    that end together the first one prints."""
    try:
        code = app(args=argv, standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except CloqError as error:
        if is_first() or not isinstance(error, ProcessError):
            print(f"error: {told(error)}", file=sys.stderr)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        if is_first():
            print(f"error: {told(f'{error.filename!r} is a longer name than the file system takes')}", file=sys.stderr)
    except _USAGE as error:
        if is_first():  # all were given the same arguments
            error.show(file=sys.stderr)
    except (KeyboardInterrupt, typer.Abort):  # typer turns the first into its own exit code on some paths
        if is_first():
            print(f"interrupted{_left(sys.argv[1:] if argv is None else argv)}", file=sys.stderr)
        return INTERRUPTED
    return USER_ERROR


_RESUMED = "; finished blocks are kept, the same command continues"
_STARTS_OVER = "; nothing is kept of it, the same command starts over"
_LEFT = {name: _RESUMED for name in ("quantize", "init", "demo")} | {name: _STARTS_OVER for name in ("eval", "merge", "export")}
_LEFT["train"] = "; checkpoints are kept, the same command continues"


def _left(argv: list[str]) -> str:
    """What an interrupted command leaves behind, where it is one that writes."""
    return _LEFT.get(next((word for word in argv if not word.startswith("-")), ""), "")


def told(error: CloqError | str) -> str:
    """An error's message for a terminal. It may quote a file of someone else's: control characters, which could rewrite the screen, are
    spelled out, and what is longer than anyone reads is cut in its middle."""
    text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(error))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


__all__ = ["app", "main"]
