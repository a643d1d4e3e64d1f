"""layers.csv, and the plain lines that the command line prints at the end of a run."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from cloq.report import wording
from cloq.report.record import STORED_ADAPTER_BITS, Report, place, share_repaired
from cloq.use.evaluate import Quality

COLUMNS = (
    "name", "block", "kind", "out", "in", "grid", "bits", "group_size", "symmetric", "permuted", "rank",
    "error_quantized", "error_corrected", "repaired", "heldout_quantized", "heldout_corrected",
    "n_tokens", "damping", "seconds", "bits_per_weight", "spectrum", "notes",
)  # fmt: skip


def layers_csv(report: Report) -> str:
    """One row per layer, every metric in full precision; the spectrum is joined by spaces, notes by `; `. Unknown is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, (layout, metrics) in report.layers.items():
        row = {"name": name, **place(name)._asdict(), "out": layout.shape[0], "in": layout.shape[1], "grid": layout.kind}
        row |= {key: getattr(layout, key) for key in ("bits", "symmetric", "permuted")}
        row |= {"group_size": "channel" if layout.group_size is None else layout.group_size}
        row |= {key: getattr(metrics, key) for key in COLUMNS if hasattr(metrics, key)}
        row |= {"repaired": share_repaired(metrics.error_quantized, metrics.error_corrected)}
        row |= {"spectrum": " ".join(f"{share:.6g}" for share in metrics.spectrum), "notes": "; ".join(metrics.notes)}
        writer.writerow(row)
    return text.getvalue()


def summary_lines(report: Report, out: Path | None = None) -> list[str]:
    """The end of a run in a few lines: errors, the worst layers, size, and where the files are if `out` is given."""
    mean = report.mean
    lines = [
        f"mean layer error   {wording.error(mean('error_quantized'))} → {wording.error(mean('error_corrected'))}"
        f"   ({wording.percent(report.repaired())} repaired)"
    ]
    if mean("heldout_corrected") is not None:
        lines.append(
            f"held-out error     {wording.error(mean('heldout_quantized'))} → {wording.error(mean('heldout_corrected'))}"
            f"   ({wording.percent(report.repaired(heldout=True))} repaired)"
        )
    for number, (name, metrics) in enumerate(report.worst(3)):
        label = "worst layers" if number == 0 else ""
        lines.append(f"{label:<18} {wording.error(metrics.error_quantized)} → {wording.error(metrics.error_corrected)}   {name}")
    lines.append(
        f"bits per weight    {report.bits_per_weight():.2f}, with the adapter {report.bits_per_weight(STORED_ADAPTER_BITS):.2f}"
        f" ({report.bits_per_weight(16):.2f} if it is cast to 16 bits)"
    )
    if report.sizes:
        lines.append("size               " + ", ".join(f"{name} {wording.size(value)}" for name, value in report.sizes.items()))
    lines.append(f"time               {wording.duration(report.seconds)}")
    changed = {name for names in report.layer_notes().values() for name in names}
    if changed:
        lines.append(f"notes              {wording.plural(len(changed), 'layer')} where the code changed course; see the report")
    if out is not None:
        lines += [f"{label:<18} {out / file}" for label, file in _files(report)]
    return lines


def _files(report: Report) -> list[tuple[str, str]]:
    base = [("base", "model")] if report.form is not None else []
    return [*base, ("adapter", "adapter"), ("report", "report.html"), ("repeat with", "run.yaml")]


def quality_lines(quality: Sequence[Quality]) -> list[str]:
    """Perplexities as a table, a block per text and protocol, and how far from the 16-bit model the adapter brings the base."""
    lines = []
    for (text, protocol), rows in by_text(quality).items():
        lines.append(f"perplexity on {text} ({protocol}, {wording.plural(rows[0].tokens, 'token')})")
        for row in rows:
            lines.append(f"  {row.model:<16} {wording.perplexity(row.perplexity):>12}{uncertainty(row)}")
        distance = from_dense(rows)
        if distance is not None:
            lines.append(f"  with the adapter it is {distance}")
    return lines


def by_text(quality: Sequence[Quality]) -> dict[tuple[str, str], list[Quality]]:
    """Quality by text, as readers should see it, and protocol: numbers of different protocols never stand in one table."""
    groups: dict[tuple[str, str], list[Quality]] = {}
    for one in quality:
        groups.setdefault((wording.source(one.text), one.protocol), []).append(one)
    return groups


def uncertainty(quality: Quality) -> str:
    """` ± 0.8`: one standard error of the perplexity, from that of the mean log-likelihood; nothing where it is unknown."""
    spread = quality.perplexity * quality.stderr
    return f" ± {spread:.2g}" if math.isfinite(spread) and spread < 100 else f" ± {spread:,.0f}" if math.isfinite(spread) else ""


def from_dense(rows: Sequence[Quality]) -> str | None:
    """`1.092 times the 16-bit model's`: the perplexity with the adapter; `None` where either is missing. What the base alone is at
    would say nothing here: its codes may have been chosen for the factors."""
    values = {row.model: row.perplexity for row in rows}
    if not {"16-bit", "base + adapter"} <= values.keys():
        return None
    return f"{values['base + adapter'] / values['16-bit']:,.3f} times the 16-bit model's"
