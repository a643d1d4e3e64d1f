"""The four files in the folder of a run, always written together and each atomically."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cloq.errors import RunError
from cloq.report.record import Report
from cloq.report.tables import layers_csv
from cloq.streaming.store import resumed, write_atomically, writing
from cloq.tasks.spec import TaskScore
from cloq.use.evaluate import Quality

REPORT_FILE = "report.json"
_MAKE_ROOM = "make room there, or let this user write to it, and run the same command again"


def write_report(out: str | Path, report: Report, remedy: str = resumed("--out")) -> None:
    """Writes the four files into `out`, equal bytes for equal reports. Raises `RunError` with the remedy if it cannot."""
    from cloq.report.card import model_card
    from cloq.report.page import page

    out = Path(out)
    contents = {
        "layers.csv": layers_csv(report),
        "report.html": page(report),
        "README.md": model_card(report),
        REPORT_FILE: json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    with writing(out, remedy):
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(out / name, content.encode())


def read_report(out: str | Path) -> Report:
    """The report of a finished run. Raises `RunError` if there is none or it is damaged."""
    path = Path(out) / REPORT_FILE
    try:
        return Report.from_dict(json.loads(path.read_text("utf8")))
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist; a finished run has one (run the same cloq quantize command again to write it)") from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{path} is damaged ({type(error).__name__}: {error}); run the same cloq quantize command again to rewrite it"
        ) from error


def add_quality(out: str | Path, found: Sequence[Quality]) -> Report:
    """Adds perplexities to a run's report and rewrites its files. A number for the same model, text and protocol is replaced."""
    report = read_report(out)
    new = {(q.model, q.text, q.protocol) for q in found}
    kept = [q for q in report.quality if (q.model, q.text, q.protocol) not in new]
    report = report.replace(quality=(*kept, *found))
    write_report(out, report, _MAKE_ROOM)
    return report


def add_tasks(out: str | Path, found: Sequence[TaskScore]) -> Report:
    """Adds scores on tasks to a run's report and rewrites its files. A number for the same model, task, metric and protocol is replaced."""
    report = read_report(out)
    new = {(s.model, s.task, s.metric, s.protocol) for s in found}
    kept = [s for s in report.tasks if (s.model, s.task, s.metric, s.protocol) not in new]
    report = report.replace(tasks=(*kept, *found))
    write_report(out, report, _MAKE_ROOM)
    return report


def carry_over(out: str | Path, report: Report) -> Report:
    """The report with what an earlier one of the same layers knows besides: perplexities, scores, time and memory of the run that did it.

    A command that is repeated on a finished run computes nothing and should not forget what is known.
    """
    if not (Path(out) / REPORT_FILE).exists():
        return report
    try:
        earlier = read_report(out)
    except RunError:  # damaged: about to be rewritten anyway
        return report
    if earlier.layers != report.layers:
        return report
    return report.replace(
        quality=earlier.quality,
        tasks=earlier.tasks,
        seconds=earlier.seconds,
        phases=earlier.phases,
        peak_memory=earlier.peak_memory,
        notes=earlier.notes,
    )


def weight_bytes(folder: str | Path) -> int:
    """Bytes of the safetensors files in a model or adapter folder."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
