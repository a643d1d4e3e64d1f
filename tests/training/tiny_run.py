"""A finished run on a tiny model with factors that matter, and rows to train it on."""

from __future__ import annotations

import json
from pathlib import Path

from cloq.quantizers import Rtn
from tests.finished import Finished, finish

WORDS = ("one", "two", "three", "four", "five", "six", "seven")


def tiny_run(root: Path, bits: int = 2, form: str = "gptq", family: str = "llama", **config) -> Finished:
    """In `root/out`, with base and adapter."""
    run = finish(family, root, lambda name, weight: Rtn(bits, 32).quantize(weight), **config)
    run.adapter(run.export(form))
    return run


def sums(count: int = 24) -> list[dict]:
    pairs = [(i % 7, (3 * i) % 5) for i in range(count)]
    return [{"question": f"What is {WORDS[a]} plus {WORDS[b]}?", "answer": f"It is {a + b}."} for a, b in pairs]


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
