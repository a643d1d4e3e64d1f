"""One process or several: what only the first one does, and what all of them learn of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from cloq.errors import CloqError, TrainingError


def is_main() -> bool:
    """Whether this process is the first one, as `accelerate launch` and `torchrun` number them."""
    return os.environ.get("RANK", "0") == "0"


def refuse_sharding() -> None:
    """Raises `TrainingError` under FSDP and DeepSpeed: packed integer weights can be split by neither."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise TrainingError(
                f"{name} is not supported: it splits weights that a quantized base holds as packed integers. Launch with plain data "
                "parallelism (accelerate launch --multi_gpu); a 2-4-bit base fits each GPU"
            )


def on_main(action: Callable[[], Any], world_size: int) -> Any:
    """What the action returns, which only the first process executes; its errors reach all of them."""
    if world_size == 1:
        return action()
    import torch.distributed

    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = action()
        except CloqError as error:
            outcome[1] = str(error)
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise TrainingError(outcome[1])
    return outcome[0]
