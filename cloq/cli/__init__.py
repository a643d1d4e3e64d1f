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
            print("interrupted; finished blocks are kept, the same command continues", file=sys.stderr)
        return INTERRUPTED
    return USER_ERROR


def told(error: CloqError | str) -> str:
    """An error's message for a terminal. It may quote a file of someone else's: control characters, which could rewrite the screen, are
    spelled out, and what is longer than anyone reads is cut in its middle."""
    text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(error))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


__all__ = ["app", "main"]
