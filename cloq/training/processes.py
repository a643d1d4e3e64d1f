"""One process or several: how training uses them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from cloq.errors import TrainingError
from cloq.streaming.distributed import Processes

T = TypeVar("T")


def refuse_sharding() -> None:
    """Raises `TrainingError` under FSDP and DeepSpeed: packed integer weights can be split by neither."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise TrainingError(
                f"{name} is not supported: it splits weights that a quantized base holds as packed integers. Launch with plain data "
                "parallelism (accelerate launch --multi_gpu); a 2-4-bit base fits each GPU"
            )


def on_first(action: Callable[[], T]) -> T:
    """What the action returns, which only the first process executes; its errors reach all of them."""
    processes = Processes.start()
    with processes.together():
        return processes.on_first(action)
