"""Any models beside each other: perplexity and tasks of runs, adapters, model folders and hub ids, with intervals and tests.

A run is three models: `16-bit`, `base`, and `base + adapter`. Where several runs are compared, each is its base with its adapter.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloq.api import RUN_FILE, read_run_file
from cloq.errors import RunError, SpecError
from cloq.specs import require
from cloq.tasks.evaluation import PreparedTasks, answer, score_of
from cloq.tasks.records import is_record, read_records
from cloq.tasks.score import Difference, paired
from cloq.tasks.spec import RowResult, TaskScore
from cloq.use.evaluate import Quality

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str, int, int], None]
SEQ_LEN = 2048
"""Tokens per sequence, where nobody asks for another number and every model takes as many."""


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated. base: a model folder, quantized or not. adapter: a PEFT folder on it, or `None`. rows: what an earlier
    evaluation found, in which case nothing is run and there is no base. run: the folder of the run whose base it is; `None` where the
    base was named by itself, so that the user decides whose the adapter is."""

    label: str
    base: Path | None
    adapter: Path | None = None
    rows: tuple[RowResult, ...] = ()
    run: Path | None = None


@dataclass(frozen=True)
class TextSettings:
    """What perplexities are measured on. source: as `--calib` takes. seq_len: tokens per sequence; `None` for 2048, or the smallest of the
    models' contexts where that is less. samples: only the first sequences, `None` for all. column: of rows, where it is not found by
    itself."""

    source: str
    seq_len: int | None = None
    samples: int | None = None
    column: str | None = None

    def __post_init__(self):
        require(
            self.seq_len is None or self.seq_len >= 2,
            f"--seq-len is {self.seq_len}; it must be at least 2, since a sequence's first token is not predicted ({SEQ_LEN} is usual)",
        )
        require(self.samples is None or self.samples >= 1, f"--samples is {self.samples}; it must be at least 1, or left out for all")


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of every model, and how it computes. text, tasks: `None` for none. decoded: see `cloq.tasks.model`."""

    text: TextSettings | None
    tasks: PreparedTasks | None
    device: str
    decoded: bool
    trust_remote_code: bool = False


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


def subjects_of(model: str, adapters: Sequence[str] = (), dense: bool = True) -> list[Subject]:
    """A run's models, 16-bit first where `dense`, and the run's base with every further adapter, `PATH` or `NAME=PATH`; or the one model
    that is named."""
    further = [_named(argument) for argument in adapters]
    if not is_run(Path(model)):
        return _distinct([_subject(label, model, Path(path)) for label, path in further] or [_subject(None, model)])
    from cloq.models import locate

    out, spec = Path(model), read_run_file(Path(model) / RUN_FILE)
    base = locate(spec.quantized) if spec.quantized else out / "model"
    found = [Subject("16-bit", locate(spec.model, spec.revision))] if dense else []
    found += [Subject("base", base), Subject("base + adapter", base, out / "adapter", run=out)]
    return _distinct([*found, *(Subject(label or f"base + {Path(path).name}", base, Path(path), run=out) for label, path in further)])


def compared(models: Sequence[str]) -> list[Subject]:
    """Every model named `PATH` or `NAME=PATH`: a run (its base with its adapter), an adapter, a model, or stored rows."""
    found: list[Subject] = []
    for label, path in map(_named, models):
        found += _stored(label or "", Path(path)) if is_record(Path(path)) else [_subject(label, path)]
    if len(found) < 2:
        raise SpecError(
            "--compare needs two models or more: cloq eval --compare A B, each a run, an adapter, a model or stored rows (.jsonl)"
        )
    return _distinct(found)


def _named(argument: str) -> tuple[str | None, str]:
    """`NAME=PATH` as the two, `PATH` without a name; a file or folder may have a = in its own name."""
    if re.match(r"[^/=]+=.", argument) and not Path(argument).exists():
        label, _, path = argument.partition("=")
        return label, os.path.expanduser(path)
    return None, argument


def is_run(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file()


def _subject(label: str | None, model: str, adapter: Path | None = None) -> Subject:
    from cloq.models import locate

    folder = Path(model)
    if adapter is not None:
        return Subject(label or f"{folder.name} + {adapter.name}", locate(model), adapter)
    if is_run(folder):
        spec = read_run_file(folder / RUN_FILE)
        base = locate(spec.quantized) if spec.quantized else folder / "model"
        return Subject(label or folder.resolve().name, base, folder / "adapter", run=folder)
    if (folder / "adapter_config.json").is_file():
        return Subject(label or folder.resolve().name, _base_of(folder), folder)
    if not folder.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise RunError(f"{model} is no folder of a run, an adapter or a model, no stored rows, and no hub id owner/name")
    return Subject(label or folder.name, locate(model))


_WITH_ITS_BASE = "name its base, or the run, as the model: cloq eval BASE --adapter"


def _base_of(adapter: Path) -> Path:
    """The model that an adapter names as its base."""
    from cloq.export.peft import AdapterFolder
    from cloq.models import locate

    stated = AdapterFolder(adapter).config.get("base_model_name_or_path")
    if not stated:
        raise RunError(f"{adapter} does not name its base; {_WITH_ITS_BASE} {adapter}")
    if Path(stated).is_absolute() and not Path(stated).exists():
        raise RunError(f"{adapter} names its base as {stated}, which is not there; {_WITH_ITS_BASE} {adapter}")
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


# -- what comes of them -------------------------------------------------------------------------------------------------


def evaluate(
    subjects: Sequence[Subject], asked: Asked, texts: Sequence[Tensor | None], progress: Progress | None = None
) -> list[Outcome]:  # fmt: skip
    """What comes of every subject, perplexity and tasks together. texts: as `look` gives them."""
    return [_outcome(subject, asked, tokens, progress) for subject, tokens in zip(subjects, texts, strict=True)]


def look(subjects: Sequence[Subject], asked: Asked) -> list[Tensor | None]:
    """The text in each subject's own tokens, `(sequences, length)`. Raises a `CloqError` for whatever the files say is wrong with one of
    the models, its adapter, its tokenizer, or the text, without reading a weight."""
    contexts = {subject.label: _look_at(subject, asked) for subject in subjects if subject.base is not None}
    if asked.text is None:
        return [None] * len(subjects)
    seq_len = _seq_len(contexts, asked.text.seq_len)
    return [text_tokens(subject, asked, seq_len) if subject.base is not None else None for subject in subjects]


_ON_ITS_BASE = "to evaluate it on the base that it was trained on, name that as the model: cloq eval BASE --adapter ADAPTER"


def _look_at(subject: Subject, asked: Asked) -> int | None:
    """The longest sequence that the model takes, where it says so."""
    from cloq.export.peft import AdapterFolder
    from cloq.export.read import QuantizedFolder, read_config
    from cloq.models import load_config, max_positions
    from cloq.tasks.generation import room_beside
    from cloq.tasks.model import look_at
    from cloq.use.pairing import refuse_unfit

    base, trust = subject.base, asked.trust_remote_code
    read_config(base)  # a path that is no model folder should not be looked for on the hub
    limit = max_positions(load_config(base, trust))
    if subject.adapter is not None:
        adapter = AdapterFolder(subject.adapter)
        refuse_unfit(adapter, base, subject.run, trust, _ON_ITS_BASE)
        if asked.text is not None:
            adapter.refuse_more_than_lora()
    if asked.text is not None:
        QuantizedFolder(base).decoder(trust_remote_code=trust)  # finds every tensor in its shape
    if asked.tasks is not None:
        look_at(base, subject.adapter, asked.decoded, asked.tasks.settings.chat, trust)
        for task in [rows.task for rows in asked.tasks.own if rows.task.generative]:
            room_beside(asked.tasks.settings.max_new_tokens or task.max_new_tokens, limit)
    return limit


def _seq_len(contexts: Mapping[str, int | None], wanted: int | None) -> int:
    """One length for all models, by label, so that they can be compared. Raises `SpecError` for one that a model does not take."""
    limits = {label: limit for label, limit in contexts.items() if limit is not None}
    shortest = min(limits, key=limits.__getitem__, default=None)
    if shortest is None:
        return wanted or SEQ_LEN
    require(
        wanted is None or wanted <= limits[shortest],
        f"--seq-len is {wanted}, but {shortest} takes at most {limits[shortest]} tokens; use --seq-len {limits[shortest]}",
    )
    return wanted or min(SEQ_LEN, limits[shortest])


def text_tokens(subject: Subject, asked: Asked, seq_len: int) -> Tensor:
    """The text in the subject's own tokens, `(sequences, seq_len)`. Raises `CalibrationError` if it cannot be read or is too short."""
    from cloq.calibration import documents
    from cloq.calibration.options import Options
    from cloq.models import load_tokenizer
    from cloq.use.evaluate import beginning, evaluation_tokens

    tokenizer, text = load_tokenizer(subject.base, asked.trust_remote_code), asked.text
    enough = text.samples * seq_len if text.samples else None
    read = documents(text.source, text.column, tokenizer, Options("--text", "--text-column", calibrates=False))
    return evaluation_tokens(beginning(read, enough), tokenizer, seq_len, text.samples)


def _outcome(subject: Subject, asked: Asked, tokens: Tensor | None, progress: Progress | None) -> Outcome:
    parts = [Outcome(subject, subject.rows)]
    if tokens is not None:
        parts.append(_measure_perplexity(subject, tokens, asked, progress))
    if subject.base is not None and asked.tasks is not None:
        parts.append(_answer_tasks(subject, asked, progress))
    return Outcome(subject, *(sum((getattr(part, key) for part in parts), ()) for key in ("rows", "scores", "quality")))


def _measure_perplexity(subject: Subject, tokens: Tensor, asked: Asked, progress: Progress | None) -> Outcome:
    """Streamed block by block: base and adapter as their files decode. Every sequence is a row, its value its mean log-likelihood."""
    from cloq.export.peft import AdapterFolder
    from cloq.export.read import QuantizedFolder
    from cloq.use.evaluate import perplexity

    decoder, text = QuantizedFolder(subject.base).decoder(asked.device, trust_remote_code=asked.trust_remote_code), asked.text.source
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


def _answer_tasks(subject: Subject, asked: Asked, progress: Progress | None) -> Outcome:
    from cloq.tasks.model import opened

    with opened(subject.base, subject.adapter, asked.device, asked.decoded, asked.trust_remote_code) as model:
        answers = answer(model, asked.tasks, subject.label, progress)
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
    found: dict[tuple[str, str, str], list[RowResult]] = {}
    for row in outcome.rows:
        for metric in row.metrics:
            found.setdefault((row.task, metric, row.protocol), []).append(row)
    weights = "as its files decode" if outcome.subject.base else "stored rows"
    further = [
        score_of(task, metric, rows, outcome.subject.label, weights, seed)
        for (task, metric, protocol), rows in found.items()
        if (task, metric, protocol) not in known
    ]
    return [*outcome.scores, *further]
