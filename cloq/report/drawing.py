"""How every picture of a report is drawn: the style, and SVG that takes its colours and its font from the page around it.

Every colour is drawn as a placeholder and then replaced by a CSS variable, so one picture serves light, dark and paper. Nothing
in a picture depends on when or where it was made: no dates, ids from the picture's own name.
"""

from __future__ import annotations

import io
import math
import re
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

INK, MUTED, GRID, BEFORE, AFTER, BAD = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
SERIES = tuple(f"#0707{i:02x}" for i in range(10))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", BEFORE: "before", AFTER: "after", BAD: "bad"}
_VARIABLES |= {color: f"series-{i}" for i, color in enumerate(SERIES)}

WIDTH = 10.0  # inches, 720 points: what the page shows at its full width
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def plain(text: str) -> str:
    """A name as matplotlib should draw it: a dollar sign is a dollar sign, not mathematics."""
    return text.replace("$", r"\$")


def plain_log(axis: Any, percent: bool = False) -> None:
    """Powers of ten as plain numbers, further ticks where the range is narrow, no minor labels."""

    def written(value: float, _: int) -> str:
        return f"{100 * value:g} %" if percent else f"{value:g}".replace("e-0", "e-")

    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 else 9
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.3 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(written))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element that can stand in a page beside others."""
    file = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", text)
    text = re.sub(r'^<svg ([^>]*?)height="[^"]*"', r"<svg \1", text)
    text = re.sub(r"(font: [\d.]+px|font-family:) [^;\"]+", lambda m: f"{m[1]} var(--sans)", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1).strip()
