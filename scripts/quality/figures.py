"""Rows → pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quality.methods import BITS_16
from quality.protocol import Protocol, Sweep
from quality.summary import Row, perplexity
from quality.tables import sweep_rows


def widths(rows: Sequence[Row]) -> list[float]:
    """Of the rows on quantized bases, from narrow to wide."""
    return sorted({row.bits for row in rows} - {BITS_16})


def curves(rows: Sequence[Row], path: Path) -> None:
    """Validation perplexity against the training step, a panel per width."""
    plain = [row for row in rows if not row.changes]
    drawn, panels = _panels(plain)
    for bits, axis in panels:
        for row in plain:
            if row.bits in (bits, BITS_16):
                axis.plot(list(row.curve), [perplexity(v) for v in row.curve.values()], label=row.method, lw=_width(row.method))
        _finish(axis, title=f"{bits} bits", xlabel="step", ylabel="validation perplexity")
    _save(drawn, path)


def width_figure(rows: Sequence[Row], path: Path) -> None:
    """Test perplexity after training against the width, from wide to narrow; dashed across it what the 16-bit model has."""
    plain = [row for row in rows if not row.changes]
    drawn, [axis] = _axes(1)
    wide_first = widths(plain)[::-1]
    for method in dict.fromkeys(row.method for row in plain):
        found = {row.bits: perplexity(row.loss) for row in plain if row.method == method}
        if BITS_16 in found:
            axis.plot(range(len(wide_first)), [found[BITS_16]] * len(wide_first), "k--", label=method, lw=1)
        else:
            places = [place for place, bits in enumerate(wide_first) if bits in found]
            axis.plot(places, [found[wide_first[place]] for place in places], "o-", label=method, lw=_width(method))
    axis.set_xticks(range(len(wide_first)), [f"{bits:g}" for bits in wide_first])
    _finish(axis, xlabel="bits", ylabel="test perplexity after training")
    _save(drawn, path)


def sweep_figure(protocol: Protocol, sweep: Sweep, rows: Sequence[Row], path: Path) -> None:
    """Test perplexity against the setting's value, dotted before training, a panel per width."""
    found = sweep_rows(protocol, sweep, rows)
    drawn, panels = _panels([row for _, row in found])
    for bits, axis in panels:
        for method in dict.fromkeys(row.method for _, row in found if row.bits in (bits, BITS_16)):
            mine = [(value, row) for value, row in found if row.method == method and row.bits in (bits, BITS_16)]
            places = [sweep.values.index(value) for value, _ in mine]
            [line] = axis.plot(places, [perplexity(row.loss) for _, row in mine], "o-", label=method, lw=_width(method))
            axis.plot(places, [perplexity(row.before) for _, row in mine], ":", color=line.get_color(), lw=1)
        axis.set_xticks(range(len(sweep.values)), list(map(sweep.shown, sweep.values)))
        _finish(axis, title=f"{bits} bits", xlabel=sweep.name, ylabel="test perplexity (dotted: before)")
    _save(drawn, path)


def _panels(rows: Sequence[Row]):
    """The figure, and (width, axis) of each panel."""
    found = widths(rows) or [BITS_16]
    drawn, axes = _axes(len(found))
    return drawn, list(zip(found, axes, strict=True))


def _axes(count: int):
    """A figure with so many axes beside each other, and these."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(1, count, figsize=(5.5 * count, 4), squeeze=False, layout="constrained")
    return drawn, list(axes[0])


def _finish(axis, **texts: str) -> None:
    """Perplexities on a logarithmic scale, written out, and the lines' names in the order of their right ends."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set(yscale="log", **texts)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    lines, _ = axis.get_legend_handles_labels()
    axis.legend(handles=sorted(lines, key=lambda line: -line.get_ydata()[-1]), fontsize=8)


def _save(drawn, path: Path) -> None:
    from matplotlib import pyplot as plt

    drawn.savefig(path, dpi=150)
    plt.close(drawn)


def _width(method: str) -> int:
    return 2 if "cloq" in method else 1
