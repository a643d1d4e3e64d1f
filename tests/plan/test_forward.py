"""The count of a forward without weights against the pipeline's own look at the real block, and against formulas."""

import math

import pytest
import torch

from cloq.calibration import shared_inputs
from cloq.models import Decoder, Kinds, linear_shape
from cloq.plan import forward as module
from cloq.plan.forward import block_forwards
from tests.tiny import save_tiny

LENGTH = 16
FAMILIES = ("llama-tied", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "falcon", "cohere")


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_are_those_that_the_pipeline_finds(family, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path))
    forwards, note = block_forwards(decoder, LENGTH)
    assert note is None and len(forwards) == len(decoder.blocks)
    (batch,) = decoder.enter(torch.arange(LENGTH)[None], LENGTH)
    decoder.load_block(0)
    found = shared_inputs(lambda: decoder.run_block(0, batch), decoder.linears(0))
    prefix = decoder.block_name(0) + "."
    assert [[prefix + name for name in group.names] for group in forwards[0].groups] == found


@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "mamba", "mixtral", "gemma4-shared"])
def test_parts_are_those_that_a_run_finds(family, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path))
    forwards, note = block_forwards(decoder, LENGTH)
    batches, kinds = decoder.enter(torch.arange(LENGTH)[None], LENGTH), Kinds(decoder)
    decoder.load_block(0)
    assert note is None and {part.last for part in forwards[0].parts} == {end.layer for end in kinds.of(0, batches).ends.values()}
    assert all(0 < part.ending.products < (part.left - part.entered).products for part in forwards[0].parts)


def _products(decoder: Decoder, *names: str) -> float:
    shapes = {name.rsplit(".", 1)[-1]: linear_shape(m) for name, m in decoder.linears(0).items()}
    return 2.0 * LENGTH * sum(math.prod(shapes[name]) for name in names)


def test_work_before_each_group_of_a_llama(tmp_path):
    """Sequential capture stops a forward at the group it wants: nothing before q, k, v; they and attention before o; …"""
    decoder = Decoder(save_tiny("llama", tmp_path))
    (forward, *_), _ = block_forwards(decoder, LENGTH)
    attention = module._ATTENTION * 4 * (LENGTH * LENGTH / 2) * 2 * 2 * 32  # 4 heads of 32, two products, the lower triangle
    sums = [0.0, _products(decoder, "q_proj", "k_proj", "v_proj") + attention, _products(decoder, "o_proj")]
    sums += [_products(decoder, "gate_proj", "up_proj"), _products(decoder, "down_proj")]
    expected = [sum(sums[: n + 1]) for n in range(5)]
    rotary = 2 * LENGTH * 16  # angles = positions · frequencies, once, ahead of the first block
    assert [group.before.products for group in forward.groups] == pytest.approx(expected[:4], abs=rotary)
    assert forward.whole.products == pytest.approx(expected[4], abs=rotary)


def test_products_grow_with_the_length_and_attention_with_its_square(tmp_path):
    decoder = Decoder(save_tiny("qwen3", tmp_path))
    short, long = (block_forwards(decoder, n)[0][0] for n in (LENGTH, 2 * LENGTH))
    linear = _products(decoder, "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert long.whole.products - 2 * linear == pytest.approx(4 * (short.whole.products - linear))
    assert long.largest == 2 * short.largest and long.whole.streamed == pytest.approx(2 * short.whole.streamed, rel=0.2)


def test_alike_blocks_are_counted_once(tmp_path):
    forwards, _ = block_forwards(Decoder(save_tiny("llama", tmp_path)), LENGTH)
    assert forwards[0] is forwards[1] is forwards[2]


def test_nothing_is_read_and_the_model_is_left_as_it_was(tmp_path, monkeypatch):
    decoder = Decoder(save_tiny("gpt2", tmp_path))
    monkeypatch.setattr(type(decoder.checkpoint), "read", lambda *_: pytest.fail("a weight was read"))
    block_forwards(decoder, LENGTH)
    assert all(p.device.type == "meta" for p in decoder.model.parameters())
    assert not any("forward" in vars(block) for block in decoder.blocks)


def test_a_model_that_needs_values_is_estimated_and_says_so(tmp_path, monkeypatch):
    decoder = Decoder(save_tiny("llama", tmp_path))
    monkeypatch.setattr(type(decoder.model), "forward", lambda *_, **__: torch.zeros(1).nonzero())
    monkeypatch.setattr(module, "_traced", _needs_values)
    forwards, note = block_forwards(decoder, LENGTH)
    assert "estimated from the layers' shapes" in note and "experts are chosen by values" in note
    names = [n.removeprefix(decoder.block_name(0) + ".") for n in decoder.linears(0)]
    assert [group.names for group in forwards[0].groups] == [(name,) for name in names]
    assert forwards[0].whole.products == _products(decoder, *(name.rsplit(".", 1)[-1] for name in names))


def _needs_values(*_):
    raise RuntimeError("experts are chosen by values\nand a long trace")
