"""Reports of runs that never were, with every number chosen by a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from cloq.report import Report
from cloq.specs import RunSpec, run_spec
from cloq.streaming.store import LayerSummary
from cloq.types import LayerMetrics, WeightLayout
from cloq.use.evaluate import Quality

LLAMA = {"self_attn.q_proj": (96, 64), "self_attn.k_proj": (32, 64), "mlp.up_proj": (160, 64), "mlp.down_proj": (64, 160)}


def layer(
    seed: int = 0, shape: tuple[int, int] = (96, 64), rank: int = 16, points: int | None = None, heldout: bool = True,
    damping: float = 0.01, notes: Sequence[str] = (),
) -> LayerSummary:  # fmt: skip
    """A layer whose factors are the optimum: its whole spectrum sums to the share repaired."""
    draw = random.Random(seed)
    ratio = draw.uniform(0.6, 0.95)
    repaired = draw.uniform(0.2, 0.9)
    whole = [ratio**k for k in range(rank)]
    whole = [repaired * share / math.fsum(whole) for share in whole]
    points = min(rank, 32) if points is None else points
    stored = whole if points >= rank else [whole[i * (rank - 1) // (points - 1)] for i in range(points)]
    before = draw.uniform(0.01, 0.1)
    after = before * (1 - repaired)
    unseen = (before * 1.2, after * 1.4) if heldout else (None, None)
    metrics = LayerMetrics(
        before, after, *unseen, 4096, damping, draw.uniform(0.1, 2.0), rank, 2.28125, tuple(stored), tuple(notes),
    )  # fmt: skip
    return LayerSummary(WeightLayout("integer", shape, 2, 64, False, False), metrics)


def report(blocks: int = 3, kinds: dict[str, tuple[int, int]] = LLAMA, spec: RunSpec | None = None, **changes) -> Report:
    """A report with one layer of each kind in each block."""
    layers = {
        f"model.layers.{block}.{kind}": layer(100 * block + at, shape)
        for block in range(blocks)
        for at, (kind, shape) in enumerate(kinds.items())
    }
    values = {
        "seconds": 131.25,
        "phases": {"embed": 1.0, "capture": 71.5, "solve": 40.25, "propagate": 16.0},
        "sizes": {"original": 269_060_552, "base": 87_663_056, "adapter": 78_207_176},
        "peak_memory": {"host": 1_480_000_000},
        "versions": {"cloq": "0.1.0", "torch": "2.13.0"},
        "quality": quality(),
    }
    return Report(spec or run_spec(model="owner/tiny-model", calib="wikitext2"), layers, **(values | changes))


def quality(text: str = "wikitext-2 test", scale: float = 1.0) -> tuple[Quality, ...]:
    values = {"16-bit": 24.13, "base": 4227.3, "base + adapter": 270.4}
    return tuple(Quality(model, scale * value, 40_920, 0.03, "chunks-1024", text) for model, value in values.items())
