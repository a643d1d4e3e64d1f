"""`cloq train`: flags, what is printed, and one clear line with code 2 for bad input, before any model is loaded."""

import dataclasses
import json
import subprocess
import sys

import pytest

from cloq.cli import main
from cloq.cli.train import PANELS, data_lines, summary
from cloq.training import TrainResult, TrainSpec
from tests.finished import needs

gptq = needs("gptqmodel", "optimum")
QUICK = ["--steps", "2", "--seq-len", "64", "--batch-size", "4", "--device", "cpu"]


def test_every_setting_is_a_flag_or_the_argument():
    flags = [name for panel in PANELS.values() for name in panel]
    assert {f.name for f in dataclasses.fields(TrainSpec)} - set(flags) == {"run"} and len(flags) == len(set(flags))


def test_help_loads_nothing_heavy():
    code = "import sys; from cloq.cli import main; main(['train', '--help']); print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith("set()") and "--weight-decay" in said


@gptq
def test_people_read_what_was_done(out, rows, tmp_path, capsys):
    assert main(["train", str(out), "--data", str(rows), "--eval-share", "0.2", "--to", str(tmp_path / "to"), *QUICK]) == 0
    said = capsys.readouterr()
    assert "data: 24 rows, 19 sequences" in said.err and "evaluation: 5 other sequences of these rows, " in said.err
    assert "24 rows" in said.err and "step 2: evaluation loss" in said.err
    assert "in 2 steps" in said.out and "perplexity" in said.out and f"adapter={str(tmp_path / 'to')!r}" in said.out


@gptq
def test_scripts_read_json_lines_and_nothing_else(out, rows, tmp_path, capsys):
    argv = ["train", str(out), "--data", str(rows), "--template", "{question}\\n", "--to", str(tmp_path / "to"), "--json", *QUICK]
    assert main(argv) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["event"] for e in events] == ["start", "step", "step", "checkpoint", "done"]
    import yaml

    assert yaml.safe_load((tmp_path / "to/train.yaml").read_text())["settings"]["template"] == "{question}\n"


@gptq
def test_quiet_is_quiet(out, rows, tmp_path, capsys):
    assert main(["train", str(out), "--data", str(rows), "--to", str(tmp_path / "to"), "--quiet", *QUICK]) == 0
    said = capsys.readouterr()
    assert said.out == said.err == ""


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""
    from cloq.training import run

    monkeypatch.setattr(run, "load", lambda *a, **k: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{out}"], "there is nothing to train on; name rows or text with --data"),
        (["nowhere", "--data", "{rows}"], "there is no folder nowhere"),
        (["{tmp}", "--data", "{rows}"], "has no adapter; it is not a finished run"),
        (["{out}", "--seq-len", "64", "--data", "nowhere.jsonl"], "there is no file or folder nowhere.jsonl"),
        (["{out}", "--seq-len", "64", "--data", "{rows}", "--answer-column", "reply"], "has no column 'reply'"),
        (["{out}", "--seq-len", "64", "--data", "{empty}"], "holds no row with text in it"),
        (["{out}", "--seq-len", "64", "--data", "{rows}", "--eval-data", "{empty}"], "give other data to --eval-data"),
        (["{out}", "--data", "{rows}", "--seq-len", "4096"], "takes at most 128 tokens; use --seq-len 128"),
        (["{out}", "--data", "{rows}", "--seq-len", "64", "--to", "{foreign}"], "holds something else"),
        (["{out}", "--data", "{rows}", "--recipe", "gsm9k"], "unknown recipe 'gsm9k'"),
        (["{out}", "--data", "{rows}", "--lr", "7"], "lr is 7.0"),
        (["--config", "{tmp}/train.yaml"], "does not exist"),
        (["{out}", "--seq-len", "64", "--data", "{rows},{empty}"], "is a mixture"),
    ],
)  # fmt: skip
def test_bad_input(out, rows, tmp_path, capsys, no_model, argv, said):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/mine.txt").write_text("keep")
    (tmp_path / "empty.jsonl").write_text("")
    places = {"out": out, "rows": rows, "tmp": tmp_path, "empty": tmp_path / "empty.jsonl", "foreign": tmp_path / "foreign"}
    assert main(["train", *(a.format_map(places) if "{" in a else a for a in argv)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert not (out / "trained").exists()


def test_one_step_has_no_course(tmp_path):
    report = {"steps": [{"loss": 7.5}], "evaluations": [], "seconds": 1.0}
    assert summary(TrainResult(tmp_path, TrainSpec(run="run"), report))[0] == "loss        7.5000 before the one step, 1 s"


def test_what_became_of_the_rows_is_said():
    counts = {"rows": 9, "empty": 1, "long": 2, "dropped": 3, "examples": 5, "tokens": 50, "predicted": 20, "leftover": 0}
    line = data_lines({"continued": 4, "seq_len": 64, "long": "truncate", "data": counts, "eval_data": None})
    assert line[0] == "continued after step 4" and len(line) == 2
    assert "2 rows of more than 64 tokens: --long truncate; 3 rows left out, no answer within 64 tokens" in line[1]
