"""Accuracy on tasks: own evaluation of local data, and every task of lm-eval.

spec        what a task is          options, questions   rows → how they are asked and judged
table       all tasks by name       rows                 data files → rows
model       what is evaluated       likelihood           log-likelihoods of options
generation  greedy answers          harness              lm-eval on our models
score       intervals, tests        records              every row's result, kept in a file
evaluation  from names to scores
"""

from cloq.tasks.evaluation import Answers, PreparedTasks, TaskSettings, answer, prepare
from cloq.tasks.spec import RowResult, Task, TaskScore
from cloq.tasks.table import TASKS

__all__ = ["TASKS", "Answers", "PreparedTasks", "RowResult", "Task", "TaskScore", "TaskSettings", "answer", "prepare"]
