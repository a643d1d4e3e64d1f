"""A training that is killed, at whatever moment, goes on with the same command and ends with the bytes of an undisturbed one."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import cloq
from cloq.errors import CloqError, RunError
from cloq.training import run as job
from cloq.training.checkpoints import SEAL, TrainingFolder
from tests.finished import needs

pytestmark = needs("gptqmodel", "optimum")
SETTINGS = {
    "steps": 7, "save_every": 2, "eval_every": 3, "eval_share": 0.2, "batch_size": 2, "accumulation": 2, "seq_len": 64, "dropout": 0.2,
    "weight_decay": 0.1, "lr": 1e-3, "device": "cpu",
}  # fmt: skip


class Killed(BaseException):
    """Nothing catches it, as nothing catches the end of a process."""


def result(folder) -> tuple[bytes, bytes, dict]:
    report = json.loads((folder / "training.json").read_text())
    told = {key: report[key] for key in ("steps", "evaluations", "data")}
    return (folder / "adapter_model.safetensors").read_bytes(), (folder / "adapter_config.json").read_bytes(), told


@pytest.fixture(scope="module")
def undisturbed(out, rows, tmp_path_factory):
    to = tmp_path_factory.mktemp("undisturbed") / "to"
    cloq.train(out, data=str(rows), to=to, **SETTINGS)
    return result(to)


def killed_at(monkeypatch, moment: str):
    """An `emit` that ends the run, or a function that does in the place of one of cloq's."""

    def die(*args, **kwargs):
        raise Killed

    if moment.startswith("step"):
        return lambda event, values: die() if event == "step" and values["step"] == int(moment.split()[1]) else None
    if moment == "first evaluation":
        return lambda event, values: die() if event == "eval" else None
    if moment == "before the second seal":
        seal, calls = TrainingFolder.seal, []
        monkeypatch.setattr(TrainingFolder, "seal", lambda *a: die() if calls else (calls.append(1), seal(*a)))
    if moment == "before pruning":
        prune, calls = TrainingFolder.prune, []
        monkeypatch.setattr(TrainingFolder, "prune", lambda *a: die() if len(calls) == 2 else (calls.append(1), prune(*a)))
    if moment == "before the result":
        monkeypatch.setattr(job, "_write", die)
    if moment == "within the result":
        monkeypatch.setattr(job, "write_settings", die)
    return None


MOMENTS = (
    "first evaluation", "step 5", "before the second seal", "before pruning", "step 7", "before the result",
    "within the result",
)  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_same_command_ends_with_the_same_bytes(out, rows, tmp_path, monkeypatch, undisturbed, moment):
    to = tmp_path / "to"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        cloq.train(out, data=str(rows), to=to, emit=killed_at(patched, moment), **SETTINGS)
    assert not (to / "training.json").exists()
    torch.manual_seed(1234)  # whatever the process did in between
    started = []
    cloq.train(out, data=str(rows), to=to, emit=lambda event, values: started.append(values) if event == "start" else None, **SETTINGS)
    assert result(to) == undisturbed
    kept = {
        "step 5": 4,
        "before the second seal": 2,
        "step 7": 6,
        "before pruning": 6,
        "before the result": 7,
        "within the result": 7,
    }
    assert started[0]["continued"] == kept.get(moment, 0)


def test_checkpoints_are_pruned(out, rows, tmp_path):
    cloq.train(out, data=str(rows), to=tmp_path / "to", **SETTINGS)
    assert sorted(p.name for p in (tmp_path / "to/checkpoints").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7"]
    assert not list((tmp_path / "to").rglob("training_args.bin"))


@pytest.mark.slow
def test_kill_minus_nine(out, rows, tmp_path, undisturbed):
    """Of the real command, between two checkpoints."""
    argv = [sys.executable, "-m", "cloq", "train", str(out), "--data", str(rows), "--to", str(tmp_path / "to"), "--json"]
    for name, value in SETTINGS.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "step" and event["step"] == 5:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    cloq.train(out, data=str(rows), to=tmp_path / "to", **SETTINGS)
    assert result(tmp_path / "to") == undisturbed


@pytest.fixture
def stopped(out, rows, tmp_path, monkeypatch):
    """A folder with checkpoints 2 and 4, of a run that was killed in step 5."""
    with pytest.raises(Killed):
        cloq.train(out, data=str(rows), to=tmp_path / "to", emit=killed_at(monkeypatch, "step 5"), **SETTINGS)
    return tmp_path / "to"


def go_on(out, rows, to) -> int:
    started = []
    cloq.train(out, data=str(rows), to=to, emit=lambda event, values: started.append(values) if event == "start" else None, **SETTINGS)
    return started[0]["continued"]


def test_damaged_and_foreign_checkpoints_are_passed_over(out, rows, stopped, undisturbed):
    checkpoints = stopped / "checkpoints"
    (checkpoints / "checkpoint-4/optimizer.pt").write_bytes(b"truncated")
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-6")  # complete, but of another run
    seal = json.loads((checkpoints / "checkpoint-6" / SEAL).read_text())
    (checkpoints / "checkpoint-6" / SEAL).write_text(json.dumps(seal | {"run": "another"}))
    (checkpoints / "checkpoint-5").mkdir()  # half-written
    assert go_on(out, rows, stopped) == 2
    assert result(stopped) == undisturbed


def test_without_any_good_checkpoint_it_starts_over(out, rows, stopped, undisturbed):
    for seal in stopped.rglob(SEAL):
        seal.write_text("{")
    assert go_on(out, rows, stopped) == 0
    assert result(stopped) == undisturbed


def test_other_settings_and_other_data_are_refused_by_name(out, rows, stopped, tmp_path):
    with pytest.raises(RunError, match=r"settings.lr was 0.001, is 0.002.*another --to, or --restart"):
        cloq.train(out, data=str(rows), to=stopped, **SETTINGS | {"lr": 2e-3})
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(rows.read_text().splitlines()[:20]))
    with pytest.raises(RunError, match="data was"):
        cloq.train(out, data=str(fewer), to=stopped, **SETTINGS)
    same = tmp_path / "same rows elsewhere.jsonl"
    shutil.copy(rows, same)
    report = cloq.train(out, data=str(same), to=stopped, **SETTINGS | {"save_limit": 5}).report
    assert len(report["steps"]) == 7


def test_restart_discards(out, rows, stopped):
    report = cloq.train(out, data=str(rows), to=stopped, restart=True, **SETTINGS | {"lr": 2e-3, "steps": 1}).report
    assert len(report["steps"]) == 1


def test_a_finished_training_is_not_repeated(out, rows, tmp_path):
    first = cloq.train(out, data=str(rows), to=tmp_path / "to", **SETTINGS)
    before = result(tmp_path / "to")
    events = []
    again = cloq.train(out, data=str(rows), to=tmp_path / "to", emit=lambda event, values: events.append(event), **SETTINGS)
    assert again.report == first.report and result(tmp_path / "to") == before and events == []


def test_a_finished_training_may_lose_its_checkpoints(out, rows, tmp_path):
    quick, to = SETTINGS | {"steps": 1, "eval_share": 0.0, "eval_every": 0}, tmp_path / "to"

    def again(**changed):
        shutil.rmtree(to / "checkpoints")
        events = []
        return cloq.train(out, data=str(rows), to=to, emit=lambda event, values: events.append(event), **quick | changed).report, events

    first = cloq.train(out, data=str(rows), to=to, **quick)
    before = result(to)
    assert again() == (first.report, []) and result(to) == before
    with pytest.raises(RunError, match=r"other settings: settings.lr was 0.001, is 0.002"):
        again(lr=2e-3)
    report, events = again(lr=2e-3, restart=True)
    assert events[0] == "start" and report["manifest"]["settings"]["lr"] == 2e-3
    (to / "training.json").write_text(json.dumps({"started_from": "", "steps": []}))  # of an earlier version
    with pytest.raises(RunError, match="holds a finished training that does not say of what"):
        again()
    (to / "training.json").write_text("{}")  # somebody else's
    with pytest.raises(RunError, match="holds something else"):
        again(restart=True)


def test_a_foreign_folder_and_a_running_training_are_refused(out, rows, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(RunError, match=r"holds something else \(mine.txt\).*--to"):
        cloq.train(out, data=str(rows), to=tmp_path, **SETTINGS)
    folder = TrainingFolder(tmp_path / "to")
    with folder.lock(), pytest.raises(CloqError, match="another run is writing"):
        cloq.train(out, data=str(rows), to=tmp_path / "to", **SETTINGS)


def test_where_nothing_can_be_written_the_remedy_is_training_s_own(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"choose another --to, and run the same command again: checkpoints are kept"):
        TrainingFolder(tmp_path / "file" / "to").claim({})
