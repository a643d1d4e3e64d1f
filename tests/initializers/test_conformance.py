"""What every initializer owes its callers, over the whole table: a new one is tested here by its line in the table."""

import dataclasses
import inspect
import itertools

import pytest
import torch

from cloq.algebra import linalg
from cloq.initializers import INITIALIZERS, from_spec
from cloq.quantizers import Gptq, Magr, Nf4, Rtn
from cloq.specs import INITIALIZER_NAMES, LoraSpec
from cloq.types import QuantizedWeight
from tests.problems import KINDS, LARGE_SHAPES, SHAPES, output_error, problem

QUANTIZERS = {
    "rtn 2 bits": Rtn(2, 32),
    "gptq 3 bits": Gptq(3, 32, search=True),
    "gptq by activation, symmetric": Gptq(4, None, symmetric=True, act_order=True),
    "magr": Magr(Rtn(2, 32), 32, iterations=4),
    "nf4": Nf4(),
}


def run(name, p, quantizer, rank):
    return INITIALIZERS[name]().initialize(p.weight, p.stats, quantizer.quantize, rank)


def same_base(a, b) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize("name", INITIALIZERS)
@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("kind, shape", zip(KINDS, itertools.cycle(SHAPES.values()), strict=False))
def test_the_contract(name, quantizer, kind, shape):
    p = problem(kind, shape)
    kept = p.weight.clone(), p.gram.clone()
    stats = p.stats
    quantized, factors = INITIALIZERS[name]().initialize(p.weight, stats, quantizer.quantize, 8)

    assert quantized.shape == shape
    assert factors.A.shape == (8, shape[1]) and factors.B.shape == (shape[0], 8) and factors.rank == 8
    assert factors.A.dtype == factors.B.dtype == quantized.dequantize().dtype == torch.float32
    assert all(bool(t.isfinite().all()) for t in (factors.A, factors.B, factors.delta(), quantized.dequantize()))
    assert int(quantized.codes.max()) < 2**quantized.bits
    if isinstance(quantized, QuantizedWeight):
        assert torch.equal(quantized.scale, quantized.scale.half().float()) and bool((quantized.scale != 0).all())
        assert int(quantized.zero.max()) < 2**quantized.bits
    assert torch.equal(p.weight, kept[0]) and torch.equal(stats.gram, kept[1])

    torch.manual_seed(7)
    again, same = run(name, p, quantizer, 8)
    assert same_base(again, quantized) and torch.equal(same.A, factors.A) and torch.equal(same.B, factors.B)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantizer", [QUANTIZERS["rtn 2 bits"], QUANTIZERS["nf4"]], ids=str)
@pytest.mark.parametrize("shape, rank", [(SHAPES["tall"], 12), (LARGE_SHAPES["wide"], 9)], ids=str)
def test_no_initializer_beats_cloq_on_its_base(kind, quantizer, shape, rank):
    p = problem(kind, shape)
    base, ours = run("cloq", p, quantizer, rank)
    left = p.weight - base.dequantize()
    total = output_error(left, p.gram)
    best = output_error(left.double() - ours.delta().double(), p.gram)
    shared = []
    for name in set(INITIALIZERS) - {"cloq"}:
        quantized, factors = run(name, p, quantizer, rank)
        if same_base(quantized, base):
            shared.append(name)
            theirs = output_error(left.double() - factors.delta().double(), p.gram)
            assert best <= 1.001 * theirs + 1e-6 * total, name
    assert {"zero", "svd", "qera", "eora"} <= set(shared)


@pytest.mark.parametrize("name", INITIALIZERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_full_rank_undoes_everything(name, shape):
    p = problem("power law", shape)
    quantized, factors = run(name, p, Rtn(2, 32), min(shape))
    left = (p.weight - quantized.dequantize() - factors.delta()).norm() / p.weight.norm()
    if name == "zero":
        assert not factors.delta().any() and left > 0.1
    else:
        assert left < 1e-5


@pytest.mark.parametrize("name", INITIALIZERS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_weights_of_any_dtype(name, dtype):
    p = problem("power law", SHAPES["tall"])
    p = p._replace(weight=p.weight.to(dtype))
    quantized, factors = run(name, p, Rtn(4, 32), 8)
    wide, expected = run(name, p._replace(weight=p.weight.float()), Rtn(4, 32), 8)
    assert same_base(quantized, wide) and torch.equal(factors.delta(), expected.delta()) and factors.A.dtype == torch.float32


@pytest.mark.parametrize("name", INITIALIZERS)
def test_parameters_that_want_a_gradient_give_plain_tensors(name):
    p = problem("power law", SHAPES["wide"])
    p = p._replace(weight=torch.nn.Parameter(p.weight))
    quantized, factors = run(name, p, Gptq(2, 32), 4)
    assert not (factors.A.requires_grad or factors.B.requires_grad or quantized.dequantize().requires_grad)


@pytest.mark.parametrize("name", INITIALIZERS)
@pytest.mark.parametrize("rank", (0, 41))
def test_a_rank_that_the_layer_does_not_allow_is_refused(name, rank):
    with pytest.raises(ValueError, match=rf"rank must be 1 to 40 for a layer of shape \(40, 72\), got {rank}"):
        run(name, problem("power law", SHAPES["wide"]), Rtn(4, 32), rank)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_a_layer_that_saw_nothing_but_zeros(name):
    p = problem("power law", SHAPES["wide"])
    p = p._replace(inputs=torch.zeros_like(p.inputs))
    quantized, factors = run(name, p, Gptq(2, 32), 4)
    assert bool((quantized.dequantize() + factors.delta()).isfinite().all())


def test_the_table_and_the_specs_name_the_same_initializers():
    assert set(INITIALIZERS) == set(INITIALIZER_NAMES)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_an_initializer_is_a_frozen_dataclass_with_one_verb(name):
    kind = INITIALIZERS[name]
    verbs = [n for n, member in inspect.getmembers(kind, inspect.isfunction) if not n.startswith("_")]
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen and verbs == ["initialize"]


def test_a_spec_becomes_its_initializer():
    for name, kind in INITIALIZERS.items():
        assert from_spec(LoraSpec(init=name)) == (kind(LoraSpec().split, LoraSpec().rounds) if name == "cloq" else kind())
    assert from_spec(LoraSpec(init="cloq", split="paper")) == INITIALIZERS["cloq"]("paper", LoraSpec().rounds)
    assert from_spec(LoraSpec(init="loftq", iterations=3)) == INITIALIZERS["loftq"](3)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_a_width_is_for_those_that_ask(name):
    spec = LoraSpec(init=name)
    assert from_spec(spec, 2) == (dataclasses.replace(from_spec(spec), bits=2) if name == "cloq" else from_spec(spec))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_errors_are_those_of_the_cpu():
    p = problem("power law", LARGE_SHAPES["tall"])
    for name, quantizer in itertools.product(INITIALIZERS, QUANTIZERS.values()):
        errors = []
        for device in ("cpu", "cuda"):
            moved = p._replace(weight=p.weight.to(device), inputs=p.inputs.to(device))
            quantized, factors = run(name, moved, quantizer, 9)
            assert factors.A.device.type == factors.B.device.type == quantized.dequantize().device.type == device
            left = (moved.weight - quantized.dequantize() - factors.delta()).cpu()
            errors.append(linalg.relative_error(left, p.weight, p.gram))
        assert errors[1] == pytest.approx(errors[0], rel=0.05), (name, quantizer)
