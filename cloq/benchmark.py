"""Any models beside each other: perplexity and tasks of runs, adapters, model folders and hub ids, with intervals and tests.

A run is three models: `16-bit`, `base`, and `base + adapter`. Where several runs are compared, each is its base with its adapter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloq.api import RUN_FILE, read_run_file
from cloq.errors import RunError, SpecError
from cloq.tasks.evaluation import PreparedTasks, answer
from cloq.tasks.records import is_record, read_records
from cloq.tasks.score import Difference, Estimate, estimate, paired
from cloq.tasks.spec import RowResult, TaskScore
from cloq.use.evaluate import Quality

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated. base: a model folder, quantized or not. adapter: a PEFT folder on it, or `None`. rows: what an earlier
    evaluation found, in which case nothing is run and there is no base."""

    label: str
    base: Path | None
    adapter: Path | None = None
    rows: tuple[RowResult, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of one subject. scores: of tasks. quality: perplexities, as reports keep them."""

    subject: Subject
    rows: tuple[RowResult, ...]
    scores: tuple[TaskScore, ...] = ()
    quality: tuple[Quality, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """One model beside the first on one task and metric."""

    model: str
    first: str
    task: str
    metric: str
    difference: Difference


# -- which models ------------------------------------------------------------------------------------------------------


def subjects_of(model: str, adapters: Sequence[Path] = (), dense: bool = True) -> list[Subject]:
    """A run's models, 16-bit first where `dense`, and the run's base with every further adapter; or the one model that is named."""
    if not is_run(Path(model)):
        return [_subject(None, model, adapter) for adapter in adapters] if adapters else [_subject(None, model)]
    from cloq.models import locate

    out, spec = Path(model), read_run_file(Path(model) / RUN_FILE)
    base = locate(spec.quantized) if spec.quantized else out / "model"
    found = [Subject("16-bit", locate(spec.model, spec.revision))] if dense else []
    found += [Subject("base", base), Subject("base + adapter", base, out / "adapter")]
    return _distinct([*found, *(Subject(f"base + {adapter.name}", base, adapter) for adapter in adapters)])


def compared(models: Sequence[str]) -> list[Subject]:
    """Every model named `PATH` or `NAME=PATH`: a run (its base with its adapter), an adapter, a model, or stored rows."""
    found: list[Subject] = []
    for argument in models:
        label, _, path = argument.rpartition("=") if re.match(r"[^/=]+=.", argument) and not Path(argument).exists() else ("", "", argument)
        found += _stored(label, Path(path)) if is_record(Path(path)) else [_subject(label or None, path)]
    if len(found) < 2:
        raise SpecError(
            "--compare needs two models or more: cloq eval --compare A B, each a run, an adapter, a model or stored rows (.jsonl)"
        )
    return _distinct(found)


def is_run(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file()


def _subject(label: str | None, model: str, adapter: Path | None = None) -> Subject:
    from cloq.models import locate

    folder = Path(model)
    if adapter is not None:
        return Subject(label or f"{folder.name} + {adapter.name}", locate(model), adapter)
    if is_run(folder):
        spec = read_run_file(folder / RUN_FILE)
        return Subject(label or folder.resolve().name, locate(spec.quantized) if spec.quantized else folder / "model", folder / "adapter")
    if (folder / "adapter_config.json").is_file():
        return Subject(label or folder.resolve().name, _base_of(folder), folder)
    if not folder.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise RunError(f"{model} is no folder of a run, an adapter or a model, no stored rows, and no hub id owner/name")
    return Subject(label or folder.name, locate(model))


def _base_of(adapter: Path) -> Path:
    """The model that an adapter names as its base."""
    from cloq.export.peft import AdapterFolder
    from cloq.models import locate

    stated = AdapterFolder(adapter).config.get("base_model_name_or_path")
    if not stated:
        raise RunError(f"{adapter} does not name its base; give the base as the model and this folder as --adapter")
    return locate(stated)


def _stored(label: str, path: Path) -> list[Subject]:
    records = read_records(path)
    return [
        Subject(label if label and len(records) == 1 else f"{label}: {model}" if label else model, None, rows=tuple(rows))
        for model, rows in records.items()
    ]


def _distinct(subjects: list[Subject]) -> list[Subject]:
    labels = [subject.label for subject in subjects]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise SpecError(f"two models would be called {twice!r}; name them: NAME=PATH")
    return subjects


# -- perplexity --------------------------------------------------------------------------------------------------------


def measure_perplexity(subject: Subject, tokens: Tensor, text: str, device: str, progress: Progress | None = None) -> Outcome:
    """Streamed block by block: base and adapter as their files decode. Every sequence is a row, its value its mean log-likelihood."""
    from cloq.export.peft import AdapterFolder
    from cloq.export.read import QuantizedFolder
    from cloq.use.evaluate import perplexity

    decoder = QuantizedFolder(subject.base).decoder(device)
    add_adapter = AdapterFolder(subject.adapter).added_to(decoder) if subject.adapter else None
    count = (lambda done, total: progress(subject.label, done, total)) if progress else None
    found = perplexity(decoder, tokens, set_weights=add_adapter, progress=count)
    rows = tuple(
        RowResult(text, number, _digest(ids), found.protocol, {"perplexity": -loss})
        for number, (ids, loss) in enumerate(zip(tokens, found.losses, strict=True))
    )
    return Outcome(subject, rows, quality=(Quality(subject.label, found.value, found.tokens, found.stderr, found.protocol, text),))


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]


def text_tokens(subject: Subject, text: str, seq_len: int, samples: int | None) -> Tensor:
    """The text in the subject's own tokens, `(sequences, seq_len)`."""
    from cloq.calibration import documents
    from cloq.models import load_tokenizer
    from cloq.use.evaluate import beginning, evaluation_tokens

    tokenizer = load_tokenizer(subject.base)
    enough = samples * seq_len if samples else None
    return evaluation_tokens(beginning(documents(text, tokenizer=tokenizer), enough), tokenizer, seq_len, samples)


# -- tasks -------------------------------------------------------------------------------------------------------------


def answer_tasks(subject: Subject, prepared: PreparedTasks, device: str, decoded: bool, progress: Progress | None = None) -> Outcome:
    """The subject's results on prepared tasks. decoded: see `cloq.tasks.model`."""
    from cloq.tasks.model import opened

    with opened(subject.base, subject.adapter, device, decoded) as model:
        answers = answer(model, prepared, subject.label, progress)
    return Outcome(subject, answers.rows, answers.scores)


# -- beside each other -------------------------------------------------------------------------------------------------


def comparisons(outcomes: Sequence[Outcome], seed: int = 0) -> list[Comparison]:
    """Every model but the first beside the first, on every task and metric of which both have rows in common."""
    first, *others = outcomes
    return [
        Comparison(other.subject.label, first.subject.label, task, metric, found)
        for other in others
        for task, metric in _measured(first.rows)
        if (found := paired(first.rows, other.rows, task, metric, seed)) is not None
    ]


def _measured(rows: Sequence[RowResult]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.task, metric) for row in rows for metric in row.metrics))


def all_scores(outcome: Outcome, seed: int = 0) -> list[TaskScore]:
    """The outcome's scores, and those of its other rows: perplexities, and what was stored earlier."""
    known = {(score.task, score.metric, score.protocol) for score in outcome.scores}
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in outcome.rows:
        for metric, value in row.metrics.items():
            found.setdefault((row.task, metric, row.protocol), []).append(value)
    further = [_score(outcome, *key, estimate(key[1], values, seed)) for key, values in found.items() if key not in known]
    return [*outcome.scores, *further]


def _score(outcome: Outcome, task: str, metric: str, protocol: str, one: Estimate) -> TaskScore:
    weights = "as its files decode" if outcome.subject.base else "stored rows"
    label = outcome.subject.label
    return TaskScore(label, task, metric, one.value, one.stderr, one.low, one.high, one.rows, one.rows, protocol, weights)
