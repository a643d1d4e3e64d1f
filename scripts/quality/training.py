"""One cell: the factors trained from their start, with losses before, during and after."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quality.cells import Cell
from quality.protocol import Protocol

EVALUATED = ("valid", "test")


def read_texts(protocol: Protocol) -> dict[str, Tensor]:
    """Token sequences `(sequences, length)` of the training, validation and test text."""
    from cloq.models import load_tokenizer, locate
    from cloq.use.evaluate import evaluation_tokens

    tokenizer = load_tokenizer(locate(protocol.model))

    def rows(path: str, length: int, most: int | None) -> Tensor:
        return evaluation_tokens(Path(path).read_text("utf8"), tokenizer, length, most)

    return {
        "train": rows(protocol.train, protocol.seq_len, None),
        "valid": rows(protocol.valid, protocol.eval_len, protocol.valid_samples),
        "test": rows(protocol.test, protocol.eval_len, protocol.test_samples),
    }


def train(protocol: Protocol, cell: Cell, model: nn.Module, texts: dict[str, Tensor]) -> dict[str, Any]:
    """AdamW on the factors alone, linear warm-up and cosine decay; the same sequences in the same order for every method of a seed. On the
    device that the model is on.

    The result says in `diverged` at which step the loss was no number any more, where it came to that.
    """
    from transformers import get_cosine_schedule_with_warmup

    torch.manual_seed(cell.seed)
    order = training_order(len(texts["train"]), protocol.steps, protocol.batch, cell.seed)
    factors = [p for p in model.parameters() if p.requires_grad]
    device = factors[0].device
    optimizer = torch.optim.AdamW(factors, lr=cell.lr, weight_decay=protocol.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(0.03 * protocol.steps)), protocol.steps)
    found = {"losses": [], "during": {}, "seconds": 0.0, "factors": sum(p.numel() for p in factors)}
    for step in range(protocol.steps):
        began = time.perf_counter()
        model.train()
        rows = texts["train"][order[step]].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=protocol.precision == "bf16"):
            value = model(input_ids=rows, labels=rows).loss
        value.backward()
        nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        found["seconds"] += time.perf_counter() - began
        found["losses"].append(value.item())
        if not math.isfinite(value.item()):
            return found | {"diverged": step + 1, "after": dict.fromkeys(EVALUATED, float("nan"))}
        if protocol.eval_every and (step + 1) % protocol.eval_every == 0 and step + 1 < protocol.steps:
            found["during"][step + 1] = loss(model, texts["valid"])
    return found | {"after": losses(model, texts)}


def training_order(sequences: int, steps: int, batch: int, seed: int) -> Tensor:
    """`(steps, batch)` numbers of sequences: all of them once in an order of the seed's, then in the same order again."""
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed))
    return order.repeat(-(-steps * batch // sequences))[: steps * batch].reshape(steps, batch)


def losses(model: nn.Module, texts: dict[str, Tensor]) -> dict[str, float]:
    """Of the validation and the test text."""
    return {name: loss(model, texts[name]) for name in EVALUATED}


@torch.no_grad()
def loss(model: nn.Module, rows: Tensor) -> float:
    """Mean negative log-likelihood in nats on `(sequences, length)`, every token but a sequence's first predicted."""
    model.eval()
    rows = rows.to(next(model.parameters()).device)
    return sum(float(model(input_ids=row[None], labels=row[None]).loss) for row in rows) / len(rows)
