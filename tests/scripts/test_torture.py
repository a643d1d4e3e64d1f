"""The torture script: a short round of faults on a tiny model, and a judge that can tell wrong from right."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torture
from faults.damage import damaged
from faults.trial import CRASHED, REFUSED, RIGHT, WRONG, Ended, Verdict, judge, same

ROOT = Path(__file__).parents[2]


def test_a_round_of_faults():
    """In a process of its own: its children are forked, which threads of this one would not survive."""
    kinds = ["kill -9 and continue", "stored block damaged", "shard vanishes in between", "full disk", "two runs on one folder"]
    command = [sys.executable, str(ROOT / "scripts/torture.py"), "--seed", "2", *(part for kind in kinds for part in ("--only", kind))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"| {kind} | 1 |" in done.stdout for kind in kinds) and "| all | 5 |" in done.stdout


@pytest.mark.parametrize(
    ("code", "said", "complaint", "kind"),
    [
        (0, "", None, RIGHT),
        (0, "", "other bytes", WRONG),
        (2, "a library's greeting\nerror: the shard is missing; fetch it again", None, REFUSED),
        (2, "error: one\ntwo\nthree", None, WRONG),
        (2, "error: one\nTraceback (most recent call last)", None, WRONG),
        (2, "nothing that explains it", None, WRONG),
        (1, "error: one", None, WRONG),
        (CRASHED, "Traceback (most recent call last)", None, WRONG),
        (-9, "", None, WRONG),
    ],
)
def test_the_judge(code, said, complaint, kind):
    assert judge(Ended(code, said), lambda: complaint).kind == kind


def test_one_other_byte_is_other_bytes(tmp_path):
    from bench_resume import digest

    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_bytes(b"abc")
    complaint = same(digest(tmp_path), tmp_path)
    assert complaint() is None
    (tmp_path / "model/weights").write_bytes(b"abd")
    assert "model/weights" in complaint()
    (tmp_path / "model/weights").unlink()
    assert "model/weights" in complaint()


def test_damage_damages():
    import random

    content = bytes(range(256)) * 4
    changed = [damaged(content, random.Random(seed)) for seed in range(200)]
    assert sum(other != content for other in changed) > 180 and len({len(other) for other in changed}) > 20


def test_anything_wrong_is_exit_code_1(monkeypatch, capsys):
    """The script's own answer, where a fault finds something."""
    import contextlib

    monkeypatch.setattr(torture, "bench", lambda: contextlib.nullcontext())
    monkeypatch.setattr(torture, "_load_everything", lambda: None)
    kinds = iter([RIGHT, WRONG, REFUSED])
    monkeypatch.setitem(torture.FAULTS, "clock leaps", lambda made, draw: Verdict(next(kinds), "lost a block"))
    assert torture.main(["--only", "clock leaps", "--rounds", "3"]) == 1
    said = capsys.readouterr().out
    assert "WRONG: --only 'clock leaps' --first 1 --seed 0\nlost a block" in said and "| clock leaps | 3 | 1 | 1 | 1 |" in said
    monkeypatch.setitem(torture.FAULTS, "clock leaps", lambda made, draw: Verdict(RIGHT))
    assert torture.main(["--only", "clock leaps"]) == 0


def test_the_table_adds_up():
    made = torture.table({"a": Counter({RIGHT: 2, WRONG: 1}), "b": Counter({REFUSED: 3})})
    assert made.splitlines()[-1] == "| all | 6 | 2 | 3 | 1 |"
