"""Packing against a bit stream made of one large Python integer, and against its own inverse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloq.algebra.packing import pack, unpack


@st.composite
def codes(draw):
    bits = draw(st.integers(1, 8))
    rows, n = draw(st.integers(1, 4)), draw(st.integers(1, 100))
    seed = draw(st.integers(0, 2**31))
    kind = draw(st.sampled_from(("random", "zeros", "ones")))
    if kind == "random":
        values = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed))
    else:
        values = torch.full((rows, n), 0 if kind == "zeros" else 2**bits - 1)
    return values.to(draw(st.sampled_from((torch.uint8, torch.int32, torch.int64)))), bits


def naive_words(row: list[int], bits: int) -> list[int]:
    """Code i at bits i · bits … of one integer, cut into signed 32-bit words."""
    stream = sum(code << (i * bits) for i, code in enumerate(row))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(math.ceil(len(row) * bits / 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@given(codes())
@settings(max_examples=300, deadline=None)
def test_a_row_is_a_little_endian_bit_stream(case):
    values, bits = case
    packed = pack(values, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [naive_words(row, bits) for row in values.tolist()]


@given(codes())
@settings(max_examples=300, deadline=None)
def test_unpack_is_the_inverse(case):
    values, bits = case
    kept = values.clone()
    found = unpack(pack(values, bits), bits, values.shape[1])
    assert found.dtype == torch.uint8 and found.is_contiguous() and torch.equal(found, values.byte())
    assert torch.equal(values, kept)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_in_every_place(bits):
    """All values at all positions of one period, so that every straddling shift is seen."""
    n = 32
    values = (torch.arange(2**bits)[:, None] + torch.arange(n)) % 2**bits
    assert torch.equal(unpack(pack(values, bits), bits, n), values.byte())


def test_three_bits_straddle_words_where_the_format_says():
    """Codes 10 and 21 of every 32 lie in two words."""
    values = torch.zeros(1, 32, dtype=torch.uint8)
    values[0, 10], values[0, 21] = 0b101, 0b110
    first, second, third = (word & 0xFFFFFFFF for word in pack(values, 3)[0].tolist())
    assert (first, second & 1) == (0b01 << 30, 0b1)
    assert (second >> 31, third) == (0b0, 0b11)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_out_of_range_are_refused(bits):
    top = 2**bits - 1
    with pytest.raises(ValueError, match=f"codes must lie in 0…{top} for {bits} bits, got 0…{top + 1}"):
        pack(torch.tensor([[0, top + 1]]), bits)
    with pytest.raises(ValueError, match=rf"codes must lie in 0…{top} for {bits} bits, got -1…0"):
        pack(torch.tensor([[0, -1]]), bits)


def test_the_wrong_number_of_words_is_refused():
    with pytest.raises(ValueError, match="33 codes of 3 bits need 4 words a row, got 3"):
        unpack(torch.zeros(2, 3, dtype=torch.int32), 3, 33)


@pytest.mark.parametrize("bits", (0, 9, 16))
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"packing is for 1 to 8 bits, got {bits}"):
        pack(torch.zeros(1, 4, dtype=torch.uint8), bits)
