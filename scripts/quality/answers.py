"""Accuracy of the model that is in memory on the tasks of `cloq eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from quality.protocol import Protocol


def read_tasks(protocol: Protocol):
    """The rows, the same for every model, as `cloq.tasks.PreparedTasks`; `None` without tasks. Raises a `CloqError` for what is not there,
    and for tasks that only lm-eval has: they have no result for each row."""
    from cloq.errors import TaskError
    from cloq.tasks import TaskSettings, prepare
    from cloq.tasks.table import own_task

    if not protocol.tasks:
        return None
    others = [name for name in protocol.tasks if own_task(name) is None]
    if others:
        raise TaskError(f"{', '.join(others)}: not among cloq's own tasks, which are what this comparison asks (cloq eval runs the others)")
    data = {"": Path(protocol.task_data)} if protocol.task_data else {}
    return prepare(TaskSettings(protocol.tasks, data, limit=protocol.task_rows))


def answer_tasks(model: nn.Module, protocol: Protocol, prepared) -> dict[str, dict[str, Any]]:
    """Task → its main metric, that metric for each row, and what guessing gives."""
    from cloq.models import locate
    from cloq.tasks import answer
    from cloq.tasks.model import task_model

    if prepared is None:
        return {}
    answers = answer(task_model(model, locate(protocol.model), "decoded to float32"), prepared, "model")
    found: dict[str, dict[str, Any]] = {}
    for score in answers.scores:
        if score.task not in found:  # a task's first metric is its main one
            rows = [row.metrics[score.metric] for row in answers.rows if row.task == score.task]
            found[score.task] = {"metric": score.metric, "rows": rows, "chance": score.chance, "protocol": score.protocol}
    return found
