"""The pictures of a report, each an `<svg>` element; `drawing` has what they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter

from cloq.report import wording
from cloq.report.drawing import AFTER, BAD, BEFORE, INK, MUTED, SERIES, STYLE, WIDTH, plain, plain_log, svg
from cloq.report.record import Report, cumulative_shares, place, share_repaired, stored_spectrum


def errors(report: Report) -> str:
    """A panel for each kind of layer: relative error by block, before and after, in sample and held out, on one log scale."""
    kinds = report.kinds()
    columns = min(4, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    series = [
        ("error_quantized", BEFORE, "-", 1.4, "quantized"), ("error_corrected", AFTER, "-", 1.8, "with the adapter"),
        ("heldout_quantized", BEFORE, (0, (3, 2)), 1.0, "quantized, held out"),
        ("heldout_corrected", AFTER, (0, (3, 2)), 1.0, "with the adapter, held out"),
    ]  # fmt: skip
    with rc_context(STYLE):
        figure = Figure((WIDTH, 0.75 + 2.0 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        floor = _floor([getattr(m, key) for m in report.metrics() for key, *_ in series])
        for at, (kind, label) in enumerate(kinds.items()):
            values = {key: report.by_kind(kind, lambda m, key=key: getattr(m, key)) for key, *_ in series}
            for key, color, dashes, width, name in series:
                if values[key]:
                    drawn = [max(v, floor) for v in values[key].values()]
                    marker = "o" if len(drawn) == 1 else None
                    axes[at].plot(
                        list(values[key]),
                        drawn,
                        color=color,
                        linestyle=dashes,
                        linewidth=width,
                        label=name,
                        marker=marker,
                        markersize=4,
                    )
            before, after = values["error_quantized"], values["error_corrected"]
            low, high = ([max(v, floor) for v in side.values()] for side in (after, before))
            axes[at].fill_between(list(before), low, high, color=AFTER, alpha=0.12, linewidth=0)
            axes[at].set_title(plain(label), color=INK, pad=14)
            means = [math.fsum(side.values()) / len(side) for side in (before, after)]
            axes[at].text(
                0,
                1.03,
                f"mean {wording.error(means[0])} → {wording.error(means[1])}",
                transform=axes[at].transAxes,
                color=MUTED,
                fontsize=8.5,
            )
        axes[0].set_yscale("log")
        plain_log(axes[0].yaxis)
        for at in range(len(kinds), len(axes)):
            axes[at].set_axis_off()
        for at in range(len(kinds)):
            _block_axis(axes[at], report, label=at + columns >= len(kinds))
        for row in range(rows):
            axes[row * columns].set_ylabel("relative error")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, handlelength=2.2, columnspacing=2.0, borderaxespad=0)
        return svg(figure, "errors", "Relative error of every kind of layer by block, before and after the adapter")


def repaired(report: Report) -> str:
    """Block by kind: the share of the error repaired, as the strength of a colour; on held-out tokens if there are."""
    prefix = "error" if report.mean("heldout_corrected") is None else "heldout"
    kinds, blocks, end = report.kinds(), report.blocks() or [0], _end(report)

    def share(metrics: Any) -> float | None:
        return share_repaired(getattr(metrics, f"{prefix}_quantized"), getattr(metrics, f"{prefix}_corrected"))

    with rc_context(STYLE):
        figure = Figure((WIDTH, 0.85 + 0.27 * len(kinds)), layout="constrained")
        axes = figure.subplots()
        for row, kind in enumerate(kinds):
            found = report.by_kind(kind, share)
            for block, value in found.items():
                strength = min(abs(value), 1.0)
                color = AFTER if value >= 0 else BAD
                axes.add_patch(Rectangle((block - 0.46, row - 0.44), 0.92, 0.88, facecolor=color, alpha=strength, linewidth=0))
            mean = math.fsum(found.values()) / len(found) if found else None
            axes.text(end + 0.3, row, wording.percent(mean), va="center", ha="left", fontsize=8.5, color=INK)
        axes.text(end + 0.3, -0.85, "mean", va="center", ha="left", fontsize=8.5, color=MUTED)
        axes.set_xlim(blocks[0] - 0.6, end)
        axes.set_ylim(len(kinds) - 0.4, -0.6)
        axes.set_yticks(range(len(kinds)), [plain(label) for label in kinds.values()])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        _block_axis(axes, report)
        return svg(figure, "repaired", "Share of the error that the adapter repairs, by block and kind of layer")


def spectrum(report: Report) -> str | None:
    """What the leading directions hold, each alone and together: the median over blocks, a line for each kind of layer."""
    exact = report.spec.lora.init == "cloq"
    curves: dict[str, tuple[dict[int, float], list[float]]] = {}
    for kind, label in report.kinds().items():
        layers = [s.metrics for name, s in report.layers.items() if place(name).kind == kind and s.metrics.spectrum]
        if layers:
            curves[label] = (
                _medians([stored_spectrum(m) for m in layers]),
                [*_medians([dict(enumerate(cumulative_shares(m, exact))) for m in layers]).values()],
            )
    if not curves:
        return None
    with rc_context(STYLE):
        figure = Figure((WIDTH, 3.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        for at, (label, (alone, together)) in enumerate(curves.items()):
            style = {"color": SERIES[at % len(SERIES)], "linestyle": "-" if at < len(SERIES) else "--", "linewidth": 1.6}
            left.plot([k + 1 for k in alone], [max(share, 1e-6) for share in alone.values()], **style)
            right.plot(range(len(together) + 1), [0.0, *together], label=plain(label), **style)
        left.set_xscale("log", base=2)
        left.set_yscale("log")
        plain_log(left.yaxis, percent=True)
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.set_title("each direction alone")
        left.set_xlabel("direction")
        left.set_ylabel("share of the layer's error")
        right.set_title("the leading directions together")
        right.set_xlabel("directions")
        right.set_ylim(0, max(1.0, *(max(together) for _, together in curves.values())))
        right.set_xlim(0)
        right.yaxis.set_major_formatter(PercentFormatter(1.0, 0, symbol=" %"))
        right.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 4, 8, 10]))
        figure.legend(loc="outside right center", handlelength=1.6)
        return svg(figure, "spectrum", "Share of the error that the leading directions hold")


def seconds(report: Report) -> str:
    """Seconds of quantization plus factors by block, stacked by kind of layer."""
    blocks = report.blocks() or [0]
    with rc_context(STYLE):
        figure = Figure((WIDTH, 2.5), layout="constrained")
        axes = figure.subplots()
        bottom = dict.fromkeys(blocks, 0.0)
        for at, (kind, label) in enumerate(report.kinds().items()):
            found = report.by_kind(kind, lambda m: m.seconds, combine=math.fsum)
            heights = [found.get(block, 0.0) for block in blocks]
            axes.bar(
                blocks,
                heights,
                0.78,
                [bottom[b] for b in blocks],
                color=SERIES[at % len(SERIES)],
                label=plain(label),
                linewidth=0,
            )
            bottom = {block: bottom[block] + height for block, height in zip(blocks, heights, strict=True)}
        axes.set_ylabel("seconds")
        axes.set_xlim(blocks[0] - 0.6, _end(report))
        _block_axis(axes, report)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside right center", handlelength=0.9, handleheight=0.9)
        return svg(figure, "seconds", "Seconds of quantization and factors by block and kind of layer")


def damping(report: Report) -> str | None:
    """Relative damping of every Cholesky factorization; `None` where it is the same for all and a sentence says it better."""
    if len({m.damping for m in report.metrics()}) == 1:
        return None
    with rc_context(STYLE):
        figure = Figure((WIDTH, 2.2), layout="constrained")
        axes = figure.subplots()
        for at, (kind, label) in enumerate(report.kinds().items()):
            found = report.by_kind(kind, lambda m: m.damping)
            axes.plot(
                list(found),
                [max(v, 1e-6) for v in found.values()],
                "o",
                markersize=4,
                color=SERIES[at % len(SERIES)],
                label=plain(label),
            )
        axes.set_yscale("log")
        plain_log(axes.yaxis)
        axes.set_ylabel("relative damping")
        _block_axis(axes, report)
        figure.legend(loc="outside right center", handlelength=0.9)
        return svg(figure, "damping", "Relative damping of the Cholesky factorization by block and kind of layer")


def phases(report: Report) -> str | None:
    """Where the time went: a bar for each phase, longest first, with seconds and share."""
    if not report.phases:
        return None
    order = sorted(report.phases.items(), key=lambda item: -item[1])
    rest = report.seconds - math.fsum(report.phases.values())
    if rest > 0.01 * report.seconds:
        order.append(("everything else", rest))
    total = math.fsum(value for _, value in order)
    longest = max(value for _, value in order)
    if longest <= 0:
        return None
    with rc_context(STYLE):
        figure = Figure((WIDTH, 0.2 + 0.27 * len(order)), layout="constrained")
        axes = figure.subplots()
        for row, (name, value) in enumerate(order):
            axes.barh(row, value, 0.66, color=MUTED if name == "everything else" else AFTER, alpha=0.85, linewidth=0)
            axes.text(
                value + 0.008 * longest,
                row,
                f"{wording.duration(value)} · {wording.percent(value / total)}",
                va="center",
                fontsize=8.5,
                color=INK,
            )
        axes.set_yticks(range(len(order)), [plain(name) for name, _ in order])
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.set_xlim(0, longest * 1.18)
        axes.xaxis.set_visible(False)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        return svg(figure, "phases", "Seconds of each phase of the run")


def _floor(values: Sequence[float | None]) -> float:
    """What an error of zero is drawn at on a logarithmic scale: a millionth of the largest."""
    return 1e-6 * max((v for v in values if v), default=1.0)


def _medians(curves: Sequence[dict[int, float]]) -> dict[int, float]:
    """Position → median over the curves that have a value there."""
    return {at: median(curve[at] for curve in curves if at in curve) for at in sorted(set().union(*curves))}


def _end(report: Report) -> float:
    """Right end of an axis over blocks; the bars of a model with few of them should not grow to slabs."""
    blocks = report.blocks() or [0]
    return max(blocks[-1], blocks[0] + 11) + 0.6


def _block_axis(axes: Axes, report: Report, label: bool = True) -> None:
    blocks = report.blocks() or [0]
    step = max(1, math.ceil((blocks[-1] - blocks[0]) / 8 / 5) * 5 if len(blocks) > 8 else 1)
    axes.xaxis.set_major_locator(FixedLocator(list(range(blocks[0] - blocks[0] % step, blocks[-1] + 1, step))))
    if label:
        axes.set_xlabel("block")
        axes.tick_params(labelbottom=True)
