"""The job: from a finished run and rows of text to a trained adapter, continued where it was killed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from cloq.api import peak_memory, write_settings
from cloq.errors import MissingLibrary, RunError, TrainingError
from cloq.export.peft import CONFIG, WEIGHTS
from cloq.models import load_tokenizer
from cloq.streaming.distributed import is_first
from cloq.streaming.store import write_atomically
from cloq.training.batches import refuse_leaking
from cloq.training.checkpoints import TrainingFolder
from cloq.training.examples import Examples, held_out, read_examples
from cloq.training.processes import on_first, refuse_sharding
from cloq.training.spec import TrainSpec
from cloq.training.start import Start, find_start, prepare
from cloq.training.teacher import Teacher, find_teacher
from cloq.training.trainer import AdapterTrainer, Emit
from cloq.use.loading import load

OPTIMIZERS = {
    "adamw": "adamw_torch", "adamw-8bit": "adamw_bnb_8bit", "paged-adamw": "paged_adamw_32bit", "paged-adamw-8bit": "paged_adamw_8bit",
}  # fmt: skip
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
WITHOUT_EFFECT = ("run", "base", "adapter", "recipe", "data", "eval_data", "teacher", "save_limit", "report_to")
"""Settings that may change between a run and its continuation: they decide no byte of the result, or have a fingerprint of their own."""


@dataclass(frozen=True)
class TrainResult:
    """A finished training. adapter: its folder, an ordinary PEFT one. report: what training.json says."""

    adapter: Path
    spec: TrainSpec
    report: dict[str, Any]

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.report["steps"]]


def run(spec: TrainSpec, to: str | Path | None = None, *, restart: bool = False, emit: Emit | None = None) -> TrainResult:
    """Executes or continues a training; of a finished one, returns the result.

    In each of several processes started by `accelerate launch` or `torchrun` the same call takes its share of every step; the first one
    writes and emits.
    """
    emit = emit if emit is not None and is_first() else _silent
    refuse_sharding()
    _refuse_unusable(spec)
    spec = _absolute(spec)
    start = find_start(spec)
    teacher = find_teacher(spec, start.base)
    folder = TrainingFolder(to or Path(spec.run) / "trained")
    folder.refuse_foreign()
    tokenizer = load_tokenizer(start.base, spec.trust_remote_code)
    examples, evaluation = _examples(spec, tokenizer, start)
    arguments = training_arguments(spec, folder)
    with _claimed(folder, _manifest(spec, start, teacher, examples, evaluation, arguments), restart):
        finished = on_first(lambda: _finished(folder))
        if finished is None:
            finished = _train(spec, start, teacher, folder, examples, evaluation, arguments, emit)
    return TrainResult(folder.out, spec, finished)


def _silent(event: str, values: dict[str, Any]) -> None:
    """Emits nothing."""


# -- before anything is loaded -----------------------------------------------------------------------------------------


def _refuse_unusable(spec: TrainSpec) -> None:
    """What the settings ask of this machine and is not there."""
    gpu = spec.device != "cpu" and torch.cuda.is_available()
    if not spec.data:
        raise TrainingError("there is nothing to train on; name rows or text with --data, such as --data rows.jsonl")
    if spec.optimizer != "adamw":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingLibrary("bitsandbytes", f"the optimizer {spec.optimizer}", "nf4")
        if spec.optimizer.startswith("paged") and not gpu:
            raise TrainingError(
                f"the optimizer {spec.optimizer} moves its state between a GPU and the host, and there is no GPU here; "
                "use --optimizer adamw or adamw-8bit"
            )
    if spec.precision == "bf16" and gpu and not torch.cuda.is_bf16_supported():
        raise TrainingError("this GPU has no bfloat16; use --precision float32")
    for name in spec.report_to:
        if importlib.util.find_spec(name) is None:
            raise MissingLibrary(name, f"reporting to {name}")


def _absolute(spec: TrainSpec) -> TrainSpec:
    names = ("run", "base", "adapter", "data", "eval_data", "teacher")
    return spec.replace(**{n: str(Path(v).resolve()) for n in names if (v := getattr(spec, n)) and Path(v).exists()})


def _examples(spec: TrainSpec, tokenizer, start: Start) -> tuple[Examples, Examples | None]:
    if start.max_positions is not None and spec.seq_len > start.max_positions:
        raise TrainingError(
            f"seq_len is {spec.seq_len}, but the model takes at most {start.max_positions} tokens; use --seq-len {start.max_positions}"
        )
    examples = read_examples(spec, spec.data, tokenizer)
    if spec.eval_share:
        return held_out(examples, spec.eval_share, spec.seed)
    return examples, read_examples(spec, spec.eval_data, tokenizer, "--eval-data") if spec.eval_data else None


def training_arguments(spec: TrainSpec, folder: TrainingFolder) -> TrainingArguments:
    """What the spec says in Trainer's words. Starts the processes' communication, where there are several."""
    cpu = spec.device == "cpu" or not torch.cuda.is_available()
    arguments = TrainingArguments(
        str(folder.folder),
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.accumulation,
        num_train_epochs=spec.epochs,
        max_steps=spec.steps or -1,
        learning_rate=spec.lr,
        lr_scheduler_type=SCHEDULES[spec.schedule],
        warmup_steps=spec.warmup,
        weight_decay=spec.weight_decay,
        optim=OPTIMIZERS[spec.optimizer],
        max_grad_norm=spec.max_grad_norm,
        bf16=spec.precision == "bf16" or (spec.precision == "auto" and not cpu and torch.cuda.is_bf16_supported()),
        use_cpu=cpu,
        ddp_find_unused_parameters=False,
        seed=spec.seed,
        report_to=list(spec.report_to) or "none",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        save_strategy="no",  # when to save and to evaluate is AdapterTrainer's
        eval_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
    )
    if arguments.n_gpu > 1:
        raise TrainingError(
            f"{arguments.n_gpu} GPUs are visible to one process; start one process for each (accelerate launch -m cloq train …) "
            "or show one (CUDA_VISIBLE_DEVICES=0)"
        )
    return arguments


# -- the run's folder --------------------------------------------------------------------------------------------------


def _manifest(
    spec: TrainSpec, start: Start, teacher: Teacher | None, examples: Examples, evaluation: Examples | None, arguments: TrainingArguments
) -> dict[str, Any]:  # fmt: skip
    """Everything that decides the bytes of the result."""
    return {
        "settings": {name: value for name, value in spec.to_dict().items() if name not in WITHOUT_EFFECT},
        "base": start.fingerprint,
        "adapter": hashlib.sha256((start.adapter.folder / WEIGHTS).read_bytes()).hexdigest(),
        **({"teacher": teacher.fingerprint()} if teacher else {}),
        "data": examples.fingerprint(),
        "eval_data": evaluation.fingerprint() if evaluation else None,
        "processes": arguments.world_size,
        "device": torch.cuda.get_device_name(arguments.device) if arguments.device.type == "cuda" else arguments.device.type,
        "bf16": arguments.bf16,
        "versions": start.versions,
    }


@contextlib.contextmanager
def _claimed(folder: TrainingFolder, manifest: dict[str, Any], restart: bool) -> Iterator[None]:
    with contextlib.ExitStack() as held:

        def claim() -> None:
            held.enter_context(folder.lock())
            folder.claim(manifest, restart)

        on_first(claim)
        yield


def _finished(folder: TrainingFolder) -> dict[str, Any] | None:
    """The report of a training that is complete."""
    try:
        return json.loads((folder.out / "training.json").read_text("utf8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{folder.out / 'training.json'} is damaged ({error}); delete it, and the same command writes it again") from error


# -- training ----------------------------------------------------------------------------------------------------------


def _train(
    spec: TrainSpec, start: Start, teacher: Teacher | None, folder: TrainingFolder, examples: Examples, evaluation: Examples | None,
    arguments: TrainingArguments, emit: Emit,
) -> dict[str, Any]:  # fmt: skip
    checkpoint, about = on_first(lambda: _newest(folder))
    model = _loaded(spec, start, arguments)
    if any(len(e.lengths) > 1 for e in examples.examples):
        refuse_leaking(model)
    arguments.eval_on_start = evaluation is not None and checkpoint is None
    trainer = AdapterTrainer(
        model,
        arguments,
        spec,
        folder,
        emit,
        examples.examples,
        evaluation.examples if evaluation else (),
        about.get("seconds", 0.0),
        teacher.load(**_placed(spec, arguments)) if teacher else None,
    )
    counts = {"data": examples.counts.to_dict(), "eval_data": evaluation.counts.to_dict() if evaluation else None}
    emit("start", {"kind": examples.kind, "continued": about.get("step", 0), "long": spec.long, "seq_len": spec.seq_len, **counts})
    if about.get("last"):
        trainer.restore(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    report = _report(spec, start, trainer, counts)
    return on_first(lambda: _write(spec, start, folder, model, report))


def _newest(folder: TrainingFolder) -> tuple[Path | None, dict[str, Any]]:
    checkpoint, about = folder.latest() or (None, {})
    folder.clear(about.get("step", -1))
    return checkpoint, about


def _loaded(spec: TrainSpec, start: Start, arguments: TrainingArguments) -> nn.Module:
    """The model on its device, with dropout, and with nothing but factors to train."""
    model = load(spec.run, trainable=True, base=start.base, adapter=start.adapter.folder, **_placed(spec, arguments))
    return prepare(model, spec)


def _placed(spec: TrainSpec, arguments: TrainingArguments) -> dict[str, Any]:
    """Where and in what precision a model is loaded."""
    placed = {"device_map": {"": arguments.device}} if arguments.device.type == "cuda" else {}
    code = {"trust_remote_code": True} if spec.trust_remote_code else {}
    return {"dtype": torch.bfloat16 if arguments.bf16 else torch.float32, **placed, **code}


def _report(spec: TrainSpec, start: Start, trainer: AdapterTrainer, counts: dict[str, Any]) -> dict[str, Any]:
    history = trainer.state.log_history
    steps = [{key: e[key] for key in ("step", "epoch", "loss", "grad_norm", "learning_rate")} for e in history if "loss" in e]
    evaluations = [{"step": e["step"], "loss": e["eval_loss"], "tokens": int(e["eval_tokens"])} for e in history if "eval_loss" in e]
    return {
        "base": str(start.base),
        "started_from": str(start.adapter.folder),
        "recipe": spec.recipe,
        "teacher": spec.teacher,
        **counts,
        "long_rows": spec.long,
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "steps": steps,
        "evaluations": evaluations,
        "seconds": trainer.seconds,
        "peak_memory": peak_memory(trainer.args.device),
        "processes": trainer.args.world_size,
        "device": trainer.args.device.type,
        "precision": "bf16" if trainer.args.bf16 else "float32",
        "versions": start.versions,
    }


def _write(spec: TrainSpec, start: Start, folder: TrainingFolder, model: nn.Module, report: dict[str, Any]) -> dict[str, Any]:
    """The result, each file whole; training.json last, which says that it is complete."""
    report = report | {"manifest": folder.manifest()}
    work = folder.folder / "result"
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = str(start.base)
    with folder.writing():
        model.save_pretrained(work, save_embedding_layers=False)
        saved = json.loads((work / CONFIG).read_text("utf8"))
        saved = {key: sorted(value) if key == "target_modules" and isinstance(value, list) else value for key, value in saved.items()}
        write_atomically(folder.out / WEIGHTS, (work / WEIGHTS).read_bytes())
        write_atomically(folder.out / CONFIG, (json.dumps(saved, indent=2, sort_keys=True) + "\n").encode())
        write_settings(spec, folder.out / "train.yaml")
        write_atomically(folder.out / "training.json", (json.dumps(report, indent=1) + "\n").encode())
        for path in work.iterdir():
            path.unlink()
        work.rmdir()
    return report
