"""transformers' Trainer, with what a run that must be exact needs besides: a loss over all evaluation tokens that touches no random state,
checkpoints that are sealed when they are complete, and an end where the loss is no number."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from cloq.errors import TrainingError
from cloq.training.batches import collate, predicted
from cloq.training.checkpoints import TrainingFolder
from cloq.training.examples import Example
from cloq.training.spec import TrainSpec
from cloq.training.teacher import predictions, taught_loss

Emit = Callable[[str, dict[str, Any]], None]


class AdapterTrainer(Trainer):
    """Trains what requires gradients. before: seconds that earlier calls spent on the same run. teacher: whose predictions to follow, on
    the device already."""

    def __init__(
        self, model: nn.Module, arguments: TrainingArguments, spec: TrainSpec, folder: TrainingFolder, emit: Emit,
        examples: Sequence[Example], evaluation: Sequence[Example], before: float = 0.0, teacher: nn.Module | None = None,
    ):  # fmt: skip
        self._teacher, self._predicted = teacher, None
        self._spec, self._folder, self._emit, self._evaluation = spec, folder, emit, evaluation
        self._started = time.perf_counter() - before
        super().__init__(
            model, arguments, data_collator=collate, train_dataset=list(examples), compute_loss_func=self._taught if teacher else None
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(_Rhythm(spec, bool(evaluation)))
        self.add_callback(_Finite(self.not_a_number))

    @property
    def seconds(self) -> float:
        """Spent on the run so far, by earlier calls too."""
        return time.perf_counter() - self._started

    # -- training ------------------------------------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """transformers' schedule but for its warm-up, which begins at zero: here step k of w has k / w of the rate."""
        if self.lr_scheduler is None:
            theirs = super().create_scheduler(num_training_steps, optimizer)
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = LambdaLR(theirs.optimizer, [_warmed_up(rate, warmup) for rate in theirs.lr_lambdas])
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        broken = self.accelerator.reduce((~torch.isfinite(loss)).float(), "sum")  # all processes stop together
        if broken.item():
            raise self.not_a_number(f"loss of step {self.state.global_step + 1}")
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args, **kwargs):
        if self._teacher is not None:
            self._predicted = predictions(self._teacher, inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _taught(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        predicted, self._predicted = self._predicted, None
        return taught_loss(outputs.logits, predicted, labels, self._spec.distill, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" in logs:
            values = {key: float(logs[key]) for key in ("loss", "grad_norm", "learning_rate", "epoch")}
            self._emit("step", {"step": self.state.global_step, "steps": self.state.max_steps, **values, "seconds": self.seconds})

    def not_a_number(self, what: str) -> TrainingError:
        """The error for a value that is none: before anything was trained the start is to blame, later the training."""
        stopped = f"the {what} is not a finite number, so training stopped there"
        float32 = ", or use --precision float32" if self.args.bf16 else ""
        if self.state.global_step == 0:
            odd = next((name for name, value in self.model.named_parameters() if not bool(value.isfinite().all())), None)
            guess = f"factors that are too large, or a damaged base{' or teacher' if self._teacher else ''}"
            return TrainingError(
                f"{stopped}. Nothing was trained yet, so no learning rate helps: the start is broken "
                f"({f'NaN or Inf in {odd}' if odd else guess}). Look at the run with cloq check {self._spec.run}, or name another start "
                f"with --adapter or --base{float32}"
            )
        kept = "The checkpoints before it are kept" if self._folder.checkpoints() else "There is no checkpoint yet"
        return TrainingError(f"{stopped}. {kept}. Train again with a lower --lr or a longer --warmup, and --restart{float32}")

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The mean loss over all predicted tokens of the evaluation data, in nats, each process its share of the examples."""
        size, rank, world = self.args.eval_batch_size, self.args.process_index, self.args.world_size
        mine = self._evaluation[rank::world]
        total = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        for start in range(0, len(mine), size):
            batch = self._prepare_inputs(collate(mine[start : start + size]))
            with self.compute_loss_context_manager():
                loss = self.model(**batch, use_cache=False).loss
            tokens = predicted(batch).double().cpu()
            total += torch.stack([loss.double().cpu() * tokens, tokens])
        self.model.train()
        loss, tokens = self.accelerator.reduce(total.to(self.args.device), "sum").tolist()
        if not math.isfinite(loss):
            step = self.state.global_step
            raise self.not_a_number(f"evaluation loss after step {step}" if step else "evaluation loss before the first step")
        metrics = {"eval_loss": loss / tokens, "eval_tokens": tokens}
        self.log(dict(metrics))
        self._emit("eval", {"step": self.state.global_step, "loss": loss / tokens, "tokens": int(tokens)})
        return metrics

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.world_size > 1:
            torch.distributed.barrier()  # every process has written its random state
        if self.is_world_process_zero():
            checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            last = self.state.global_step >= self.state.max_steps
            self._folder.seal(checkpoint, {"step": self.state.global_step, "last": last, "seconds": self.seconds})
            self._folder.prune(self._spec.save_limit)
            self._emit("checkpoint", {"step": self.state.global_step, "folder": str(checkpoint)})

    def restore(self, checkpoint: Path) -> None:
        """Factors and history as they were at the checkpoint after the last step, of which nothing is left to train."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """The adapter alone; Trainer would add its own arguments as a pickle."""
        self.model.save_pretrained(output_dir, save_embedding_layers=False)


class _Finite(TrainerCallback):
    """Stops before the optimizer makes weights of gradients that are not finite. Gradients are the same in all processes by then."""

    def __init__(self, error: Callable[[str], TrainingError]):
        self._error = error

    def on_pre_optimizer_step(self, args, state, control, model=None, **rest) -> None:
        finite = torch.stack([p.grad.isfinite().all() for p in model.parameters() if p.grad is not None])
        if not bool(finite.all()):
            raise self._error(f"gradient of step {state.global_step + 1}")


class _Rhythm(TrainerCallback):
    """When to evaluate and to save: every so many steps or every epoch, and at the end in any case."""

    def __init__(self, spec: TrainSpec, evaluates: bool):
        self._spec, self._evaluates = spec, evaluates

    def on_step_end(self, args, state, control, **rest):
        last = state.global_step >= state.max_steps
        control.should_save = last or _due(state.global_step, self._spec.save_every)
        control.should_evaluate = self._evaluates and (last or _due(state.global_step, self._spec.eval_every))
        return control

    def on_epoch_end(self, args, state, control, **rest):
        unfinished = state.global_step < state.max_steps
        control.should_save = unfinished and not self._spec.save_every
        control.should_evaluate = unfinished and self._evaluates and not self._spec.eval_every
        return control


def _warmed_up(rate: Callable[[int], float], warmup: int) -> Callable[[int], float]:
    """The share of the rate after so many steps, from transformers' own."""
    return lambda done: (done + 1) / warmup if done < warmup else rate(done)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
