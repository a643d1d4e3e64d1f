"""From names of tasks to scores: everything that can be refused is refused before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from cloq.errors import TaskError
from cloq.specs import require_seed
from cloq.tasks.rows import TaskRows, read_task
from cloq.tasks.spec import Options, Question, RowResult, TaskScore
from cloq.tasks.table import TASKS, nearest, own_task

Progress = Callable[[str, int, int], None]
"""(what is being done, rows done, rows in all)"""


@dataclass(frozen=True)
class TaskSettings:
    """What is asked of every model.

    names: tasks of our table, or of lm-eval. data: files and folders by task; under `""` what serves all. limit: rows of each task, drawn
    by `seed`. shots: examples before each row, `None` for the task's own number. batch_tokens: padded tokens per forward. max_new_tokens:
    `None` for the task's own number. chat: every row goes through the tokenizer's chat template. harness: everything by lm-eval, also what
    the table has. include: folder with tasks of one's own in lm-eval's YAML.
    """

    names: tuple[str, ...]
    data: dict[str, Path] = field(default_factory=dict)
    limit: int | None = None
    shots: int | None = None
    seed: int = 0
    batch_tokens: int = 4096
    max_new_tokens: int | None = None
    chat: bool = False
    harness: bool = False
    include: Path | None = None

    def __post_init__(self):
        _require(bool(self.names), f"no task is named; known: {', '.join(TASKS)}")
        _require(len(set(self.names)) == len(self.names), f"a task is named twice in {', '.join(self.names)}")
        _require(self.limit is None or self.limit >= 1, f"--limit is {self.limit}; it must be at least 1")
        _require(self.shots is None or 0 <= self.shots <= 100, f"--shots is {self.shots}; allowed: 0 to 100")
        _require(self.batch_tokens >= 1, f"--batch-tokens is {self.batch_tokens}; it must be at least 1")
        _require(
            self.max_new_tokens is None or self.max_new_tokens >= 1, f"--max-new-tokens is {self.max_new_tokens}; it must be at least 1"
        )
        require_seed("--seed", self.seed)
        _require(not (self.chat and self.shots), "--chat asks without examples; leave --shots out")
        unknown = sorted(set(self.data) - set(self.names) - {own.name for name in self.names if (own := own_task(name))} - {""})
        _require(not unknown, f"--task-data names {', '.join(unknown)}, which is not among the tasks {', '.join(self.names)}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise TaskError(message)


@dataclass(frozen=True, eq=False)
class PreparedTasks:
    """Rows that were read, ready for any number of models. own: of our table. harness: `cloq.tasks.harness.HarnessTasks`, or `None`."""

    settings: TaskSettings
    own: tuple[TaskRows, ...]
    harness: object | None


@dataclass(frozen=True)
class Answers:
    """What one model did. rows: of all tasks. scores: one per task and metric."""

    rows: tuple[RowResult, ...]
    scores: tuple[TaskScore, ...]


def prepare(settings: TaskSettings) -> PreparedTasks:
    """Finds and reads every task. Raises a `CloqError` for an unknown name, with the nearest known one, and for missing or unfit data."""
    own = [] if settings.harness else [task for name in settings.names if (task := own_task(name))]
    _require(len({task.name for task in own}) == len(own), f"a task is named twice in {', '.join(settings.names)}")
    others = [name for name in settings.names if settings.harness or not own_task(name)]
    harness = _prepare_harness(others, settings) if others else None
    data = {own_task(name).name if name and own_task(name) else name: path for name, path in settings.data.items()}
    shots = 0 if settings.chat else settings.shots
    read = [read_task(task, data, limit=settings.limit, shots=shots, seed=settings.seed) for task in own]
    return PreparedTasks(settings, tuple(replace(rows, protocol=_protocol(rows, settings)) for rows in read), harness)


def _protocol(rows: TaskRows, settings: TaskSettings) -> str:
    """With whatever the user changed about how the rows are asked."""
    most = f", at most {settings.max_new_tokens} new tokens" if settings.max_new_tokens and rows.task.generative else ""
    return rows.protocol + (", chat template" if settings.chat else "") + most


def _prepare_harness(names: list[str], settings: TaskSettings):
    from cloq.tasks import harness

    guess = "" if settings.harness else "".join(f" (did you mean {near}?)" for name in names[:1] if (near := nearest(name)))
    harness.require(names, guess)
    manager = harness.task_manager(names, settings.include)
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = nearest(name, tuple(known))
            hint = f" (did you mean {near}?)" if near else ""
            raise TaskError(f"unknown task {name!r}{hint}: lm-eval does not have it, and cloq has {', '.join(TASKS)}")
    asked = harness.Asking(settings.limit, settings.shots, settings.seed, settings.max_new_tokens, settings.chat)
    return harness.load_tasks(manager, names, asked)


def answer(model, prepared: PreparedTasks, label: str, progress: Progress | None = None) -> Answers:
    """One model's results on every task. label: what the model is called in them."""
    rows: list[RowResult] = []
    scores: list[TaskScore] = []
    for task_rows in prepared.own:
        count = (lambda done, total, name=task_rows.task.name: progress(f"{label}: {name}", done, total)) if progress else None
        found = _answer_own(model, task_rows, prepared.settings, count)
        rows += found
        scores += _own_scores(task_rows, found, label, model.weights, prepared.settings)
    if prepared.harness is not None:
        found, further = _answer_harness(model, prepared, label)
        rows += found
        scores += further
    return Answers(tuple(rows), tuple(scores))


def _answer_own(model, rows: TaskRows, settings: TaskSettings, count) -> list[RowResult]:
    from cloq.tasks.generation import answer_questions
    from cloq.tasks.likelihood import answer_options

    if rows.task.generative:
        found = answer_questions(model, rows, settings.batch_tokens, settings.max_new_tokens, settings.chat, count)
    else:
        found = answer_options(model, rows, settings.batch_tokens, settings.chat, count)
    return [replace(one, total=rows.total, chance=_chance(asked.item)) for one, asked in zip(found, rows.rows, strict=True)]


def _own_scores(rows: TaskRows, found: Sequence[RowResult], label: str, weights: str, settings: TaskSettings) -> list[TaskScore]:
    return [score_of(rows.task.name, metric, found, label, weights, settings.seed) for metric in rows.task.metrics]


def score_of(task: str, metric: str, found: Sequence[RowResult], label: str, weights: str, seed: int = 0) -> TaskScore:
    """The score of rows that were asked by one protocol, as their results have it, whether they are new or were stored. label: the
    model's. Raises `ValueError` without rows."""
    from cloq.tasks.score import estimate

    one = estimate(metric, [row.metrics[metric] for row in found], seed)
    total = next((row.total for row in found if row.total is not None), len(found))
    chances = [row.chance for row in found if row.chance is not None]
    chance = fmean(chances) if len(chances) == len(found) else None
    return TaskScore(
        label, task, metric, one.value, one.stderr, one.low, one.high, one.rows, total, found[0].protocol, weights,
        sum(row.truncated for row in found), chance,
    )  # fmt: skip


def _chance(item: Options | Question) -> float | None:
    """What guessing among a row's options gives; `None` where there is nothing to choose from."""
    return 1 / len(item.pairs) if isinstance(item, Options) and len(item.pairs) > 1 else None


def _answer_harness(model, prepared: PreparedTasks, label: str) -> tuple[list[RowResult], list[TaskScore]]:
    from cloq.tasks.harness import run_tasks

    settings, wanted = prepared.settings, prepared.harness
    rows, aggregates = run_tasks(model, wanted, max(1, settings.batch_tokens // 512))
    rows = [replace(row, total=wanted.totals[row.task]) for row in rows]
    scores = []
    for task in wanted.tasks:
        own = [row for row in rows if row.task == task]
        total, protocol = wanted.totals[task], wanted.protocol(task)
        for metric in own[0].metrics if own else ():
            scores.append(score_of(task, metric, own, label, model.weights, settings.seed))
        for one in (one for one in aggregates if one.task == task):
            nan = float("nan")
            scores.append(TaskScore(label, task, one.metric, one.value, one.stderr, nan, nan, len(own), total, protocol, model.weights))
    return rows, scores
