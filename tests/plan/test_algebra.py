"""Formulas against torch's own count of the matrix products that the routines really run, and against their limits."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cloq.algebra import lowrank
from cloq.plan import algebra
from cloq.plan.work import Machine, Work, measure
from cloq.specs import LayerSpec, LoraSpec, QuantSpec
from cloq.streaming.solve import solve_layer
from cloq.types import LayerStats

SHAPES = [(96, 160), (160, 96), (224, 96)]


def _problem(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator)
    x = torch.randn(4 * shape[1], shape[1], generator=generator)
    return weight, LayerStats(x.T @ x, len(x))


def _counted(run) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heldout", [True, False])
def test_measuring_a_layer(shape, heldout):
    """Without factors to find and with a quantizer that multiplies nothing, what is left are the errors."""
    weight, stats = _problem(shape)
    layer, lora = LayerSpec(QuantSpec(quantizer="rtn"), 8), LoraSpec(init="zero", rank=8)
    counted = _counted(lambda: solve_layer(weight, stats, stats if heldout else None, layer, lora))
    assert algebra.errors(shape, 8, heldout).products == pytest.approx(counted, rel=0.5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("whole_gram", [True, False])
def test_the_exact_solve(shape, whole_gram):
    """Its products are counted exactly; what a decomposition costs is not a product and comes on top."""
    error, stats = _problem(shape)
    counted = _counted(lambda: lowrank.top_eigenvectors(error, stats.gram if whole_gram else None, 90))
    small, (out, columns) = min(shape), shape
    work = algebra.top_eigenvectors(shape, 90, whole_gram)
    decompositions = algebra._EIGEN * small**3 + (algebra._QR * out * columns**2 if out > columns else 0)
    last = 2 * 90 * out * columns  # the factor A, which the routine leaves to its callers
    assert work.wide - decompositions - last == pytest.approx(counted, rel=0.25)


def test_the_iteration_is_chosen_where_the_solver_chooses_it():
    shape = (1024, 2048)
    rank = int(lowrank.EXACT_SHARE * 1024)
    few, many = (algebra.top_eigenvectors(shape, r, True).products for r in (rank // 4, rank + 1))
    assert few < 0.6 * many


@given(st.integers(32, 4096), st.integers(32, 4096), st.integers(1, 128))
def test_every_method_costs_something_and_zero_costs_nothing(out, columns, rank):
    shape, rank = (out, columns), min(rank, out, columns)
    assert algebra.fit(shape, "zero", rank) == Work()

    def operations(init: str) -> float:
        work = algebra.fit(shape, init, rank)
        return work.products + work.wide

    assert all(operations(init) > 0 for init in ("cloq", "svd", "loftq", "qera", "eora", "pissa"))
    assert operations("eora") > operations("cloq") > operations("qera")


def test_settings_change_the_work_as_they_should():
    shape = (320, 192)

    def solve(quant=QuantSpec(), lora=LoraSpec(rounds=0), **kwargs):  # noqa: B008 - frozen values
        return algebra.solve(shape, quant, lora, 16, True, **kwargs)

    machine = Machine(1e9, 1e9, 1e9, 1e9, 1e6, 1e5)
    plain = solve().seconds(machine)
    assert solve(QuantSpec(magr=True)).seconds(machine) > plain > solve(QuantSpec(quantizer="rtn")).seconds(machine)
    assert solve(QuantSpec(search=False)).seconds(machine) < plain
    assert solve(given=True).products < solve().products
    rounds = [solve(lora=LoraSpec(init="loftq", iterations=n)).seconds(machine) for n in (1, 2, 3)]
    assert rounds[2] - rounds[1] == pytest.approx(rounds[1] - rounds[0])
    chosen = [solve(lora=LoraSpec(rounds=n)).seconds(machine) for n in range(1, 6)]
    added = [after - before for before, after in itertools.pairwise(chosen)]
    assert chosen[0] > plain and added[0] == pytest.approx(added[1]) == pytest.approx(added[2]), "rounded to the nearest"
    quantizing = algebra.quantize(shape, QuantSpec()) + algebra.deflation(192, 16) - algebra.to_the_nearest(shape, QuantSpec())
    assert added[3] - added[2] == pytest.approx(quantizing.seconds(machine)) and quantizing.seconds(machine) > 0 < added[0]
    assert solve(lora=LoraSpec(rounds=2), given=True) == solve(lora=LoraSpec(rounds=0), given=True)


@given(st.integers(1, 5), st.lists(st.floats(0, 1e12), min_size=7, max_size=7))
def test_work_is_linear(times, amounts):
    work, machine = Work(*amounts), Machine(1e9, 2e9, 3e9, 4e9, 5e6, 5e5, 6e8)
    total = sum([work] * times, Work())
    assert total.seconds(machine) == pytest.approx(times * work.seconds(machine))
    assert (times * work).seconds(machine) == pytest.approx(total.seconds(machine))


def test_a_measured_machine_reads_its_own_clock():
    """With a clock that ticks once a look, every round takes one second: rates are amounts."""
    ticks = iter(range(10_000))
    machine = measure("cpu", lambda: float(next(ticks)))
    assert machine.products == pytest.approx(0.85 * 4 * 2 * 768**3) and machine.wide == pytest.approx(machine.products / 2)
    assert machine.calls == 500 and machine.searched == 4 * 64 * 1024
