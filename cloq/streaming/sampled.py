"""Some of a run's calibration tokens, the same ones however many processes there are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cloq.streaming.distributed import Processes


def sequences_of(tokens: int, length: int, total: int) -> int:
    """How many sequences of this length hold so many tokens, of as many as there are."""
    return min(total, math.ceil(tokens / length))


def sampled(own: Tensor, processes: Processes, tokens: int) -> dict[int, int]:
    """Of this process's sequences `(sequences, length)` those that hold, with all others', at least so many tokens: number among all → row.

    They are taken at even distances from all processes' sequences; the first process has some.
    """
    total = processes.total({"sequences": len(own)})["sequences"]
    count = sequences_of(tokens, own.shape[1], total)
    taken = {number * total // count for number in range(count)}
    return {number: row for row, number in enumerate(processes.share(torch.arange(total)).tolist()) if number in taken}
