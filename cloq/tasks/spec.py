"""What a task is: rows → prompts, and answers → metrics. Nothing here knows a model.

A task's prompt and metric are its protocol, and the protocol's name stands beside every number. Where LM Evaluation Harness (lm-eval)
has a task of the same name, prompt and metric are those of its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Options:
    """A row that is answered by log-likelihoods: of its continuations the likeliest one, each after its context.

    pairs: (context, continuation) of every option. gold: number of the right one. lengths: characters of every option, without what joins
    it to its context. One option alone is a completion: it is right if greedy decoding would give it.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int
    lengths: tuple[int, ...]

    def solved(self) -> str:
        """The row with its answer, as an example before another row."""
        return "".join(self.pairs[self.gold])

    def after(self, examples: str) -> Options:
        """The same row with text before every context."""
        return Options(tuple((examples + context, rest) for context, rest in self.pairs), self.gold, self.lengths)


@dataclass(frozen=True)
class Question:
    """A row that is answered by generated text.

    prompt: what is completed. golds: answers that count as right. solution: what follows the prompt where the row is an example.
    instruction: the row's own words without any template, for a chat template.
    """

    prompt: str
    golds: tuple[str, ...]
    solution: str
    instruction: str

    def solved(self) -> str:
        return self.prompt + self.solution

    def after(self, examples: str) -> Question:
        return Question(examples + self.prompt, self.golds, self.solution, self.instruction)


Judge = Callable[[str, Question], dict[str, float]]
"""Generated text, cut at the first stop string → every metric of the row, 1 or 0."""


@dataclass(frozen=True)
class Task:
    """One task.

    columns: what a row must have; `a|b` is either. read: a row → how it is asked; it may raise for a row that is not of the kind.
    metrics: names, the one to quote first. hub: `owner/name:config:split`. files: what its data files are called, in lower case with
    underscores, without ending and split. splits: in the order in which they are looked for. advice: said when a column is missing.
    description: text before everything. separator: between examples. shots: examples before each row, unless another number is asked for.
    stop, max_new_tokens, judge: of tasks that generate.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Options | Question]
    metrics: tuple[str, ...]
    prompt: str
    files: tuple[str, ...] = ()
    hub: str | None = None
    splits: tuple[str, ...] = ("validation", "test")
    advice: str = ""
    description: str = ""
    separator: str = "\n\n"
    shots: int = 0
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 0
    judge: Judge | None = None

    @property
    def generative(self) -> bool:
        return self.judge is not None


@dataclass(frozen=True)
class RowResult:
    """One row's outcome. row: its number in the data, from 0. key: of its content. protocol: who asked, with how many examples; rows of two
    evaluations are the same if all of these are. truncated: the prompt did not fit the context and lost its beginning. detail:
    log-likelihoods, or the generated text. total: rows in the task's data, and chance: what guessing gives on this one, where they are
    known."""

    task: str
    row: int
    key: str
    protocol: str
    metrics: dict[str, float]
    truncated: bool = False
    detail: dict[str, Any] = field(default_factory=dict)
    total: int | None = None
    chance: float | None = None


@dataclass(frozen=True)
class TaskScore:
    """One model's score on one task, as a report keeps it.

    model: its label. value: mean of the metric over the rows (`perplexity`: exp of the mean negative log-likelihood). stderr: of `value`.
    low, high: 95 % confidence interval. rows: evaluated, of `total`. protocol: who asked, with how many examples. weights: how the model
    computed, such as `packed gptq` or `decoded to float32`. truncated: rows whose prompt lost its beginning. chance: what guessing gives,
    where it is known.
    """

    model: str
    task: str
    metric: str
    value: float
    stderr: float
    low: float
    high: float
    rows: int
    total: int
    protocol: str
    weights: str
    truncated: int = 0
    chance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
