"""One layer from its weight and statistics to what is stored, on everything that floats can do: finite, or refused."""

from __future__ import annotations

import math

import pytest
import torch

from cloq.errors import ModelError
from cloq.specs import INITIALIZER_NAMES, LayerSpec, LoraSpec, QuantSpec
from cloq.streaming.solve import solve_layer
from cloq.types import LayerStats
from tests.problems import KINDS, problem

SHAPE = (40, 72)
QUANTIZERS = {
    "gptq": QuantSpec(group_size=32),
    "gptq, no damping": QuantSpec(group_size=32, damping=0.0, act_order=True),
    "magr": QuantSpec(bits=3, group_size=None, magr=True),
    "rtn": QuantSpec(bits=4, group_size=32, quantizer="rtn", symmetric=True),
    "nf4": QuantSpec(bits=4, group_size=64, quantizer="nf4"),
}


def _given(kind: str):
    return problem(kind, SHAPE).weight, problem(kind, SHAPE).stats


def _indefinite():
    """A negative eigenvalue, as large as rounding makes them in a sum of a million tokens."""
    weight, stats = _given("rank deficient")
    values, vectors = torch.linalg.eigh(stats.gram.double())
    values[:5] = -1e-5 * values[-1]
    return weight, LayerStats((vectors * values @ vectors.T).float(), stats.n_tokens)


def _outliers():
    """Inputs and weights of ten thousand times the usual size, in different channels."""
    p = problem("well conditioned", SHAPE)
    weight, inputs = p.weight.clone(), p.inputs.clone()
    inputs[:, 3] *= 1e4
    weight[7, 11] = 1e4
    return weight, LayerStats(inputs.T @ inputs, len(inputs))


def _scaled(weight: float, inputs: float):
    p = problem("power law", SHAPE)
    x = p.inputs * inputs
    return p.weight * weight, LayerStats(x.T @ x, len(x))


def _constant():
    weight, stats = _given("mostly constant")
    return torch.full_like(weight, 0.37), stats


AWKWARD = {
    **{kind: lambda kind=kind: _given(kind) for kind in KINDS},
    "indefinite by rounding": _indefinite,
    "outliers of 1e4": _outliers,
    "constant weight": _constant,
    "zero weight": lambda: _scaled(0.0, 1.0),
    "denormal weight": lambda: _scaled(1e-40, 1.0),
    "inputs of zero": lambda: _scaled(1.0, 0.0),
    "denormal gram": lambda: _scaled(1.0, 1e-21),
    "huge gram": lambda: _scaled(1.0, 1e17),
    "huge weight and gram": lambda: _scaled(1e4, 1e6),
    "no token": lambda: (problem("power law", SHAPE).weight, LayerStats(torch.zeros(72, 72), 0)),
}


@pytest.mark.parametrize("quant", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("kind", AWKWARD)
def test_what_is_stored_is_finite(kind, quant):
    weight, stats = AWKWARD[kind]()
    for init in INITIALIZER_NAMES:
        result = solve_layer(weight, stats, stats, LayerSpec(quant, 8), LoraSpec(init, 8))
        values = [result.weight.dequantize(), result.factors.A, result.factors.B, result.factors.delta(), result.effective_weight()]
        assert all(bool(torch.isfinite(value).all()) for value in values), init
        m = result.metrics
        numbers = [m.error_quantized, m.error_corrected, *m.spectrum]
        numbers += [m.heldout_quantized, m.heldout_corrected] if stats.n_tokens else []
        assert all(map(math.isfinite, numbers)), init
        if init == "cloq":
            assert m.error_corrected <= m.error_quantized * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("quant", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("rounds", [0, LoraSpec().rounds])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_weights_that_no_grid_holds_are_refused_or_finite(value, rounds, quant):
    """A value that float16 scales cannot hold, or that is none; also where factors come first, which could take it from the codes."""
    weight, stats = _given("well conditioned")
    weight = weight.clone()
    weight[3, 5] = value
    if quant.quantizer == "nf4" and math.isfinite(value):  # its scales are float32
        result = solve_layer(weight, stats, None, LayerSpec(quant, 8), LoraSpec(rounds=rounds))
        assert all(bool(torch.isfinite(part).all()) for part in (result.weight.dequantize(), result.factors.A, result.factors.B))
        return
    with pytest.raises((ModelError, ValueError)):
        solve_layer(weight, stats, None, LayerSpec(quant, 8), LoraSpec(rounds=rounds))
