"""Where a run's activations wait changes nothing of what it makes."""

import pytest
import torch

import cloq.streaming.memory
from cloq.api import run
from cloq.models import OnDisk
from cloq.specs import run_spec
from cloq.streaming import fisher, pipeline
from cloq.streaming.device import place_to_wait
from tests.pretended import pretended_gpu
from tests.test_api import digest
from tests.tiny import tiny_spec


@pytest.fixture
def kept_on_disk(monkeypatch):
    """The shapes of all that is kept on disk."""
    shapes, keep = [], OnDisk.keep
    monkeypatch.setattr(OnDisk, "keep", lambda disk, hidden, *rest: shapes.append(hidden.shape) or keep(disk, hidden, *rest))
    return shapes


@pytest.mark.parametrize("settings", [{"rounds": 1}, {"fisher": 0.9, "adaptive_rank": True, "rounds": 1}, {"correction": 0.0, "rounds": 0}])
def test_on_disk_a_run_ends_with_the_same_bytes(settings, tmp_path, kept_on_disk):
    spec = tiny_spec(tmp_path, batch_tokens=64, **settings)
    run(spec, tmp_path / "memory")
    assert not kept_on_disk
    run(spec.replace(activations="disk"), tmp_path / "disk")
    blocks, calibration, heldout, followed = 3, 4, 2, 8  # batches: the first sequence of the calibration alone where the run corrects
    streams = 1 if "correction" in settings else 2
    expected = streams * (calibration + 1 + heldout) * blocks
    assert len(kept_on_disk) == expected + followed // 2 * blocks
    assert digest(tmp_path / "disk") == digest(tmp_path / "memory")


def test_a_run_continues_wherever_its_activations_wait(tmp_path, kept_on_disk):
    class Killed(BaseException):
        pass

    def kill(event, values):
        if event == "block" and values["block"] == 1:
            raise Killed

    spec = tiny_spec(tmp_path, rounds=1)
    with pytest.raises(Killed):
        run(spec.replace(activations="disk"), tmp_path / "killed", emit=kill)
    assert kept_on_disk and not [path for path in (tmp_path / "killed/.cloq").iterdir() if "tmp" in path.name]
    run(spec.replace(activations="host"), tmp_path / "killed")
    run(spec, tmp_path / "whole")
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("gpu", "host", "place"), [(1 << 30, 1 << 30, "device"), (1 << 15, 1 << 30, "host"), (1 << 15, 1 << 15, "disk"), (None, None, "device")]
)
def test_by_itself_a_run_takes_the_first_place_with_room(gpu, host, place, monkeypatch):
    monkeypatch.setattr(cloq.streaming.memory, "free_memory", lambda device, processes=1: gpu if device.type == "cuda" else host)
    size = 1 << 20
    assert place_to_wait(run_spec(), torch.device("cuda:0"), size) == place
    assert place_to_wait(run_spec(), torch.device("cpu"), size) == ("disk" if host == 1 << 15 else "device")
    for asked in ("device", "host", "disk"):
        assert place_to_wait(run_spec(activations=asked), torch.device("cuda:0"), size) == asked


def test_processes_share_the_hosts_room_and_not_the_gpus():
    free = cloq.streaming.memory.free_memory(torch.device("cpu"))
    size = int(free * 0.2)
    assert place_to_wait(run_spec(), torch.device("cpu"), size) == "device"
    assert place_to_wait(run_spec(), torch.device("cpu"), size, processes=4) == "disk"
    with pretended_gpu(1 << 30):
        assert place_to_wait(run_spec(), torch.device("cuda:0"), 1 << 28, processes=4) == "device"


def test_out_of_memory_on_a_cpu_sends_them_to_disk(tmp_path, monkeypatch, kept_on_disk):
    spec, solve = tiny_spec(tmp_path, rounds=1), pipeline.solve_layer
    run(spec, tmp_path / "whole")

    def short_of_it(*args, **kwargs):
        if not kept_on_disk:
            raise MemoryError
        return solve(*args, **kwargs)

    monkeypatch.setattr(pipeline, "solve_layer", short_of_it)
    run(spec, tmp_path / "short")
    assert kept_on_disk and digest(tmp_path / "short") == digest(tmp_path / "whole")


def test_what_blocks_were_given_waits_on_disk_where_memory_has_no_room_for_it(tmp_path, monkeypatch, kept_on_disk):
    spec = tiny_spec(tmp_path, fisher=0.9, rounds=1)
    monkeypatch.setattr(fisher, "place_aside", lambda *args: "disk")
    run(spec, tmp_path / "disk")
    assert kept_on_disk
    monkeypatch.undo()
    run(spec, tmp_path / "memory")
    assert digest(tmp_path / "disk") == digest(tmp_path / "memory")
