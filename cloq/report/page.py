"""report.html: one page that a person would show to a colleague. It holds everything it needs and asks nothing of the network.

Whatever comes from a checkpoint, a file name or a library is escaped; no script runs, and the page's own policy forbids both.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

from cloq import __version__
from cloq.report import figures, wording
from cloq.report.record import STORED_ADAPTER_BITS, Report, share_repaired
from cloq.report.scores import score_tables
from cloq.report.style import CSS
from cloq.report.tables import by_text, from_dense, uncertainty
from cloq.report.wording import duration, error, percent, perplexity, plural, size

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_NAMED = 3
"""So many layers are named beside a note; more are folded away."""


def page(report: Report) -> str:
    """The whole page as HTML."""
    title = f"{escape(report.model_name())}, {report.bits():g} bits"
    parts = (
        _head(report, title), _tiles(report), _quality(report), _tasks(report), _errors(report), _repaired(report), _spectrum(report),
        _time(report), _course(report), _settings(report), _layers(report),
    )  # fmt: skip
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{title} · cloq</title>
<link rel="icon" href="data:,">
<style>{CSS}</style>
</head>
<body><main>
{"".join(parts)}
<footer>Written by cloq {escape(__version__)}. The same numbers are in <code>report.json</code> and <code>layers.csv</code>;
<code>cloq quantize --config run.yaml</code> repeats the run.</footer>
</main></body>
</html>
"""


def _head(report: Report, title: str) -> str:
    blocks = len(report.blocks())
    base = "a given base" if report.form is None else report.describe_base()
    where = f"{plural(len(report.layers), 'layer')} in {plural(blocks, 'block')}"
    adapter = f"{report.describe_adapter()}, calibrated on {report.describe_calibration()}"
    lead = f"{base}; {adapter}. {where}, {wording.short_count(report.parameters())} weights."
    return f'<h1>{title}</h1>\n<p class="lead">{escape(lead)}</p>\n'


def _tile(heading: str, number: str, note: str) -> str:
    return f'<div class="tile"><h3>{heading}</h3><strong>{number}</strong><small>{note}</small></div>\n'


def _arrow(before: str, after: str) -> str:
    return f'<span class="was">{before} →</span> {after}'


def _tiles(report: Report) -> str:
    mean = report.mean
    tiles = []
    for (text, protocol), rows in list(by_text(report.quality).items())[:1]:
        values = {row.model: perplexity(row.perplexity) for row in rows}
        distance = from_dense(rows)
        number = " · ".join(values.values()) if distance is None else _arrow(values["16-bit"], values["base + adapter"])
        note = f"with the adapter {distance}; " if distance is not None else ""
        tiles.append(_tile("Perplexity", number, f"{note}{escape(text)}, {escape(protocol)}"))
    repaired = f"{percent(report.repaired())} repaired, mean over layers, calibration text"
    tiles.append(_tile("Layer error", _arrow(error(mean("error_quantized")), error(mean("error_corrected"))), repaired))
    if mean("heldout_corrected") is not None:
        repaired = f"{percent(report.repaired(heldout=True))} repaired, on text that was never fitted"
        tiles.append(_tile("Held-out layer error", _arrow(error(mean("heldout_quantized")), error(mean("heldout_corrected"))), repaired))
    bits, with_adapter, halved = (report.bits_per_weight(bits) for bits in (0, STORED_ADAPTER_BITS, 16))
    tiles.append(_tile("Bits per weight", f"{bits:.2f}", f"{with_adapter:.2f} with the 32-bit adapter, {halved:.2f} with it cast to 16"))
    if "base" in report.sizes:
        original = size(report.sizes.get("original"))
        note = f"base, embeddings included; adapter {size(report.sizes.get('adapter'))}"
        tiles.append(_tile("Size on disk", _arrow(original, size(report.sizes["base"])), note))
    memory = ", ".join(f"{size(value)} on the {escape(name)}" for name, value in report.peak_memory.items())
    tiles.append(_tile("Time", duration(report.seconds), f"peak memory {memory}" if memory else "whole run"))
    return f'<div class="tiles">\n{"".join(tiles)}</div>\n'


def _quality(report: Report) -> str:
    if not report.quality:
        return ""
    text = "<h2>Perplexity right after initialization</h2>\n"
    text += "<p>Before any fine-tuning; read back from the exported files. Lower is better.</p>\n"
    for (source, protocol), rows in by_text(report.quality).items():
        distance = from_dense(rows)
        verdict = f" With the adapter it is {distance}." if distance is not None else ""
        body = [(row.model, perplexity(row.perplexity) + uncertainty(row)) for row in rows]
        text += _table(("model", "perplexity ± standard error"), body)
        about = f"{escape(source)}, {plural(rows[0].tokens, 'token')}, protocol {escape(protocol)}: sequences without overlap."
        text += f'<p class="note">{about}{verdict}</p>\n'
    return text


def _tasks(report: Report) -> str:
    if not report.tasks:
        return ""
    text = "<h2>Tasks</h2>\n<p>Accuracies in per cent, with 95 % intervals. Chance is what guessing gives.</p>\n"
    for protocol, (header, *rows) in score_tables(report.tasks).items():
        text += _table(header, rows) + f'<p class="note">Asked by {escape(protocol)}.</p>\n'
    return text


def _errors(report: Report) -> str:
    heldout = report.mean("heldout_corrected") is not None
    also = " Dashed: the same on tokens that the solve never saw." if heldout else ""
    return f"""<h2>Error of every layer</h2>
<p>How far a layer's output is from the original's, squared and relative: ‖(W − Ŵ)X‖² / ‖WX‖².
The shaded part is what the adapter takes away.</p>
{_figure(figures.errors(report), f"A panel for each kind of layer, all on one logarithmic scale.{also}")}
{_worst(report)}"""


def _worst(report: Report) -> str:
    header, keys = ["layer", "quantized", "with the adapter"], ["error_quantized", "error_corrected"]
    if report.mean("heldout_corrected") is not None:
        header, keys = [*header, "held out"], [*keys, "heldout_corrected"]
    rows = [[name, *(error(getattr(metrics, key)) for key in keys)] for name, metrics in report.worst(3)]
    return f"<p>The layers with the largest error left:</p>{_table(header, rows)}"


def _repaired(report: Report) -> str:
    heldout = report.mean("heldout_corrected") is not None
    where = "on held-out tokens" if heldout else "on the calibration tokens"
    negative = " Red: the adapter adds to the error." if any((_share(m, heldout) or 0) < 0 for m in report.metrics()) else ""
    caption = f'Share of the error repaired {where}: 0 %<span class="ramp"></span>100 %.{negative}'
    return f"<h2>What the adapter repairs</h2>\n{_figure(figures.repaired(report), caption)}"


def _share(metrics: Any, heldout: bool) -> float | None:
    if heldout:
        return share_repaired(metrics.heldout_quantized, metrics.heldout_corrected)
    return share_repaired(metrics.error_quantized, metrics.error_corrected)


def _spectrum(report: Report) -> str:
    drawn = figures.spectrum(report)
    if drawn is None:
        return ""
    return f"""<h2>Spectrum of the error</h2>
<p>How much of a layer's error few directions of its output hold: the steeper, the more a small rank repairs.</p>
{_figure(drawn, "Median over all blocks. Of each layer at most 32 eigenvalues are stored; the others are interpolated.")}"""


def _time(report: Report) -> str:
    text = "<h2>Where the time went</h2>\n"
    phases = figures.phases(report)
    if phases is not None:
        caption = "capture: forwards for Gram matrices; solve: quantization, factors, errors; propagate: forwards to the next block."
        text += _figure(phases, caption)
    return text + _figure(figures.seconds(report), "Quantization plus factors, by block.")


def _course(report: Report) -> str:
    text = "<h2>Where the code changed course</h2>\n"
    notes = [f"<li>{escape(note)}</li>" for note in report.notes]
    for note, names in report.layer_notes().items():
        listed = ", ".join(f"<code>{escape(name)}</code>" for name in names)
        shown = f": {listed}" if len(names) <= _NAMED else f" <details><summary>({plural(len(names), 'layer')})</summary>{listed}</details>"
        notes.append(f"<li>{escape(note)}{shown}</li>")
    text += f"<ul>{''.join(notes)}</ul>\n" if notes else "<p>Nowhere: no raised damping, no clipped rank, no shortened group.</p>\n"
    drawn = figures.damping(report)
    if drawn is not None:
        return text + _figure(drawn, "Relative damping with which the Cholesky factorization of each layer succeeded.")
    value = next(iter(report.metrics())).damping
    return text + (f"<p>Relative damping of the Cholesky factorization: {value:g} in every layer.</p>\n" if value else "")


def _settings(report: Report) -> str:
    values = report.spec.to_dict()
    sections = {
        "Quantization": values.pop("quant"),
        "Factors": values.pop("lora"),
        "Calibration": values.pop("calib"),
        "Run": values,
    }
    sections["Versions"] = report.versions
    text = "".join(f"<div><h3>{name}</h3>{_pairs(section)}</div>\n" for name, section in sections.items() if section)
    return f'<h2>Settings and versions</h2>\n<div class="columns">\n{text}</div>\n'


def _pairs(values: dict[str, Any]) -> str:
    rows = "".join(f"<tr><td>{escape(key.replace('_', ' '))}</td><td>{escape(_setting(value))}</td></tr>" for key, value in values.items())
    return f'<table class="left">{rows}</table>'


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == []:
        return wording.UNKNOWN
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _layers(report: Report) -> str:
    heldout = report.mean("heldout_corrected") is not None
    header = ["layer", "out × in", "bits", "group", "rank", "quantized", "with adapter", "repaired"]
    header += ["held out", "with adapter"] if heldout else []
    rows = []
    for name, (layout, m) in report.layers.items():
        shape = f"{layout.shape[0]} × {layout.shape[1]}"
        row = [
            name,
            shape,
            layout.bits,
            layout.group_size or "channel",
            m.rank,
            error(m.error_quantized),
            error(m.error_corrected),
        ]
        row.append(percent(share_repaired(m.error_quantized, m.error_corrected)))
        row += [error(m.heldout_quantized), error(m.heldout_corrected)] if heldout else []
        rows.append([*row, f"{m.damping:g}", f"{m.seconds:.2f}"])
    table = _table((*header, "damping", "seconds"), rows)
    return f"<h2>All layers</h2>\n<details><summary>Table of {plural(len(rows), 'layer')}</summary>\n{table}</details>\n"


def _table(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>\n"
