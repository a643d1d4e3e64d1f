"""Whatever a run reads may be broken or made to deceive: it is read well, or refused in a line or two; nothing else ever happens.

A short version of what `scripts/torture.py` does at length. `CLOQ_FUZZ_EXAMPLES=1000 pytest tests/test_fuzz.py` looks longer.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from faults import fuzz
from faults.bench import Bench, save_model, save_text
from faults.trial import REFUSED, RIGHT, WRONG

import cloq

EXAMPLES = int(os.environ.get("CLOQ_FUZZ_EXAMPLES", "25"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    work = tmp_path_factory.mktemp("fuzz")
    save_model(work / "model")
    save_text(work / "text.txt")
    cloq.quantize(
        str(work / "model"),
        out=work / "out",
        calib=str(work / "text.txt"),
        bits=2,
        group_size=32,
        rank=4,
        calib_samples=2,
        seq_len=16,
        device="cpu",
    )
    return Bench(work, work / "model", work / "text.txt", work / "out", {}, 0.0)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """A damaged name of a model may look like a hub id."""
    import huggingface_hub

    def refused(*args, **kwargs):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refused)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)


@pytest.mark.parametrize("name", fuzz.CASES)
def test_read_well_or_refused(name, bench):
    found = {kind: [] for kind in (RIGHT, REFUSED, WRONG)}
    for number in range(EXAMPLES):
        verdict = fuzz.verdict_on(fuzz.CASES[name], bench, random.Random(f"{name}/{number}"))
        found[verdict.kind].append(f"{number}: {verdict.why}")
    assert not found[WRONG], "\n".join(found[WRONG])
    assert found[RIGHT] and (found[REFUSED] or name == "exported files"), "a fuzzer that never meets one of the two looks at nothing"


def test_a_case_that_falls_over_is_wrong(bench):
    def falls_over(bench, draw, folder):
        raise KeyError("a bug")

    assert fuzz.verdict_on(falls_over, bench, random.Random(0)).kind == WRONG
