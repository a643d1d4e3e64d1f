"""Rounding to a grid that is there: the nearest of all its points, and nothing but the codes changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cloq.quantizers import Nf4, Rtn
from cloq.quantizers.regrid import onto_grid_of
from cloq.types import AnyQuantizedWeight

QUANTIZERS = [Rtn(2, 32), Rtn(3, None, symmetric=True), Rtn(4, 64), Nf4()]


def nearest_by_trial(weight: AnyQuantizedWeight, values: Tensor) -> Tensor:
    """Every value's nearest point, by decoding every code there is."""
    levels = [torch.full_like(weight.codes, level) for level in range(2**weight.bits)]
    points = torch.stack([dataclasses.replace(weight, codes=codes).dequantize() for codes in levels])
    return points.gather(0, (points - values).abs().argmin(0, keepdim=True))[0]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_the_nearest_point_of_all(quantizer):
    """72 inputs: groups and blocks end in the middle of a row or of the weight."""
    weight, values = quantizer.quantize(random(40, 72, seed=0)), random(40, 72, seed=1)
    found = onto_grid_of(weight, values)
    torch.testing.assert_close((found.dequantize() - values).abs(), (nearest_by_trial(weight, values) - values).abs())
    assert found.codes.dtype == torch.uint8 and int(found.codes.max()) < 2**weight.bits
    assert torch.equal(found.scale, weight.scale)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_a_grid_holds_its_own_points(quantizer):
    weight = quantizer.quantize(random(40, 72, seed=0))
    assert torch.equal(onto_grid_of(weight, weight.dequantize()).dequantize(), weight.dequantize())


def test_a_block_of_zeros_holds_nothing_else():
    weight = Nf4().quantize(torch.zeros(2, 64))
    assert not bool(onto_grid_of(weight, random(2, 64, seed=0)).dequantize().any())
