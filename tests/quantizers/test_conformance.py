"""What every quantizer owes its callers, over the whole table and every setting of its grid."""

import dataclasses
import inspect
import itertools

import pytest
import torch

from cloq.algebra import linalg
from cloq.errors import ModelError
from cloq.quantizers import QUANTIZERS, Gptq, Magr, Nf4, Rtn, from_spec
from cloq.specs import BITS, GROUP_SIZES, QUANTIZER_NAMES, QuantSpec
from cloq.types import CodebookWeight, LayerStats, layout
from tests.problems import KINDS, LARGE_SHAPES, SHAPES, problem


def specs():
    """Every setting that a run can ask for and that means something."""
    for bits, group_size, symmetric in itertools.product(BITS, GROUP_SIZES, (False, True)):
        yield QuantSpec(bits, group_size, "rtn", symmetric)
        for act_order, static_groups in itertools.product((False, True), repeat=2):
            yield QuantSpec(bits, group_size, "gptq", symmetric, act_order=act_order, static_groups=static_groups)
    for quantizer, group_size in itertools.product(("rtn", "gptq"), GROUP_SIZES):
        yield QuantSpec(2, group_size, quantizer, magr=True)
    yield QuantSpec(4, 64, "nf4")
    yield QuantSpec(4, 64, "nf4", magr=True)


def name_of(spec: QuantSpec) -> str:
    flags = [flag for flag in ("symmetric", "magr", "act_order", "static_groups") if getattr(spec, flag)]
    return "-".join([spec.quantizer, str(spec.bits), str(spec.group_size or "channel"), *flags])


def check(quantized, weight, spec: QuantSpec) -> None:
    """The invariants of a quantized weight."""
    out, columns = weight.shape
    dense = quantized.dequantize()
    assert dense.shape == quantized.shape == (out, columns) and dense.dtype == torch.float32 and bool(dense.isfinite().all())
    assert quantized.codes.dtype == torch.uint8 and int(quantized.codes.max()) < 2**quantized.bits
    assert quantized.bits == spec.bits
    if isinstance(quantized, CodebookWeight):
        assert quantized.scale.shape == (-(-out * columns // quantized.block_size),)
        assert quantized.storage_bits() == out * columns * 4 + 32 * quantized.scale.numel()
        return
    groups = 1 if spec.group_size is None else -(-columns // spec.group_size)
    assert quantized.scale.shape == quantized.zero.shape == (out, groups)
    assert quantized.scale.dtype == torch.float32 and torch.equal(quantized.scale, quantized.scale.half().float())
    assert bool(quantized.scale.isfinite().all()) and bool((quantized.scale != 0).all())
    assert quantized.zero.dtype == torch.uint8 and int(quantized.zero.max()) < 2**spec.bits
    if spec.symmetric:
        assert bool((quantized.zero == 2 ** (spec.bits - 1)).all())
    sizes = torch.bincount(quantized.group_index, minlength=groups)
    assert bool((sizes[:-1] == (spec.group_size or columns)).all()) and int(sizes.sum()) == columns
    permuted = spec.act_order and not spec.static_groups and groups > 1
    assert permuted or torch.equal(quantized.group_index, quantized.group_index.sort().values)
    assert layout(quantized).group_size == spec.group_size and quantized.symmetric == spec.symmetric
    codes, at = quantized.codes.double(), quantized.group_index
    exact = (codes - quantized.zero.double()[:, at]) * quantized.scale.double()[:, at]
    assert torch.equal(dense.double(), exact), "dequantize() must be exact in float32"


@pytest.mark.parametrize("spec", specs(), ids=name_of)
def test_the_contract(spec):
    """On a layer whose inputs no group size divides."""
    p = problem("dead channels", (12, 100))
    stats = p.stats
    kept = p.weight.clone(), stats.gram.clone()
    quantizer = from_spec(spec)
    quantized = quantizer.quantize(p.weight, stats)
    check(quantized, p.weight, spec)
    assert torch.equal(p.weight, kept[0]) and torch.equal(stats.gram, kept[1])
    torch.manual_seed(3)
    again = quantizer.quantize(p.weight, stats)
    assert torch.equal(again.codes, quantized.codes) and torch.equal(again.dequantize(), quantized.dequantize())


SPECS = {"rtn": QuantSpec(2, 32, "rtn"), "gptq": QuantSpec(2, 32), "by activation": QuantSpec(3, None, act_order=True)}
SPECS |= {"magr": QuantSpec(2, 32, "rtn", magr=True), "nf4": QuantSpec(4, 64, "nf4")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_kind_of_input(kind, spec):
    p = problem(kind, SHAPES["tall"])
    check(from_spec(spec).quantize(p.weight, p.stats), p.weight, spec)


WEIGHTS = {
    "zeros": torch.zeros(6, 70),
    "one constant": torch.full((6, 70), 0.37),
    "negative constant": torch.full((6, 70), -0.37),
    "a zero group": torch.cat([torch.zeros(6, 32), torch.linspace(-1, 1, 38).repeat(6, 1)], dim=1),
    "float32 denormals": torch.linspace(-1e-40, 1e-40, 70).repeat(6, 1),
    "below float16": torch.linspace(-1e-8, 1e-8, 70).repeat(6, 1),
    "float16 denormals": torch.linspace(-3e-6, 3e-6, 70).repeat(6, 1),
    "the largest": torch.linspace(-65504, 65504, 70).repeat(6, 1),
    "one giant": torch.cat([torch.full((6, 1), 6e4), torch.full((6, 69), 1e-4)], dim=1),
    "all positive": torch.linspace(0.1, 1, 70).repeat(6, 1),
    "one value": torch.tensor([[0.5]] * 6),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("spec", [*SPECS.values(), QuantSpec(2, 32, symmetric=True), QuantSpec(8, None)], ids=name_of)
def test_awkward_weights_stay_finite(name, spec):
    weight = WEIGHTS[name]
    x = torch.randn(200, weight.shape[1], generator=torch.Generator().manual_seed(0))
    quantized = from_spec(spec).quantize(weight, LayerStats(x.T @ x, 200))
    check(quantized, weight, spec)
    if name == "zeros":
        assert not quantized.dequantize().any()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf, 1e5))
def test_weights_that_no_grid_holds_are_refused(spec, bad):
    p = problem("power law", SHAPES["wide"])
    weight = p.weight.clone()
    weight[3, 4] = bad
    if spec.quantizer == "nf4" and bad == 1e5:
        assert bool(from_spec(spec).quantize(weight, p.stats).dequantize().isfinite().all())  # float32 scales have room
        return
    with pytest.raises(ModelError, match=r"weight \(40, 72\) holds (nan|inf|100000); only .* can be quantized"):
        from_spec(spec).quantize(weight, p.stats)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_weights_of_any_dtype(spec, dtype):
    p = problem("power law", SHAPES["wide"])
    weight = torch.nn.Parameter(p.weight.to(dtype))
    quantizer = from_spec(spec)
    quantized, expected = quantizer.quantize(weight, p.stats), quantizer.quantize(weight.detach().float(), p.stats)
    assert torch.equal(quantized.dequantize(), expected.dequantize()) and not quantized.dequantize().requires_grad


@pytest.mark.parametrize("quantizer", ("rtn", "gptq"))
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("search", (False, True))
def test_more_bits_and_smaller_groups_leave_less_error(quantizer, symmetric, search):
    p = problem("well conditioned", LARGE_SHAPES["wide"])

    def error(bits, group_size):
        quantized = from_spec(QuantSpec(bits, group_size, quantizer, symmetric, search)).quantize(p.weight, p.stats)
        return linalg.relative_error(p.weight - quantized.dequantize(), p.weight, p.gram)

    by_bits = [error(bits, 64) for bits in BITS]
    assert all(more < 0.5 * less for less, more in itertools.pairwise(by_bits)), by_bits
    by_group = [error(3, size) for size in (None, 128, 64, 32)]
    assert all(smaller < larger for larger, smaller in itertools.pairwise(by_group)), by_group


def test_the_table_and_the_specs_name_the_same_quantizers():
    assert set(QUANTIZERS) == set(QUANTIZER_NAMES)


@pytest.mark.parametrize("kind", [*QUANTIZERS.values(), Magr])
def test_a_quantizer_is_a_frozen_dataclass(kind):
    verbs = [n for n, member in inspect.getmembers(kind, inspect.isfunction) if not n.startswith("_")]
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen and "quantize" in verbs
    assert set(verbs) <= {"quantize", "reduce"}


def test_a_spec_becomes_its_quantizer():
    settings = {"bits": 3, "group_size": 128, "symmetric": True, "search": False}
    extra = {"damping": 0.05, "act_order": True, "static_groups": True}
    assert from_spec(QuantSpec(quantizer="rtn", **settings)) == Rtn(**settings)
    assert from_spec(QuantSpec(quantizer="gptq", **settings, **extra)) == Gptq(**settings, **extra)
    assert from_spec(QuantSpec(4, 64, "nf4")) == Nf4()
    assert from_spec(QuantSpec(4, 64, "nf4", magr=True)) == Magr(Nf4(), 64, 1e-4)
    assert from_spec(QuantSpec(2, 64, "rtn", magr=True)) == Magr(Rtn(2, 64, search=True), 64, 1e-4)
    assert from_spec(QuantSpec(2, None, "rtn", magr=True)).alpha == 1e-3
    assert from_spec(QuantSpec(2, 64, "rtn", magr=True, magr_alpha=0.5)).alpha == 0.5
