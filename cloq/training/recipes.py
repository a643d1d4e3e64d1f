"""Where to start: settings by task family and bit width.

The first two families are the protocols that the papers of this field share (learning rate, epochs, sequences per step, sequence
length, warm-up, schedule), with the lower learning rate at 2 bits; `instruct` is what is usual for instruction data. They
are starting points from the literature but for dropout and weight decay, which were chosen there for factors that start at zero. Here the
factors hold the largest part of what the layers compute from the first step: dropping some of their inputs ruins the model at any width,
and shrinking them shrinks the weights, so that no recipe does (docs/training.md has the numbers). Rates are LoRA's: adapters are exported
at a scale that makes them right.
"""

from __future__ import annotations

from typing import Any

from cloq.errors import SpecError

WIDTHS = (2, 3, 4)

FAMILIES: dict[str, dict[str, Any]] = {
    "wikitext2": {
        "data": "wikitext2", "packing": "stream", "seq_len": 1024, "epochs": 3.0, "batch_size": 8, "accumulation": 8,
        "schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0,
    },
    "gsm8k": {
        "completion_only": True, "seq_len": 512, "epochs": 6.0, "batch_size": 8, "accumulation": 2,
        "schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0,
    },
    "instruct": {
        "completion_only": True, "seq_len": 1024, "epochs": 2.0, "batch_size": 8, "accumulation": 4,
        "schedule": "cosine", "warmup": 0.03, "weight_decay": 0.0,
    },
}  # fmt: skip

LEARNING_RATES: dict[str, dict[int, float]] = {
    "wikitext2": {2: 2e-4, 3: 3e-4, 4: 3e-4},
    "gsm8k": {2: 2e-4, 3: 3e-4, 4: 3e-4},
    "instruct": {2: 2e-4, 3: 2e-4, 4: 2e-4},
}

RECIPES: dict[str, dict[str, Any]] = {
    f"{family}-{bits}bit": settings | {"lr": LEARNING_RATES[family][bits]} for family, settings in FAMILIES.items() for bits in WIDTHS
}


def recipe(name: str, bits: int | None = None) -> tuple[str, dict[str, Any]]:
    """A recipe's full name and settings. bits: of the base, where the name is a family's alone. Raises `SpecError` if there is none."""
    if name in FAMILIES:
        width = min(max(bits or 4, WIDTHS[0]), WIDTHS[-1])
        name = f"{name}-{width}bit"
    if name not in RECIPES:
        raise SpecError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}, or a family alone: {', '.join(FAMILIES)}")
    return name, dict(RECIPES[name])
