"""Coordinate descent over codes against trying every code."""

import dataclasses

import pytest
import torch

from cloq.algebra import linalg
from cloq.quantizers import Gptq, Rtn, descend
from tests.problems import KINDS, SHAPES, output_error, problem


def by_trial(quantized, target, gram):
    """One sweep in plain Python: for every row and column, in order, the code with the least error of the whole row."""
    codes = quantized.codes.clone()
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            if gram[column, column] <= 0:
                continue
            errors = []
            for code in range(2**quantized.bits):
                codes[row, column] = code
                left = target[row].double() - dataclasses.replace(quantized, codes=codes).dequantize()[row].double()
                errors.append(float(left @ gram.double() @ left))
            codes[row, column] = int(torch.tensor(errors).argmin())
    return dataclasses.replace(quantized, codes=codes)


@pytest.mark.parametrize("kind", ("power law", "dead channels", "rank deficient"))
@pytest.mark.parametrize("symmetric", (False, True))
def test_a_sweep_is_trying_every_code_in_turn(kind, symmetric):
    p = problem(kind, (6, 40))
    start = Rtn(2, 16, symmetric=symmetric).quantize(p.weight, p.stats)
    found, expected = descend(start, p.weight, p.gram), by_trial(start, p.weight, p.gram)
    assert float((found.codes == expected.codes).float().mean()) > 0.99  # ties and the last digits of float32
    assert output_error(p.weight - found.dequantize(), p.gram) == pytest.approx(
        output_error(p.weight - expected.dequantize(), p.gram), rel=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("quantizer", (Rtn(2, 32), Gptq(3, 32), Gptq(2, 32, act_order=True), Gptq(4, None)), ids=str)
def test_no_sweep_raises_the_error(kind, shape, quantizer):
    p = problem(kind, shape)
    start = quantizer.quantize(p.weight, p.stats)
    before = output_error(p.weight - start.dequantize(), p.gram)
    scale = output_error(p.weight, p.gram)
    for sweeps in (1, 3):
        found = descend(start, p.weight, p.gram, sweeps)
        after = output_error(p.weight - found.dequantize(), p.gram)
        assert after <= before * (1 + 1e-5) + 1e-7 * scale
        before = after
    assert all(torch.equal(getattr(found, name), getattr(start, name)) for name in ("scale", "zero", "group_index"))
    assert int(found.codes.max()) < 2**found.bits


def test_it_lowers_what_rounding_leaves():
    p = problem("power law", SHAPES["tall"])
    start = Rtn(2, 32).quantize(p.weight, p.stats)
    errors = [linalg.relative_error(p.weight - q.dequantize(), p.weight, p.gram) for q in (start, descend(start, p.weight, p.gram, 3))]
    assert errors[1] < 0.6 * errors[0]


def test_codes_of_inputs_that_nothing_depends_on_stay():
    p = problem("dead channels", SHAPES["wide"])
    dead = p.gram.diagonal() <= 0
    start = Rtn(2, 32).quantize(p.weight, p.stats)
    assert int(dead.sum()) > 5 and torch.equal(descend(start, p.weight, p.gram).codes[:, dead], start.codes[:, dead])


@pytest.mark.parametrize("shape", ((1, 40), (6, 1), (6, 40)))
def test_what_it_is_given_stays_as_it_is(shape):
    p = problem("power law", shape)
    start = Rtn(2, 16).quantize(p.weight, p.stats)
    target = p.weight.T.contiguous().T  # so that its transpose is contiguous
    given = [target, p.gram, start.codes, start.scale, start.zero]
    before = [tensor.clone() for tensor in given]
    descend(start, target, p.gram)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))
