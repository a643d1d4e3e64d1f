"""The loops over columns: Triton's kernels, in its interpreter or on a GPU, against plain torch operations."""

import os
import subprocess
import sys

import pytest
import torch

from cloq.quantizers import Gptq, columns, descend
from tests.problems import output_error, problem

SETTINGS = [
    {"bits": 2, "group_size": 64, "search": True},
    {"bits": 3, "group_size": 32},
    {"bits": 4, "group_size": None},
    {"bits": 2, "group_size": 128, "symmetric": True},
    {"bits": 3, "group_size": 64, "symmetric": True, "search": True},
    {"bits": 2, "group_size": 32, "act_order": True, "static_groups": True},
]


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def kernels():
    """(kernels, device): on a GPU, or on CPU tensors as Triton's interpreter runs them."""
    if INTERPRETED:
        from cloq.kernels import columns as found

        return found, torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; see the test in the interpreter")
    found, why = columns._found(torch.device("cuda"))
    assert found is not None, why
    return found, torch.device("cuda")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    """This file once more, in a process of its own: Triton decides for its interpreter when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-3000:]
    assert f"{2 * len(SETTINGS) + 3} passed" in child.stdout


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
@pytest.mark.parametrize("search", (False, True))
@pytest.mark.parametrize("flag", (False, True))
@pytest.mark.parametrize("capability", (80, 90))
def test_they_compile_for_gpus_that_are_not_here(capability, flag, search):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cloq.kernels import columns as kernels

    for kernel in (kernels._round, kernels._descend, kernels._fit):
        fixed = {
            name: value
            for name, value in {"COLUMNS": 128, "ROWS": kernels.ROWS, "SYMMETRIC": flag, "SHARED": flag, "SEARCH": search}.items()
            if name in kernel.arg_names
        }
        sizes = dict.fromkeys(("columns", "rows", "tries"), "i32")
        others = {"groups": "*i64", "levels": "fp32"} | sizes | dict.fromkeys(fixed, "constexpr")
        types = {name: others.get(name, "*fp32") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=types, constexprs=fixed)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels.WARPS})
        assert "div.rn.f32" in made.asm["ptx"] and made.asm["cubin"]  # IEEE's division, as torch's


def test_they_do_what_the_plain_loops_do(kernels):
    assert columns.differences(*kernels) is None


def test_a_kernel_that_does_something_else_is_found_out(kernels, monkeypatch):
    module, device = kernels
    fit_grid, round_columns = module.fit_grid, module.round_columns
    monkeypatch.setattr(module, "fit_grid", lambda values, importance, *rest: fit_grid(values, 1 / importance, *rest))
    assert "search" in columns.differences(module, device)
    monkeypatch.setattr(module, "fit_grid", fit_grid)
    monkeypatch.setattr(module, "round_columns", lambda free, shares, *rest: round_columns(free, 2 * shares, *rest))
    assert "rounding" in columns.differences(module, device)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ("power law", "dead channels"))
def test_codes_are_those_of_the_plain_loops(settings, kind, kernels, monkeypatch):
    module, device = kernels
    p = problem(kind, (37, 200))
    weight, stats = p.weight.to(device), type(p.stats)(p.stats.gram.to(device), p.stats.n_tokens)

    def made(used):
        monkeypatch.setattr(columns, "_kernels", lambda device: used)
        quantized = Gptq(**settings).quantize(weight, type(stats)(stats.gram, stats.n_tokens))
        return quantized, descend(quantized, weight, stats.gram)

    for found, expected in zip(made(module), made(None), strict=True):
        assert float((found.codes != expected.codes).float().mean()) < 0.002  # a value at the edge between two codes, and what follows it
        assert torch.allclose(found.scale, expected.scale, rtol=0.1)
        errors = [output_error((weight - q.dequantize()).cpu(), p.gram) for q in (found, expected)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_without_kernels_the_reason_is_known(monkeypatch):
    assert columns.why_plainly(torch.device("cpu")) is None
    columns._found.cache_clear()
    monkeypatch.setitem(sys.modules, "cloq.kernels.columns", None)
    assert "Triton is not installed" in columns.why_plainly(torch.device("cuda"))
    broken = type(sys)("broken")
    broken.round_columns = broken.descend_columns = broken.fit_grid = lambda *args: 1 / 0
    monkeypatch.setitem(sys.modules, "cloq.kernels.columns", broken)
    columns._found.cache_clear()
    monkeypatch.setattr(columns, "differences", lambda kernels, device: kernels.round_columns())
    assert "do not run on cuda (ZeroDivisionError" in columns.why_plainly(torch.device("cuda"))
    columns._found.cache_clear()
