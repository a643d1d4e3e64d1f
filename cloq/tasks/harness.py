"""Tasks of LM Evaluation Harness (lm-eval), run by lm-eval itself on our model.

Every task that it has, with its own prompts, filters and metrics, and what its users write as YAML. Its results come back row by row, so
that intervals and comparisons are the same as for our own tasks.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cloq.errors import MissingLibrary, TaskError
from cloq.tasks.model import TaskModel
from cloq.tasks.score import estimate, values_of
from cloq.tasks.spec import RowResult


@dataclass(frozen=True)
class Asking:
    """How lm-eval is to ask. limit: rows of each task, drawn by `seed`. shots: `None` for a task's own number."""

    limit: int | None = None
    shots: int | None = None
    seed: int = 0
    max_new_tokens: int | None = None
    chat: bool = False

    def changes(self, generative: bool) -> str:
        """What differs from the task's own configuration, for the protocol."""
        most = f", at most {self.max_new_tokens} new tokens" if self.max_new_tokens and generative else ""
        return (", chat template" if self.chat else "") + most


@dataclass(frozen=True, eq=False)
class HarnessTasks:
    """Tasks with their data, ready to be run. tasks: by name, lm-eval's objects. manager: which loaded them. samples: numbers of the rows
    to run, and totals: how many there are, by task. shots: examples before each row."""

    tasks: Mapping[str, Any]
    manager: Any
    samples: Mapping[str, list[int]]
    totals: Mapping[str, int]
    shots: Mapping[str, int]
    asked: Asking

    def protocol(self, task: str) -> str:
        shots = self.shots[task]
        return f"lm-eval, {shots}-shot" + (f" (seed {self.asked.seed})" if shots else "") + self.asked.changes(self.generates(task))

    def generates(self, task: str) -> bool:
        return self.tasks[task].get_config("output_type") == "generate_until"


def require(names: Sequence[str], hint: str = "") -> None:
    """Raises `MissingLibrary` if lm-eval is not installed. hint: said with the names."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingLibrary("lm-eval", f"the task {', '.join(names)}{hint}", "tasks")


def task_manager(names: Sequence[str] = (), include: Path | None = None):
    """lm-eval's index of tasks, with the user's YAML files in `include`. The index of all that lm-eval has takes some seconds, so it is not
    made where the user's folder has every name."""
    if include is None:
        return _all_tasks()
    if not include.is_dir():
        raise TaskError(f"--include is {include}, which is no folder; name the folder of your task's YAML file")
    own = _manager(include_path=str(include), include_defaults=False)
    return own if set(names) <= set(own.all_subtasks) else _manager(include_path=str(include))


@functools.cache
def _all_tasks():
    return _manager()


def _manager(**options: Any):
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    return TaskManager(**options)


def load_tasks(manager, names: Sequence[str], asked: Asking) -> HarnessTasks:
    """Tasks with their data; groups are taken apart. Raises `TaskError` if one cannot be loaded, its data above all."""
    tasks: dict[str, Any] = {}
    for name in names:
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # configurations and data sets fail in every way there is
            reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
            raise TaskError(
                f"lm-eval cannot load the task {name} ({type(error).__name__}: {reason}); its data come from the hub, or from the files "
                "that your own YAML names"
            ) from error
    sizes = {name: len(list(task.eval_docs)) for name, task in tasks.items()}
    samples = {name: _drawn(size, asked.limit, asked.seed) for name, size in sizes.items()}
    return HarnessTasks(tasks, manager, samples, sizes, {name: _shots(task, asked.shots) for name, task in tasks.items()}, asked)


def _drawn(size: int, limit: int | None, seed: int) -> list[int]:
    return list(range(size)) if limit is None or limit >= size else sorted(random.Random(seed).sample(range(size), limit))


def _shots(task, shots: int | None) -> int:
    """lm-eval leaves a 0 that a task's configuration states."""
    own = task.get_config("num_fewshot")
    return own or 0 if shots is None or own == 0 else shots


@dataclass(frozen=True)
class Aggregate:
    """A score that is no mean over rows, as lm-eval computes it. stderr: NaN where lm-eval gives none."""

    task: str
    metric: str
    value: float
    stderr: float


def run_tasks(model: TaskModel, wanted: HarnessTasks, batch_size: int) -> tuple[list[RowResult], list[Aggregate]]:
    """Every row of every task, and the scores that rows do not give. A metric under a filter is called `metric,filter`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    asked, limit = wanted.asked, {"max_length": model.max_positions} if model.max_positions else {}
    lm = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size, **limit)
    seeds = {f"{kind}_seed": asked.seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")}
    try:
        found = simple_evaluate(
            lm, tasks=list(wanted.tasks.values()), num_fewshot=asked.shots, samples=dict(wanted.samples), task_manager=wanted.manager,
            gen_kwargs={"max_gen_toks": asked.max_new_tokens} if asked.max_new_tokens else None, apply_chat_template=asked.chat,
            log_samples=True, bootstrap_iters=1000, **seeds,
        )  # fmt: skip
    except (AssertionError, ValueError) as error:  # a task that does not fit the model, its context above all
        raise TaskError(
            f"lm-eval cannot run {', '.join(wanted.tasks)} on this model ({(str(error).splitlines() or ['?'])[0][:300]})"
        ) from error
    rows = [row for name, samples in found["samples"].items() for row in _rows(name, samples, wanted.protocol(name))]
    return _without_aggregates(rows, _aggregates(found["results"], wanted.tasks))


def _rows(task: str, samples: list[dict[str, Any]], protocol: str) -> list[RowResult]:
    """lm-eval has one sample per row and filter; here a row is one, with the metrics of all filters."""
    rows: dict[int, RowResult] = {}
    for sample in samples:
        metrics = {_named(name, sample["filter"]): float(sample[name]) for name in sample["metrics"] if _is_number(sample[name])}
        earlier = rows.get(sample["doc_id"])
        if earlier is None:
            detail = {"target": sample["target"], "responses": sample["filtered_resps"]}
            rows[sample["doc_id"]] = RowResult(task, sample["doc_id"], sample["doc_hash"][:16], protocol, metrics, detail=detail)
        else:
            earlier.metrics.update(metrics)
    return list(rows.values())


def _aggregates(results: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> list[Aggregate]:
    """lm-eval's own `metric,filter` → value, with `metric_stderr,filter` beside it."""
    found = []
    for task in names:
        for key, value in results[task].items():
            metric, _, form = key.partition(",")
            if form and not metric.endswith("_stderr") and _is_number(value):
                stderr = results[task].get(f"{metric}_stderr,{form}")
                found.append(Aggregate(task, _named(metric, form), float(value), float(stderr) if _is_number(stderr) else math.nan))
    return found


def _without_aggregates(rows: list[RowResult], aggregates: list[Aggregate]) -> tuple[list[RowResult], list[Aggregate]]:
    """Keeps on the rows the metrics whose score they give, and as aggregates the others: what is no mean of rows is not made one."""
    given = set()
    for one in aggregates:
        values = list(values_of(rows, one.task, one.metric).values())
        if values and math.isclose(estimate(one.metric, values).value, one.value, rel_tol=1e-6, abs_tol=1e-9):
            given.add((one.task, one.metric))
    kept = [replace(row, metrics={name: v for name, v in row.metrics.items() if (row.task, name) in given}) for row in rows]
    return kept, [one for one in aggregates if (one.task, one.metric) not in given]


def _named(metric: str, form: str) -> str:
    return metric if form == "none" else f"{metric},{form}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not math.isnan(value)
