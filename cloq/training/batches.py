"""Examples → the tensors of one forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cloq.errors import TrainingError
from cloq.training.examples import Example

IGNORED = -100
"""The label of what the loss does not count."""


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Pads on the right to the longest example. Where rows share a sequence there are position ids, which start over with each row and tell
    the model that rows do not see each other, and no attention mask; else an attention mask."""
    length = max(len(e.input_ids) for e in examples)
    shape = (len(examples), length)
    batch = {"input_ids": torch.zeros(shape, dtype=torch.int64), "labels": torch.full(shape, IGNORED)}
    packed = any(len(e.lengths) > 1 for e in examples)
    extra = "position_ids" if packed else "attention_mask"
    batch[extra] = torch.zeros(shape, dtype=torch.int64)
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        ids = torch.from_numpy(example.input_ids).long()
        batch["input_ids"][row, :n] = ids
        batch["labels"][row, :n] = torch.where(torch.from_numpy(example.completion_mask), ids, IGNORED)
        starts = torch.tensor((0, *example.lengths[:-1])).cumsum(0)
        batch["labels"][row, starts] = IGNORED  # nothing before it predicts a row's first token
        batch[extra][row, :n] = torch.cat([torch.arange(count) for count in example.lengths]) if packed else 1
    return batch


def predicted(batch: dict[str, Tensor]) -> Tensor:
    """Tokens of a batch that the loss counts."""
    return (batch["labels"][:, 1:] != IGNORED).sum()


@torch.no_grad()
def refuse_leaking(model: nn.Module) -> None:
    """Raises `TrainingError` if rows that share a sequence would see each other in this model, which is found out by running it."""
    device = next(model.parameters()).device
    ids = torch.arange(1, 13, device=device)[None]
    try:
        together = model(input_ids=ids, position_ids=torch.arange(6, device=device).repeat(2)[None], use_cache=False).logits[0, 6:]
        alone = model(input_ids=ids[:, 6:], use_cache=False).logits[0]
    except TypeError:  # a family without position ids
        together, alone = torch.ones(1), torch.zeros(1)
    tolerance = 1e-3 if alone.dtype == torch.float32 else 5e-2
    if not bool((together - alone).norm() <= tolerance * alone.norm()):
        raise TrainingError(
            "in this model rows that share a sequence would see each other (it computes something else for a row behind another one than "
            "for the row alone); use --packing none"
        )
