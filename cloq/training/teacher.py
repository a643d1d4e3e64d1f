"""A model whose predictions a training follows: usually the 16-bit model that the run compressed.

Following a teacher asks for the whole distribution of every predicted token instead of the one token that is in the text. So a few
sequences say much, of any text, and nothing is learned but what the quantization took away (Hinton et al., arXiv:1503.02531; for the
factors of a 2-bit base RILQ, arXiv:2412.01129).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloq.api import RUN_FILE, read_run_file
from cloq.errors import TrainingError
from cloq.models import Checkpoint, load_config, locate
from cloq.training.batches import IGNORED
from cloq.training.spec import ORIGINAL, TrainSpec


@dataclass(frozen=True)
class Teacher:
    """folder: of the model."""

    folder: Path

    def fingerprint(self) -> str:
        """Of its tensors' names, sizes and content, as far as a run's own fingerprint of a model goes."""
        return Checkpoint(self.folder).fingerprint()

    def load(self, **kwargs: Any) -> nn.Module:
        """Frozen. kwargs: of `from_pretrained`."""
        from cloq.use.loading import load_base

        return load_base(self.folder, **kwargs).eval().requires_grad_(False)


def find_teacher(spec: TrainSpec, base: Path) -> Teacher | None:
    """From files alone. Raises `TrainingError` where the run does not say what its original was, or the model has another vocabulary than
    the base; `ModelError` where there is no such model."""
    if spec.teacher is None:
        return None
    model, revision = spec.teacher, None
    if spec.teacher == ORIGINAL:
        path = Path(spec.run) / RUN_FILE
        if not path.is_file():
            raise TrainingError(f"{spec.run} has no {RUN_FILE} that says what the original model was; name it with --teacher FOLDER")
        run = read_run_file(path)
        model, revision = run.model, run.revision
    folder = locate(model, revision)
    sizes = [load_config(place, spec.trust_remote_code).get_text_config().vocab_size for place in (folder, base)]
    if sizes[0] != sizes[1]:
        raise TrainingError(
            f"the teacher {folder} has a vocabulary of {sizes[0]} and the base one of {sizes[1]}: a teacher has to know the same tokens"
        )
    return Teacher(folder)


def taught_loss(student: Tensor, teacher: Tensor, labels: Tensor, share: float, tokens: Tensor | int | None = None) -> Tensor:
    """`share · KL(teacher ‖ student) + (1 − share) · cross-entropy`, in nats per predicted token.

    student, teacher: logits `(sequences, length, vocabulary)`. labels: `(sequences, length)`, those that do not count are `IGNORED`.
    tokens: what the sum over this batch is divided by, where the batch is a part of a step; by default its own predicted tokens.
    """
    counted = labels[:, 1:] != IGNORED
    ours, theirs = (logits[:, :-1][counted].float().log_softmax(-1) for logits in (student, teacher.detach()))
    total = share * nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    if share < 1:
        total = total + (1 - share) * nn.functional.nll_loss(ours, labels[:, 1:][counted], reduction="sum")
    return total / (counted.sum() if tokens is None else tokens)


@torch.no_grad()
def predictions(teacher: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The teacher's logits on a batch as `batches.collate` makes it."""
    return teacher(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False).logits
