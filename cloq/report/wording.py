"""How numbers are written for people: few digits, always with a unit."""

from __future__ import annotations

import math
from pathlib import Path

UNKNOWN = "–"


def error(value: float | None) -> str:
    """A relative error: three significant digits, `0.0431`, `4.3e-06`."""
    if value is None or math.isnan(value):
        return UNKNOWN
    return f"{value:.3g}" if value == 0 or abs(value) < 1e-4 else f"{value:#.3g}".rstrip(".")


def percent(value: float | None, digits: int = 0) -> str:
    return UNKNOWN if value is None or math.isnan(value) else f"{100 * value:.{digits}f} %".replace("-", "−")


def perplexity(value: float | None) -> str:
    """`24.1`, `4,227`: a digit after the point below 1000."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:.2f}" if value < 100 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in decimal units, three significant digits: `88.2 MB`."""
    if value is None:
        return UNKNOWN
    unit = "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


def count(value: int) -> str:
    """`106,168,320`."""
    return f"{value:,}"


def short_count(value: float) -> str:
    """`106 M`, `7.24 B`: three significant digits."""
    for unit in ("", " k", " M", " B"):
        if abs(value) < 999.5 or unit == " B":
            break
        value /= 1000
    return f"{value:.0f}{unit}" if not unit or value >= 100 else f"{value:.3g}{unit}"


def duration(seconds: float | None) -> str:
    """`0.42 s`, `12 s`, `2 min 41 s`, `3 h 05 min`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 7200 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def source(text: str) -> str:
    """A text source as a reader elsewhere should see it: of a local path only the last part, of a mixture each part so."""
    return ", ".join(Path(part).name if part.startswith((".", "/", "~")) else part for part in text.split(","))


def plural(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
