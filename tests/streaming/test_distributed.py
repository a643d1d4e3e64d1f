"""Several processes: what is shared out, that the result is one process's, and that they end together whatever happens to one of them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cloq.api import run
from cloq.cli import main
from cloq.errors import CloqError, RunError, SpecError
from cloq.models import Decoder
from cloq.quantizers import Nf4, Rtn
from cloq.specs import RunSpec, run_spec
from cloq.streaming import pipeline
from cloq.streaming.distributed import Processes, shared_out, solve_cost
from cloq.streaming.store import Store
from cloq.types import LayerMetrics, LayerResult, LoraFactors
from tests.several import several
from tests.test_api import digest
from tests.tiny import save_tiny

SETTINGS = {"bits": 2, "group_size": 32, "rank": 4, "calib_samples": 6, "seq_len": 32, "heldout": 0.5, "device": "cpu", "rounds": 0}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A dense model, a mixture of experts, and a text."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "text.txt").write_text("\n\n".join(str(o.__doc__) for o in (str, list, dict, int, float, bytes) if o.__doc__) * 2)
    save_tiny("llama", folder / "llama")
    save_tiny("olmoe", folder / "olmoe", num_experts=8, num_hidden_layers=1)
    return folder


def spec_of(work: Path, model: str = "llama", **settings: Any) -> RunSpec:
    return run_spec(model=str(work / model), calib=str(work / "text.txt"), **SETTINGS | settings)


def raised(action: Callable[[], Any]) -> tuple[str, str] | None:
    """Type and message of the error that the action ends with."""
    try:
        action()
    except (CloqError, MemoryError, ValueError) as error:
        return type(error).__name__, str(error)
    return None


def results(out: Path) -> dict[str, LayerResult]:
    store = Store(out)
    return {name: result for index in range(store.finished()) for name, result in store.read(index).items()}


# -- shares ------------------------------------------------------------------------------------------------------------


def test_on_one_process_everything_is_the_identity():
    alone, tensor, own = Processes.start(), torch.ones(3), {"a": object()}
    assert (alone.rank, alone.size, alone.first) == (0, 1, True)
    with alone.together():
        assert alone.on_first(lambda: 5) == alone.after_first(lambda: 5) == 5 and alone.gather(7) == [7]
        alone.add([tensor])
        assert alone.total({"n": 3}) == {"n": 3} and torch.equal(tensor, torch.ones(3))
        assert alone.exchange(own, torch.device("cpu")) is own and alone.share(tensor) is not None
    assert alone.device("cuda:1") == "cuda:1"
    with pytest.raises(KeyError), alone.together():
        raise KeyError


def test_rows_are_shared_in_runs_as_even_as_they_go():
    rows = torch.arange(7)
    shares = [Processes(rank, 3).share(rows).tolist() for rank in range(3)]
    assert shares == [[0, 1, 2], [3, 4], [5, 6]]
    assert [len(Processes(rank, 3).share(rows, last_first=True)) for rank in range(3)] == [2, 2, 3]
    assert [len(Processes(rank, 4).share(rows[:2])) for rank in range(4)] == [1, 1, 0, 0]


SHAPES = {"q": (64, 64), "k": (16, 64), "v": (16, 64), "gate": (96, 64), "up": (96, 64), "down": (64, 96)}


def test_the_longest_layer_goes_first_to_whoever_is_free_the_soonest():
    assert shared_out([["q", "k", "v"]], SHAPES, 2) == {"q": 0, "k": 1, "v": 1}
    assert shared_out([["gate", "up"]], SHAPES, 2) == {"gate": 0, "up": 1}
    assert set(shared_out([["q", "k", "v"]], SHAPES, 1).values()) == {0}
    assert shared_out([["down"]], SHAPES, 8) == {"down": 0}


def test_among_equals_layers_stay_with_those_that_share_their_input():
    groups = [[f"{expert}.{name}" for name in ("gate", "up")] for expert in range(6)]
    owner = shared_out(groups, {name: (32, 64) for group in groups for name in group}, 3)
    assert all(owner[gate] == owner[up] for gate, up in groups)
    assert sorted(owner.values()) == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_no_process_has_much_more_to_do_than_another(processes):
    """The bound of longest-first: 4/3 of the best, which is at least the mean and the longest."""
    generator = torch.Generator().manual_seed(processes)
    shapes = {str(i): tuple(torch.randint(8, 200, (2,), generator=generator).tolist()) for i in range(23)}
    owner = shared_out([[name] for name in shapes], shapes, processes)
    loads = [sum(solve_cost(*shapes[n]) for n in shapes if owner[n] == rank) for rank in range(processes)]
    assert set(owner) == set(shapes)
    assert max(loads) <= 4 / 3 * max(sum(loads) / processes, max(solve_cost(*s) for s in shapes.values()))


# -- verbs -------------------------------------------------------------------------------------------------------------


def result_of(rank: int, quantizer) -> LayerResult:
    generator = torch.Generator().manual_seed(rank)
    weight = torch.randn(24, 64, generator=generator)
    factors = LoraFactors(torch.randn(3, 64, generator=generator), torch.randn(24, 3, generator=generator))
    metrics = LayerMetrics(0.5, 0.1, None, None, 9, 0.0, 1.0, 3, 2.5, (0.5,), ("noted",))
    return LayerResult(quantizer.quantize(weight, None), factors, metrics)


def same(one: LayerResult, other: LayerResult) -> bool:
    tensors = [
        (getattr(a, f.name), getattr(b, f.name))
        for a, b in ((one.weight, other.weight), (one.factors, other.factors))
        for f in dataclasses.fields(a)
    ]
    return one.metrics == other.metrics and all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in tensors)


def all_verbs() -> dict[str, Any]:
    processes = Processes.start()
    rank, found = processes.rank, {}
    matrix = torch.full((3, 2), 10.0**rank)
    with processes.together():
        found["first"] = processes.on_first(lambda: f"from {rank}")
        found["after"] = processes.after_first(lambda: f"from {rank}")
        found["gathered"] = processes.gather(rank)
        found["total"] = processes.total({"a": rank, "b": 1})
        processes.add([matrix])
        found["sum"] = matrix.tolist()
        own = {0: {"a": result_of(0, Rtn(3, 32)), "b": result_of(5, Rtn(2, 32))}, 3: {"c": result_of(3, Nf4())}}.get(rank, {})
        made = processes.exchange(own, torch.device("cpu"))
        found["exchanged"] = list(made), [same(made["b"], result_of(5, Rtn(2, 32))), same(made["c"], result_of(3, Nf4()))]
    return found


def test_every_verb_on_four_processes():
    outcomes = several(4, all_verbs)
    assert [o.error for o in outcomes] == [None] * 4
    for rank, outcome in enumerate(outcomes):
        assert outcome.value == {
            "first": "from 0",
            "after": f"from {rank}",
            "gathered": [0, 1, 2, 3],
            "total": {"a": 6, "b": 4},
            "sum": [[1111.0, 1111.0]] * 3,
            "exchanged": (["a", "b", "c"], [True, True]),
        }


# -- ending together ---------------------------------------------------------------------------------------------------


def failures() -> list[tuple[str, str] | None]:
    """One failure after the other, of one process or of several, in the middle of this and that: each ends on all."""
    rank = Processes.start().rank

    def attempt(failing: dict[int, Exception], again: bool = False) -> tuple[str, str] | None:
        def action() -> None:
            processes = Processes.start()
            with contextlib.nullcontext() if again else processes.together(), processes.together(again=lambda error: again):
                processes.total({"n": 1})
                if rank in failing:
                    raise failing[rank]
                processes.add([torch.ones(2)])

        return raised(action)

    return [
        attempt({2: SpecError("two")}),
        attempt({0: RunError("none")}),
        attempt({1: MemoryError("full")}, again=True),
        attempt({1: MemoryError("full"), 2: RunError("two")}, again=True),
        attempt({1: ValueError("a bug")}),
        attempt({0: SpecError("same"), 1: SpecError("same"), 2: SpecError("same")}),
        raised(lambda: Processes.start().device("mps")),
        raised(lambda: Processes.start().device("cuda:1")),
    ]


def test_a_failure_ends_on_all_processes_with_one_message():
    first, second, third = (outcome.value for outcome in several(3, failures))
    assert first[0] == second[0] == ("ProcessError", "two (process 2 of 3)") and third[0] == ("ProcessError", "two")
    assert first[1] == ("RunError", "none") and second[1] == third[1] == ("ProcessError", "none")
    assert second[2] == ("MemoryError", "full") and first[2] == third[2] == ("_OutOfMemoryElsewhere", "full (process 1 of 3)")
    assert {o[3][1].partition(" (")[0] for o in (first, second, third)} == {"two"}  # what ends the run comes before what does not
    assert second[4] == ("ValueError", "a bug") and first[4][1] == "a process failed with ValueError: a bug (process 1 of 3)"
    assert first[5] == ("SpecError", "same") and second[5] == third[5] == ("ProcessError", "same")
    assert "device 'mps' is one for 3 processes; use --device cuda for a GPU each" in first[6][1] and "'cuda:1'" in third[7][1]


def vanishing(how: str) -> None:
    processes = Processes.start()
    with processes.together():
        processes.total({"n": 1})
        if processes.rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        processes.total({"n": 1})


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_process_that_is_gone_ends_the_others_at_once(how):
    started = time.monotonic()
    outcomes = several(3, vanishing, how)
    assert time.monotonic() - started < 20
    assert outcomes[1].error == (None if how == "killed" else ("KeyboardInterrupt", ""))
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.error[0] == "ProcessError" and "one of them has ended. Finished blocks are kept" in outcome.error[1]


def waiting() -> float:
    """Seconds of processor time while the first process is busy for one."""
    processes = Processes.start()
    with processes.together():
        processes.total({"n": 1})
        before = time.process_time()
        processes.on_first(lambda: time.sleep(1))
        return time.process_time() - before


def test_waiting_for_the_first_process_takes_no_core():
    assert max(outcome.value for outcome in several(2, waiting)) < 0.3


def too_large() -> tuple[str, str] | None:
    """Memory that runs out in the middle of an exchange is no reason to try again: the others are not where they could."""
    processes, elsewhere = Processes.start(), Processes.start().rank == 1

    def panels():
        yield torch.ones(3)
        if elsewhere:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        yield torch.ones(3)

    def action() -> None:
        with processes.together(again=lambda error: True):
            processes.add(panels())

    return raised(action)


def test_out_of_memory_while_data_move_ends_the_run():
    first, second = (outcome.value for outcome in several(2, too_large))
    assert second[0] == "RunError" and "out of memory in process 1 of 2 while data were exchanged (CUDA out of memory)" in second[1]
    assert first[0] == "ProcessError" and "Connection" in first[1] and "pair.cc" not in first[1]


# -- runs --------------------------------------------------------------------------------------------------------------


def a_run(spec: RunSpec, out: Path) -> dict[str, Any]:
    """A run, and what this process saw of it."""
    events, sizes = [], []
    enter = Decoder.enter
    Decoder.enter = lambda self, tokens, *further: sizes.append(len(tokens)) or enter(self, tokens, *further)
    try:
        result = run(spec, out, emit=lambda event, values: events.append(event))
    finally:
        Decoder.enter = enter
    return {"layers": len(result.layers), "notes": result.report.notes, "events": events, "sequences": sizes}


def finish(processes: int, spec: RunSpec, out: Path) -> list[dict[str, Any]]:
    """`a_run` on so many processes, which must end well."""
    outcomes = several(processes, a_run, spec, out)
    assert [outcome.error for outcome in outcomes] == [None] * processes
    return [outcome.value for outcome in outcomes]


def close_to(one: dict[str, LayerResult], other: dict[str, LayerResult], flips: float = 0.0) -> None:
    """The same tokens, errors and all codes but for a share that ties decided."""
    assert list(one) == list(other)
    for name, result in one.items():
        ours, theirs = result.metrics, other[name].metrics
        assert ours.n_tokens == theirs.n_tokens and ours.rank == theirs.rank, name
        assert (result.weight.codes != other[name].weight.codes).float().mean() <= flips, name
        tolerance = 1e-4 if not flips else 0.05
        assert ours.error_quantized == pytest.approx(theirs.error_quantized, rel=tolerance), name
        assert ours.error_corrected == pytest.approx(theirs.error_corrected, rel=tolerance), name
        assert ours.heldout_corrected == pytest.approx(theirs.heldout_corrected, rel=tolerance), name


@pytest.fixture(scope="module")
def alone(work) -> Path:
    """Calibrated on what the original model makes, so that no difference grows from block to block."""
    finish(1, spec_of(work, propagate="dense"), work / "alone")
    return work / "alone"


@pytest.fixture(scope="module")
def two(work) -> Path:
    """The default: calibrated on what quantized blocks make."""
    finish(2, spec_of(work), work / "two")
    return work / "two"


def test_four_processes_find_what_one_finds(alone, work):
    seen = finish(4, spec_of(work, propagate="dense"), work / "four")
    close_to(results(alone), results(work / "four"), flips=0.02)
    own = [one["sequences"] for one in seen]  # followed back, calibration and held-out
    assert own == [[2, 2], [2, 2, 1], [1, 1, 1], [1, 1, 1]]
    assert all(one["layers"] == 21 and "shared by 4 processes" in one["notes"][0] for one in seen)
    events = [one["events"] for one in seen]
    assert events[0].count("layer") == 21 and events[0].count("block") == 3 and not any(events[1:])


def test_the_same_bytes_on_every_run(two, work, tmp_path):
    finish(2, spec_of(work), tmp_path / "again")
    assert digest(tmp_path / "again") == digest(two)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_run_goes_on_with_another_number_of_processes(processes, two, work, tmp_path):
    """What was solved is kept as it is; with the same number the rest has the same bytes as well."""
    shutil.copytree(two / ".cloq", tmp_path / "out/.cloq")
    (tmp_path / "out/.cloq/blocks/00002.safetensors").unlink()
    events = finish(processes, spec_of(work), tmp_path / "out")[0]["events"]
    assert events.count("replay") == 2 and events.count("layer") == 7
    for index in (0, 1):
        name = f".cloq/blocks/{index:05d}.safetensors"
        assert (tmp_path / "out" / name).read_bytes() == (two / name).read_bytes()
    assert processes != 2 or digest(tmp_path / "out") == digest(two)


def test_processes_without_a_sequence_solve_all_the_same(work, tmp_path):
    spec = spec_of(work, propagate="dense", calib_samples=2, heldout=0.0, only="*.layers.0.*", sequential=False)
    assert [seen["sequences"] for seen in finish(4, spec, tmp_path / "four")] == [[1, 1], [1, 1], [], []]
    finish(1, spec, tmp_path / "one")
    assert list(results(tmp_path / "one")) == list(results(tmp_path / "four"))
    for name, result in results(tmp_path / "four").items():
        assert result.metrics.n_tokens == 64 and (result.metrics.heldout_corrected is None)
        assert result.metrics.error_corrected == pytest.approx(results(tmp_path / "one")[name].metrics.error_corrected, rel=0.05)


def test_experts_that_see_few_tokens_are_topped_up_with_those_of_all_processes(work, tmp_path):
    """The router's counts are the sums, and so is what a starved expert is shown: all tokens here."""
    spec = spec_of(work, "olmoe", propagate="dense")
    finish(2, spec, tmp_path / "two")
    finish(1, spec, tmp_path / "one")
    one, both = results(tmp_path / "one"), results(tmp_path / "two")
    close_to(one, both, flips=0.02)
    noted = [name for name, result in both.items() if any("topped up" in note for note in result.metrics.notes)]
    assert noted and all(one[name].metrics.notes == both[name].metrics.notes for name in both)


def test_factors_for_a_given_base_on_two_processes(two, work, tmp_path):
    spec = spec_of(work, quantized=str(two / "model"))
    finish(2, spec, tmp_path / "out")
    for name, result in results(tmp_path / "out").items():
        torch.testing.assert_close(result.factors.delta(), results(two)[name].factors.delta())
    assert not (tmp_path / "out/model").exists()


# -- runs that go wrong ------------------------------------------------------------------------------------------------


def test_two_processes_survey_what_one_does(work, tmp_path):
    spec = spec_of(work, propagate="dense", bits=2.5, adaptive_rank=True)
    surveys = []
    for size in (1, 2):
        finish(size, spec, tmp_path / str(size))
        surveys.append(Store(tmp_path / str(size)).kept_survey())
    (one, tied), (other, tied_too) = surveys
    assert tied == tied_too and list(one) == list(other)
    for name, losses in one.items():
        torch.testing.assert_close(losses, other[name], rtol=1e-2, atol=1e-9)
    chosen = [[(r.weight.bits, r.metrics.rank) for r in results(tmp_path / str(size)).values()] for size in (1, 2)]
    assert chosen[0] == chosen[1] and len(set(chosen[0])) > 3


def troubles(work: Path, folder: Path) -> list[Any]:
    """Runs on two processes, each with another trouble in one of them."""
    rank, spec, found = Processes.start().rank, spec_of(work), []
    forward, solve, write = Decoder.run_block, pipeline.solve_layer, Store.write

    def not_a_number(decoder, index, batch, gradients=False):
        return forward(decoder, index, batch, gradients) * (float("nan") if rank == 1 and index == 1 else 1)

    def too_large(decoder, index, batch, gradients=False):
        if rank == 1 and len(batch.hidden) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return forward(decoder, index, batch, gradients)

    def no_memory(*args):
        if rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return solve(*args)

    def full_disk(store, index, results):
        if index == 1:
            raise RunError("cannot write to out: No space left on device")
        write(store, index, results)

    for name, owner, attribute, broken in (
        ("nan", Decoder, "run_block", not_a_number),
        ("memory", Decoder, "run_block", too_large),
        ("solve", pipeline, "solve_layer", no_memory),
        ("disk", Store, "write", full_disk),
    ):
        whole = getattr(owner, attribute)
        setattr(owner, attribute, broken)
        found.append(raised(lambda name=name: run(spec, folder / name)))
        setattr(owner, attribute, whole)
    found.append(raised(lambda: run(spec.replace(batch_tokens=32), folder / "asked")))
    found.append(raised(lambda: run(run_spec(spec, bits=2 + rank), folder / "mixed")))
    found.append(raised(lambda: run(run_spec(spec, rank=8), folder / "asked")))
    found.append(raised(lambda: run(run_spec(spec, calib="self:0.5,demo:0.5", only="*.layers.0.*"), folder / "self")))
    found.append(raised(lambda: run(spec, folder / "nan")))  # goes on where it broke off
    return found


def test_trouble_in_one_process_ends_or_repeats_the_run_in_both(work, tmp_path):
    first, second = (o.value for o in several(2, troubles, work, tmp_path))
    assert first[0][0] == second[0][0] == "ProcessError" and "hold NaN, Inf" in second[0][1] and "(process 1 of 2)" in first[0][1]
    assert first[1] is second[1] is None and json.loads((tmp_path / "memory/.cloq/batch.json").read_text()) == {"sequences": 1}
    assert "out of memory where smaller batches do not help" in first[2][1] and second[2][0] == "ProcessError"
    assert first[3] == ("RunError", "cannot write to out: No space left on device") and second[3][0] == "ProcessError"
    assert first[4] is second[4] is None and digest(tmp_path / "memory") == digest(tmp_path / "asked")
    assert "process 1 of 2 would do another run than the first: settings.quant.bits was 2, is 3" in first[5][1]
    assert "settings.lora.rank was 4, is 8" in first[6][1] and second[6][0] == "ProcessError"
    assert first[7] is second[7] is None and first[8] is second[8] is None
    assert Store(tmp_path / "nan").finished() == 3


def commands(argv: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code of each command and what it printed to standard error."""
    said = []
    for arguments in argv:
        with contextlib.redirect_stderr(io.StringIO()) as text:
            said.append((main(arguments), text.getvalue()))
    return said


def test_one_process_tells_what_is_wrong_and_all_end_with_code_2(two, work, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    model = ["quantize", str(work / "llama"), "--calib", str(work / "text.txt"), "--device", "cpu", "--quiet"]
    argv = [["quantize", "--bits", "5"], ["quantize", "--no-such-flag"], ["quantize", "./nowhere"], [*model, "--out", str(tmp_path)]]
    first, second = (o.value for o in several(2, commands, argv))
    assert [code for code, _ in (*first, *second)] == [2] * 8
    for (_, said), expected in zip(first, ("bits is 5", "no-such-flag", "is not a folder", "holds something else (mine.txt)"), strict=True):
        assert expected in said and "Traceback" not in said
    assert [said for _, said in second] == [""] * 4


@pytest.mark.slow
def test_a_killed_process_ends_the_run_under_torchrun_and_the_same_run_goes_on(two, work, tmp_path):
    spec = spec_of(work)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cloq", "quantize", spec.model]
    command = [*launch, "--calib", spec.calib.source, *flags, "--quiet", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "out/.cloq/blocks/00000.safetensors").exists():
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(30) == 1
    assert 1 <= Store(tmp_path / "out").finished() < 3
    finish(2, spec, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(two)
