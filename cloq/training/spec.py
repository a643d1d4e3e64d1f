"""What was asked of a fine-tuning: a frozen value like the run's own, validated before anything heavy is imported."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from cloq.errors import SpecError
from cloq.specs import Spec, one_of, require, require_seed
from cloq.training.recipes import recipe as find_recipe

PACKINGS = ("auto", "none", "rows", "stream")
LONG = ("truncate", "drop", "split")
SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit")
PRECISIONS = ("auto", "bf16", "float32")
DEVICES = ("auto", "cpu")
REPORTS = ("tensorboard", "wandb", "mlflow")
ORIGINAL = "original"
"""As a teacher: the 16-bit model that the run compressed."""


@dataclass(frozen=True)
class TrainSpec(Spec):
    """One fine-tuning.

    run: folder of the finished cloq run. base, adapter: other folders than those of the run.
    data, eval_data: any source that calibration takes (a file, a folder, a hub data set, `wikitext2`, …). eval_share: rows of `data`
        held out for evaluation instead, drawn by the seed.
    column: of plain text or conversations; prompt_column, context_column, answer_column: of instruction rows. Found by name where not
        given.
    template: the prompt as text with `{column}` in it, instead of the tokenizer's chat template. The answer follows it at once.
    teacher: a model whose predictions the training follows: a folder, a hub id, or `original`, the 16-bit model that the run compressed. It
        is held in memory besides. distill: share of the loss that it makes up; the rest is the text's own tokens.
    completion_only: only answers count in the loss; of a conversation, the assistant's turns.
    packing: `none`, a row is a sequence; `rows`, several whole rows share one and do not see each other; `stream`, plain text is
        concatenated and cut; `auto`, `stream` for plain text and `none` for all else.
    long: what happens to rows of more than `seq_len` tokens.
    steps: instead of epochs. batch_size: sequences per process and forward. accumulation: forwards per step.
    warmup: share of the steps. dropout, weight_decay: on the factors, which hold the compensation of the quantization error too.
    precision: of the computation; the factors and the optimizer's state are float32 always. `auto`: bf16 on a GPU that has it.
    eval_every, save_every: steps; 0 is every epoch. save_limit: checkpoints that are kept.
    recipe: where the settings that were not given came from.
    """

    run: str = ""
    base: str | None = None
    adapter: str | None = None
    recipe: str | None = None
    data: str = ""
    eval_data: str | None = None
    eval_share: float = 0.0
    column: str | None = None
    prompt_column: str | None = None
    context_column: str | None = None
    answer_column: str | None = None
    template: str | None = None
    teacher: str | None = None
    distill: float = 1.0
    completion_only: bool = True
    packing: str = "auto"
    seq_len: int = 1024
    long: str = "truncate"
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    lr: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    dropout: float = 0.0
    optimizer: str = "adamw"
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    precision: str = "auto"
    device: str = "auto"
    eval_every: int = 0
    save_every: int = 0
    save_limit: int = 2
    report_to: tuple[str, ...] = ()
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self):
        self._check_choices()
        require(self.epochs > 0, f"epochs is {self.epochs}; it must be above 0 (3 is usual)")
        require(self.steps is None or self.steps >= 1, f"steps is {self.steps}; it must be at least 1")
        require(8 <= self.seq_len <= 1_000_000, f"seq_len is {self.seq_len}; allowed: 8 to the model's context (512 to 2048 is usual)")
        for name in ("batch_size", "accumulation", "save_limit"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("eval_every", "save_every"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it is a number of steps, or 0 for every epoch")
        require(0 < self.lr < 1, f"lr is {self.lr}; allowed: above 0, below 1 (3e-5 to 3e-4 is usual)")
        require(0 <= self.warmup < 1, f"warmup is {self.warmup}; it is a share of the steps (0.03 is usual)")
        require(0 <= self.weight_decay < 1, f"weight_decay is {self.weight_decay}; allowed: 0 to below 1")
        require(0 <= self.dropout < 1, f"dropout is {self.dropout}; allowed: 0 to below 1")
        require(self.max_grad_norm > 0, f"max_grad_norm is {self.max_grad_norm}; it must be above 0 (1 is usual)")
        require(0 <= self.eval_share <= 0.5, f"eval_share is {self.eval_share}; it is a share of the rows, at most 0.5")
        require(not (self.eval_data and self.eval_share), "eval_data and eval_share exclude each other; give one of them")
        require(
            not self.eval_every or bool(self.eval_data or self.eval_share),
            f"eval_every is {self.eval_every}, but there is nothing to evaluate on; give --eval-data or --eval-share",
        )
        require(0 < self.distill <= 1, f"distill is {self.distill}; it is the teacher's share of the loss, above 0 and at most 1")
        require(
            self.teacher is not None or self.distill == 1, "distill is the teacher's share of the loss; name one with --teacher original"
        )
        require_seed("seed", self.seed)

    def _check_choices(self) -> None:
        one_of("packing", self.packing, PACKINGS)
        one_of("long", self.long, LONG)
        one_of("schedule", self.schedule, SCHEDULES)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("precision", self.precision, PRECISIONS)
        one_of("device", self.device, DEVICES)
        for name in self.report_to:
            one_of("report_to", name, REPORTS)
        if self.template is not None:
            require(bool(template_columns(self.template)), f"the template {self.template!r} names no column; write one as {{question}}")
            for name in ("column", "prompt_column", "context_column"):
                excluded = f"{name} and template exclude each other; a template names the columns of the prompt itself"
                require(getattr(self, name) is None, excluded)
        turn = self.template or self.prompt_column or self.context_column or self.answer_column
        require(not (self.column and turn), "column names plain text or conversations; leave out the columns of prompt and answer")


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that a template names. Raises `SpecError` if its braces don't match or hold more than a name."""
    try:
        fields = [field for _, field, form, conversion in string.Formatter().parse(template) if field is not None]
        plain = all(field and not set(field) & set(".[]") for field in fields)
    except ValueError as error:
        raise SpecError(f"the template {template!r} cannot be read ({error}); write columns as {{question}} and braces doubled") from error
    require(plain, f"the template {template!r} may hold column names in braces and nothing else there")
    return tuple(dict.fromkeys(fields))


def train_spec(base: TrainSpec | None = None, /, bits: int | None = None, **settings: Any) -> TrainSpec:
    """A `TrainSpec` from settings, on top of their recipe, on top of `base` or of the defaults. bits: of the quantized base, for a recipe
    that is named by its family alone. Unknown names raise `SpecError`."""
    values = (base or TrainSpec()).to_dict()
    if settings.get("recipe"):
        name, from_recipe = find_recipe(settings["recipe"], bits)
        values |= from_recipe
        settings = settings | {"recipe": name}
    if isinstance(settings.get("report_to"), str):
        settings = settings | {"report_to": (settings["report_to"],)}
    return TrainSpec.from_dict(values | settings)
