"""What a container, a batch system or systemd leaves a process of the host's memory: Linux control groups, of both versions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_MOUNTED = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")

_OF_FILES = ("inactive_file", "active_file")
"""What the kernel gives up first: its copies of files that were read."""


@dataclass(frozen=True)
class _Version:
    """Names of files in a group's folder, and of its folder among those mounted."""

    folder: str
    limits: tuple[str, ...]
    used: str
    prefix: str


_SECOND = _Version("", ("memory.max", "memory.high"), "memory.current", "")
_FIRST = _Version("memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_")


def memory_left(mounted: Path = _MOUNTED, membership: Path = _MEMBERSHIP) -> int | None:
    """Bytes that this process may still take before a group that it is in is at its limit, the kernel's copies of files not counted, since
    they give way; `None` without a limit, or where the system has no groups. Never below zero.

    A limit holds for all groups below it: of the process's own group and those around it the one that leaves least counts. In a container
    its own group may be mounted as the outermost.
    """
    left = [_left(folder, version) for folder, version in _groups(mounted, membership)]
    limited = [amount for amount in left if amount is not None]
    return max(0, min(limited)) if limited else None


def _groups(mounted: Path, membership: Path) -> Iterator[tuple[Path, _Version]]:
    """Folders of the groups that the process is in, those around them too."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version = _SECOND if not controllers else _FIRST if "memory" in controllers.split(",") else None
        if version is not None:
            own = PurePosixPath(path.lstrip("/"))
            for group in (own, *own.parents):
                yield mounted / version.folder / group, version


def _left(group: Path, version: _Version) -> int | None:
    """`None` if the group has no limit, or cannot be read: there it is as good as none."""
    try:
        limits = [int(text) for name in version.limits if (text := _text(group / name)) not in (None, "max")]
        if not limits:
            return None
        counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(limits) - int((group / version.used).read_text()) + sum(int(counted.get(version.prefix + name, 0)) for name in _OF_FILES)
    except (OSError, ValueError):
        return None


def _text(path: Path) -> str | None:
    return path.read_text().strip() if path.exists() else None
