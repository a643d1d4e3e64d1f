"""One command in a process of its own, and the verdict on how it ended.

A process is forked from this one, which has everything imported: a second instead of ten. It is a process like any other to kill.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RIGHT, REFUSED, WRONG = "right", "refused", "wrong"
PATIENCE = 120
"""Seconds after which a command is taken for hung."""

SAID = 1 << 20
"""Bytes that a process may write to standard error; one that goes on is taken for hung."""

CRASHED = 70
"""Exit code of a process in which something was raised that the command line does not catch."""


@dataclass(frozen=True)
class Verdict:
    """kind: `RIGHT`, `REFUSED` or `WRONG`. why: what was said, or what is wrong."""

    kind: str
    why: str = ""


@dataclass(frozen=True)
class Ended:
    """code: exit code; negative for a signal. said: standard error."""

    code: int
    said: str


class Process:
    """A function in a forked process. It may return an exit code; `None` is 0."""

    def __init__(self, function: Callable[[], int | None]):
        self._said, writing = os.pipe()  # no file, which a trial's limits would apply to
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, SAID)
        self.pid = os.fork()
        if self.pid == 0:
            code = CRASHED
            try:
                os.dup2(writing, 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                code = function() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    os.sys.stderr.flush()
                os._exit(code)
        os.close(writing)

    def kill_after(self, seconds: float) -> None:
        """SIGKILL at that moment, unless the process has ended by then."""
        if not self._over(seconds):
            os.kill(self.pid, signal.SIGKILL)

    def _over(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
            time.sleep(0.002)
        return False

    def ended(self) -> Ended:
        """Waits for it, at most `PATIENCE` seconds."""
        self.kill_after(PATIENCE)
        _, status = os.waitpid(self.pid, 0)
        with open(self._said, "rb") as output:
            said = output.read().decode("utf8", "replace")
        return Ended(os.waitstatus_to_exitcode(status), said)


def command(*argv: object) -> Callable[[], int]:
    """A cloq command, to be run in a `Process`."""
    from cloq.cli import main

    return lambda: main([str(argument) for argument in argv])


def judge(ended: Ended, right: Callable[[], str | None]) -> Verdict:
    """`RIGHT` for a command that ended well and left what it should; `REFUSED` for exit code 2 and one message of one or two lines;
    `WRONG` for everything else. right: says what is wrong with the result, `None` where nothing is."""
    if ended.code == 0:
        complaint = right()
        return Verdict(WRONG, complaint) if complaint else Verdict(RIGHT)
    lines = ended.said.strip().splitlines()
    message = next((number for number, line in enumerate(lines) if line.startswith("error: ")), None)
    if ended.code == 2 and message is not None and len(lines) - message <= 2 and "Traceback" not in ended.said:
        return Verdict(REFUSED, lines[message])
    return Verdict(WRONG, f"exit code {ended.code}: {ended.said.strip()[-2000:]}")


def same(expected: dict[str, str], folder: Path) -> Callable[[], str | None]:
    """A `right` for `judge`: the exported bytes are those of the undisturbed run."""
    from bench_resume import digest

    def complaint() -> str | None:
        found = digest(folder)
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        return f"other bytes than undisturbed: {', '.join(differing)}" if differing else None

    return complaint
