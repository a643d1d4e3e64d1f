"""A function in several connected processes, as `torchrun` would start them, but without the seconds of importing everything anew."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.streaming.test_distributed",
        *("peft", "bitsandbytes", "cloq.export.peft", "cloq.report.page", "matplotlib.pyplot"),
        *(f"transformers.models.{family}.modeling_{family}" for family in ("llama", "olmoe")),
    ]
)

PATIENCE = 120
"""Seconds after which processes that have not ended are taken to hang."""


class Outcome(NamedTuple):
    """Of one process. value: what the function returned. error: type and message of what it raised. code: its exit code."""

    value: Any
    error: tuple[str, str] | None
    code: int | None


def several(size: int, work: Callable[..., Any], *args: Any) -> list[Outcome]:
    """Outcomes by rank. `work` is a function of `test_distributed`; a process that is killed has neither value nor error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(size)]
    processes = [CONTEXT.Process(target=_process, args=(rank, size, port, pipes[rank][1], work, args)) for rank in range(size)]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    end, outcomes = time.monotonic() + PATIENCE, []
    try:
        for (receiver, _), process in zip(pipes, processes, strict=True):
            if not receiver.poll(max(0.0, end - time.monotonic())):
                pytest.fail(f"the processes hang: {[p.is_alive() for p in processes]}")
            try:
                value, error = receiver.recv()
            except EOFError:
                value, error = None, None
            process.join(max(0.1, end - time.monotonic()))
            outcomes.append(Outcome(value, error, process.exitcode))
    finally:
        for process in processes:
            process.kill()
    return outcomes


def _process(rank: int, size: int, port: int, sender, work: Callable[..., Any], args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TOKENIZERS_PARALLELISM": "false"}
    import torch

    torch.set_num_threads(1)
    try:
        outcome = work(*args), None
    except BaseException as error:
        outcome = None, (type(error).__name__, str(error))
    sender.send(outcome)
    sender.close()
    os._exit(0)  # as abruptly as a process can end in good order: whoever still waits for this one has to notice
