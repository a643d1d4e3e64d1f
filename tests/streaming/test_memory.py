"""Out of memory in a forward: smaller batches, told, kept, and with one result however often the run is interrupted."""

import shutil
import subprocess
import sys

import pytest
import torch

from cloq.api import run
from cloq.errors import RunError
from cloq.models import Decoder
from cloq.streaming import pipeline
from cloq.streaming.memory import is_out_of_memory, peak_resident, spare_memory, with_less_memory
from cloq.streaming.store import Store
from tests.test_api import digest
from tests.tiny import tiny_spec

ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"),
    MemoryError(),
    RuntimeError("alloc_cpu.cpp:124 err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return tiny_spec(tmp_path_factory.mktemp("memory"))


@pytest.fixture
def short_of_memory(monkeypatch):
    """Forwards of blocks from `first` on fail with more than `most` sequences."""
    forward = Decoder.run_block

    def limit(most: int, first: int = 0, error: Exception = ERRORS[0]) -> None:
        def limited(decoder, index, batch, gradients=False):
            if index >= first and len(batch.hidden) > most:
                raise error
            return forward(decoder, index, batch, gradients)

        monkeypatch.setattr(Decoder, "run_block", limited)

    yield limit


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "python", "cpu"])
def test_the_result_is_that_of_the_batch_that_fits(error, spec, short_of_memory, monkeypatch, tmp_path):
    with monkeypatch.context() as free:
        run(spec.replace(batch_tokens=2 * 32), tmp_path / "asked")
        free.undo()
    short_of_memory(3, error=error)
    events = []
    run(spec, tmp_path / "found", emit=lambda event, values: events.append((event, values)))
    notes = [values["note"] for event, values in events if event == "memory"]
    assert len(notes) == 3 and "going on with nothing in it that can be computed again" in notes[0]
    assert "going on with 4 sequences" in notes[1] and "going on with 2 sequences" in notes[2]
    assert digest(tmp_path / "found") == digest(tmp_path / "asked")


def test_a_run_that_is_killed_afterwards_ends_as_if_it_were_not(spec, short_of_memory, monkeypatch, tmp_path):
    with monkeypatch.context():
        short_of_memory(3, first=1)
        run(spec, tmp_path / "whole")
    assert Store(tmp_path / "whole").kept_batch() == 2
    shutil.copytree(tmp_path / "whole/.cloq", tmp_path / "killed/.cloq")
    (tmp_path / "killed/.cloq/blocks/00002.safetensors").unlink()
    monkeypatch.undo()  # whoever held the memory has left
    sizes = []
    forward = Decoder.run_block
    monkeypatch.setattr(Decoder, "run_block", lambda d, i, batch, *more: sizes.append(len(batch.hidden)) or forward(d, i, batch, *more))
    run(spec, tmp_path / "killed")
    assert set(sizes) == {1, 2} and digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_one_sequence_that_does_not_fit_is_refused_and_finished_blocks_stay(spec, short_of_memory, tmp_path):
    short_of_memory(0, first=1)
    with pytest.raises(RunError, match=r"out of memory with one sequence at a time \(CUDA out of memory\); finished blocks are kept"):
        run(spec.replace(fisher=0.0), tmp_path / "out")  # whose first forward through block 1 comes behind block 0
    assert Store(tmp_path / "out").finished() == 1


def test_smaller_batches_are_not_tried_where_they_do_not_help(spec, monkeypatch, tmp_path):
    def no_memory(*args, **kwargs):
        raise ERRORS[0]

    monkeypatch.setattr(pipeline, "solve_layer", no_memory)
    with pytest.raises(RunError, match="out of memory where smaller batches do not help"):
        run(spec, tmp_path / "out")
    assert Store(tmp_path / "out").kept_batch() is None


def test_what_was_kept_is_given_up_where_a_layer_does_not_fit_beside_it(spec, monkeypatch, tmp_path):
    """In the solve too, where smaller batches do not help. The result is the same, and no batch is written down."""
    room, rooms, solve = pipeline.Room, [], pipeline.solve_layer
    monkeypatch.setattr(pipeline, "Room", lambda size: rooms.append(size) or room(size))

    def short_of_it(*args, **kwargs):
        if rooms[-1]:
            raise ERRORS[0]
        return solve(*args, **kwargs)

    run(spec, tmp_path / "whole")
    monkeypatch.setattr(pipeline, "solve_layer", short_of_it)
    events = []
    run(spec, tmp_path / "short", emit=lambda event, values: events.append((event, values)))
    assert [values["note"] for event, values in events if event == "memory"] == [
        "out of memory in the phase 'solve': going on with nothing in it that can be computed again or wait elsewhere"
    ]
    assert digest(tmp_path / "short") == digest(tmp_path / "whole") and Store(tmp_path / "short").kept_batch() is None


def test_other_errors_pass():
    assert not is_out_of_memory(RuntimeError("shapes do not match"))

    def attempt(sequences, keeping):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        with_less_memory(attempt, 8, lambda: True, lambda *_: pytest.fail("tried again"))


def test_what_an_attempt_held_is_free_before_the_next():
    import weakref

    held = []

    def attempt(sequences, keeping):
        tensor = torch.ones(10)
        held.append(weakref.ref(tensor))
        if sequences > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with_less_memory(attempt, 4, lambda: True, lambda *_: [pytest.fail("still held") for ref in held if ref() is not None])
    assert len(held) == 4  # with 4 sequences twice


@pytest.mark.parametrize("text", ["", "[]", '{"sequences": "x"}', "\0"])
def test_a_damaged_record_is_refused(text, tmp_path):
    store = Store(tmp_path)
    store.begin({})
    store.keep_batch(3)
    assert store.kept_batch() == 3
    (store.folder / "batch.json").write_text(text)
    with pytest.raises(RunError, match=r"batch\.json is damaged .*--restart"):
        store.kept_batch()


def test_a_child_does_not_inherit_its_parents_peak():
    """As it does in `ru_maxrss`: a program that starts cloq may be as large as it likes."""
    ballast = bytearray(300 << 20)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])
    code = "from cloq.streaming.memory import peak_resident; print(peak_resident())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 50 << 20 < child < peak_resident() - (100 << 20)


def test_processes_on_one_machine_share_its_spare_memory():
    alone, among_eight = (spare_memory(torch.device("cpu"), processes) for processes in (1, 8))
    assert among_eight == pytest.approx(alone / 8, rel=0.2) and 0 < alone < 1 << 50
