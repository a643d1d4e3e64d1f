"""The values that travel: they merge, decode and refuse as their docstrings say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloq.quantizers import Gptq, Nf4, Rtn
from cloq.types import LayerMetrics, LayerResult, LayerStats, LoraFactors, QuantizedWeight, layout
from tests.problems import SHAPES, problem


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.randoms(use_true_random=False), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_statistics_merge_in_any_order(batches, random, seed):
    """On inputs of small integers the sums are exact in float32, so equality is too."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(-9, 10, (n, 5), generator=generator).float() for n in batches]
    stats = [LayerStats(x.T @ x, len(x)) for x in parts]
    random.shuffle(stats)
    merged = stats[0]
    for other in stats[1:]:
        merged = other + merged if random.random() < 0.5 else merged + other
    whole = torch.cat(parts)
    assert torch.equal(merged.gram, whole.T @ whole) and merged.n_tokens == len(whole)


def test_merging_makes_a_new_value():
    one, two = LayerStats(torch.eye(3), 4), LayerStats(torch.eye(3), 5)
    assert (one + two).n_tokens == 9 and torch.equal((one + two).gram, 2 * torch.eye(3))
    assert torch.equal(one.gram, torch.eye(3)) and one.n_tokens == 4


def test_statistics_of_different_layers_do_not_merge():
    with pytest.raises(ValueError, match=r"shapes \(3, 3\) and \(4, 4\)"):
        LayerStats(torch.eye(3), 1) + LayerStats(torch.eye(4), 1)


def test_a_quantized_weight_decodes_by_its_groups():
    weight = QuantizedWeight(
        codes=torch.tensor([[0, 1, 2, 3], [3, 3, 0, 0]], dtype=torch.uint8),
        scale=torch.tensor([[0.5, 2.0], [1.0, -1.0]]),
        zero=torch.tensor([[1, 2], [0, 3]], dtype=torch.uint8),
        group_index=torch.tensor([0, 1, 0, 1]),
        bits=2,
        group_size=2,
    )
    assert weight.dequantize().tolist() == [[-0.5, -2.0, 0.5, 2.0], [3.0, 0.0, 0.0, 3.0]]
    assert weight.shape == (2, 4)
    assert weight.storage_bits() == 8 * 2 + 4 * (16 + 2)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_the_decoded_values_need_no_more_than_float32(bits):
    """Every code times every float16 scale, in float64 and in float32."""
    scale = torch.tensor([2.0**-24, 2.0**-14 * (1 + 2.0**-10), 0.333251953125, 1.0, 65504.0])
    values = torch.arange(2**bits).repeat(5, 1)
    for zero in (0, 2**bits // 2, 2**bits - 1):
        zeros = torch.full((5, 1), zero, dtype=torch.uint8)
        weight = QuantizedWeight(values.byte(), scale[:, None], zeros, torch.zeros(2**bits, dtype=torch.int64), bits, None)
        assert torch.equal(weight.dequantize().double(), (values - zero).double() * scale[:, None].double())


def test_a_codebook_weight_decodes_by_blocks_across_rows():
    weight = torch.arange(1.0, 31.0).reshape(3, 10)
    quantized = Nf4(8).quantize(weight)
    assert quantized.scale.tolist() == [8, 16, 24, 30]
    flat = quantized.codebook[quantized.codes.flatten().long()]
    assert torch.equal(quantized.dequantize().flatten(), flat * torch.tensor([8.0] * 8 + [16.0] * 8 + [24.0] * 8 + [30.0] * 6))
    assert quantized.storage_bits() == 30 * 4 + 4 * 32


def test_the_layout_says_what_a_format_must_hold():
    p = problem("power law", SHAPES["wide"])
    plain = layout(Rtn(3, 32, symmetric=True).quantize(p.weight))
    assert (plain.kind, plain.shape, plain.bits, plain.group_size, plain.symmetric) == ("integer", (40, 72), 3, 32, True)
    assert not plain.permuted
    assert layout(Gptq(2, 32, act_order=True).quantize(p.weight, p.stats)).permuted
    assert not layout(Gptq(2, 32, act_order=True, static_groups=True).quantize(p.weight, p.stats)).permuted
    assert not layout(Gptq(2, None, act_order=True).quantize(p.weight, p.stats)).permuted
    codebook = layout(Nf4().quantize(p.weight))
    assert (codebook.kind, codebook.bits, codebook.group_size, codebook.permuted) == ("codebook", 4, 64, False)


def test_factors_multiply_to_their_delta():
    A, B = torch.randn(2, 5), torch.randn(3, 2)
    factors = LoraFactors(A, B)
    assert factors.rank == 2 and torch.equal(factors.delta(), B @ A)


@pytest.mark.parametrize("a, b", [((2, 5), (2, 3)), ((5,), (3, 2)), ((2, 5), (3,))])
def test_factors_that_do_not_fit_are_refused(a, b):
    with pytest.raises(ValueError, match=r"need A \(r, in\) and B \(out, r\), got A .* and B "):
        LoraFactors(torch.zeros(a), torch.zeros(b))


def test_the_effective_weight_is_with_or_without_the_adapter():
    p = problem("power law", SHAPES["tall"])
    quantized = Rtn(2, 32).quantize(p.weight)
    factors = LoraFactors(torch.randn(4, 48), torch.randn(88, 4))
    result = LayerResult(quantized, factors, LayerMetrics(1.0, 0.5, None, None, 10, 0.0, 0.1, 4, 2.5))
    assert torch.equal(result.effective_weight(adapter=False), quantized.dequantize())
    assert torch.equal(result.effective_weight(), quantized.dequantize() + factors.delta())
