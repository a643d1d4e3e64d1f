"""Every format's encode and decode are an exact inverse pair, for every width, shape, grid and grouping; no library is needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloq.errors import ExportError
from cloq.export import compressed_tensors, container, gptq, nf4
from cloq.export.compressed_tensors import CompressedTensorsReader, Scheme
from cloq.export.gptq import GptqReader
from cloq.export.nf4 import Nf4Reader
from cloq.quantizers.nf4 import CODEBOOK
from cloq.types import CodebookWeight, QuantizedWeight


@st.composite
def grids(draw, multiple: int = 1, bits=(2, 3, 4, 8), ragged: bool = True, permuted: bool = True, symmetric: bool | None = None):
    """A weight with random codes: any width and group size, negative scales, zero points anywhere, never square."""
    width, size = draw(st.sampled_from(bits)), draw(st.sampled_from((32, 64, None)))
    out = draw(st.integers(1, 4)) * multiple * (1 if multiple > 1 else 7)
    columns = draw(st.integers(1, 5).filter(lambda n: n * 32 != out)) * 32
    if size and not ragged:
        columns *= size // 32
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups = -(-columns // (size or columns))
    group_index = torch.arange(columns) // (size or columns)
    if permuted and draw(st.booleans()):
        group_index = group_index[torch.randperm(columns, generator=seed)]
    middle = draw(st.booleans()) if symmetric is None else symmetric
    zero = torch.randint(0, 2**width, (out, groups), generator=seed, dtype=torch.uint8)
    if middle:
        zero = torch.full_like(zero, 2 ** (width - 1))
    return QuantizedWeight(
        torch.randint(0, 2**width, (out, columns), generator=seed, dtype=torch.uint8),
        torch.randn(out, groups, generator=seed).half().float(),
        zero, group_index, width, size, bool((zero == 2 ** (width - 1)).all()),
    )  # fmt: skip


def assert_equal(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    for part in ("codes", "scale", "zero", "group_index"):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part
    for part in ("bits", "group_size", "symmetric"):
        assert getattr(found, part) == getattr(expected, part), part


def assert_specified(tensors, specs) -> None:
    assert tensors.keys() == specs.keys()
    for suffix, spec in specs.items():
        assert spec.shape in (None, tuple(tensors[suffix].shape)) and tensors[suffix].dtype in spec.dtypes, suffix


@given(grids(multiple=32))
@settings(max_examples=60, deadline=None)
def test_gptq(weight):
    tensors = gptq.encode(weight)
    assert_equal(gptq.decode(tensors, weight.bits, weight.group_size), weight)
    assert_specified(tensors, GptqReader(weight.bits, weight.group_size, 2).specs("", weight.shape))


@given(grids(ragged=False, permuted=False))
@settings(max_examples=60, deadline=None)
def test_compressed_tensors(weight):
    scheme = Scheme(weight.bits, weight.group_size, weight.symmetric)
    tensors = compressed_tensors.encode(weight)
    assert_equal(compressed_tensors.decode(tensors, scheme), weight)
    assert_specified(tensors, CompressedTensorsReader(((("Linear",), scheme),)).specs("", weight.shape))
    assert ("weight_zero_point" in tensors) != weight.symmetric


@given(out=st.integers(1, 9), half=st.integers(1, 70), double=st.booleans())
@settings(max_examples=60, deadline=None)
def test_nf4(out, half, double):
    """Blocks run over the flattened weight, so they may straddle rows and end short."""
    columns = 2 * half
    weight = CodebookWeight(
        torch.randint(0, 16, (out, columns), dtype=torch.uint8), torch.rand(-(-out * columns // 64)), torch.tensor(CODEBOOK), 64
    )
    tensors = nf4.encode(weight, "bfloat16")
    found = nf4.decode(tensors)
    assert torch.equal(found.codes, weight.codes) and torch.equal(found.scale, weight.scale) and found.block_size == 64
    assert torch.equal(found.dequantize(), weight.dequantize())
    assert_specified(tensors, Nf4Reader().specs("", weight.shape))


@given(grids(multiple=32, bits=(2, 3)))
@settings(max_examples=60, deadline=None)
def test_the_container_keeps_every_value(weight):
    recoded = container.recode(weight)
    assert recoded.bits == 4 and recoded.symmetric and int(recoded.codes.max()) <= 15
    assert torch.equal(recoded.dequantize(), weight.dequantize())
    assert_equal(gptq.decode(gptq.encode(recoded), 4, weight.group_size), recoded)


@given(grids(multiple=32, bits=(4,), symmetric=True))
@settings(max_examples=20, deadline=None)
def test_the_container_takes_symmetric_four_bits_as_they_are(weight):
    assert_equal(container.recode(weight), weight)


def a_weight(zero: int, code: int, bits: int = 4, scale: float = 0.5) -> QuantizedWeight:
    codes = torch.full((32, 64), code, dtype=torch.uint8)
    zeros = torch.full((32, 1), zero, dtype=torch.uint8)
    return QuantizedWeight(codes, torch.full((32, 1), scale), zeros, torch.zeros(64, dtype=torch.int64), bits, None)


def test_the_container_refuses_codes_that_do_not_fit():
    with pytest.raises(ExportError, match="runs from 15 to 15, and the 4-bit container holds −8…7; use --format gptq"):
        container.recode(a_weight(zero=0, code=15))


def test_gptq_refuses_scales_that_float16_does_not_hold():
    for scale in (1e6, 1 / 3):
        with pytest.raises(ExportError, match="GPTQ stores scales as float16, and this base has others"):
            gptq.encode(a_weight(zero=0, code=1, scale=scale))


def test_compressed_tensors_keeps_scales_that_float16_does_not_hold():
    weight = a_weight(zero=3, code=1, scale=1 / 3)
    assert_equal(compressed_tensors.decode(compressed_tensors.encode(weight), Scheme(4, None, False)), weight)


@given(grids(multiple=32, permuted=False), st.data())
@settings(max_examples=30, deadline=None)
def test_version_1_zeros_are_one_less(weight, data):
    """Where no field is full, adding 1 to words is adding 1 to fields."""
    stored = weight.zero.clamp(max=2**weight.bits - 2)
    found = gptq.zeros_v1_to_v2(gptq.packing.pack(stored.T, weight.bits), weight.bits)
    assert torch.equal(gptq.packing.unpack(found, weight.bits, weight.shape[0]).T, stored + 1)
