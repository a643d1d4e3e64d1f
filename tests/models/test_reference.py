"""The original model's activations stay its own while another model's weights are in the blocks."""

import pytest
import torch

from cloq.models import Decoder, Reference, set_weight
from tests.tiny import save_tiny


@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma4-shared", "mixtral"))
def test_activations_are_those_of_the_original(family, tmp_path):
    tokens = torch.arange(48).reshape(3, 16)
    alone, decoder = Decoder(save_tiny(family, tmp_path)), Decoder(tmp_path)
    true = alone.enter(tokens, 32)
    compressed, reference = decoder.enter(tokens, 32), Reference(decoder, decoder.enter(tokens, 32))
    for index in range(len(decoder.blocks)):
        alone.load_block(index), decoder.load_block(index)
        linears = decoder.linears(index)
        reference.enter(index, linears)
        if index:  # both ways: the activations of what was kept, and a forward of their own
            reference.look([[name] for name in linears])
        replaced = {name: torch.zeros_like(decoder.weight(name, module)) for name, module in linears.items()}
        for name, module in linears.items():
            set_weight(module, replaced[name])
        outputs = [decoder.run_block(index, batch) for batch in compressed]
        reference.propagate()
        for batch, other in zip(true, reference.batches, strict=True):
            assert torch.equal(alone.run_block(index, batch), other.hidden)
        for batch, before in zip(compressed, outputs, strict=True):
            assert torch.equal(decoder.run_block(index, batch), before)  # the compressed weights are back in place
        compressed = [type(b)(h, b.calls) for b, h in zip(compressed, outputs, strict=True)]
        true = [type(b)(alone.run_block(index, b), b.calls) for b in true]
        assert all(float(module.weight.abs().max()) == 0 for module in linears.values())
        decoder.drop_block(index), alone.drop_block(index)


def test_blocks_of_a_kind_are_looked_into_once(tmp_path, monkeypatch):
    from cloq.models import reference as module

    calls = []
    find = module.junctions
    monkeypatch.setattr(module, "junctions", lambda run, block, layers: calls.append(block) or find(run, block, layers))
    decoder = Decoder(save_tiny("qwen3_moe", tmp_path))  # whose first block has no experts
    reference = Reference(decoder, decoder.enter(torch.arange(32).reshape(2, 16), 32))
    for index in range(len(decoder.blocks)):
        decoder.load_block(index)
        reference.enter(index, decoder.linears(index))
        assert reference.joined and all(name.startswith(decoder.block_name(index)) for name in reference.joined)
        reference.propagate()
        decoder.drop_block(index)
    assert len(calls) == 2 < len(decoder.blocks)


def test_what_is_kept_is_what_would_be_seen(tmp_path, monkeypatch):
    """The result of a run does not depend on how much memory there is for it."""
    decoder = Decoder(save_tiny("llama", tmp_path))
    reference = Reference(decoder, decoder.enter(torch.arange(64).reshape(4, 16), 32))
    decoder.load_block(0)
    linears = decoder.linears(0)
    reference.enter(0, linears)
    names = [name for name in linears if "o_proj" in name or "down" in name]
    forwards = []
    forward = Decoder.run_block
    monkeypatch.setattr(Decoder, "run_block", lambda d, i, batch: forwards.append(i) or forward(d, i, batch))
    fresh = [reference.seen(i, names, reference.joined) for i in range(2)]
    reference.look([[name] for name in linears])
    before = len(forwards)
    kept = [reference.seen(i, names, reference.joined) for i in range(2)]
    assert len(forwards) == before == 4
    for one, other in zip(fresh, kept, strict=True):
        assert all(torch.equal(one.rows[name], other.rows[name]) for name in names)
        assert one.streams.keys() == set(names) and all(torch.equal(one.streams[name], other.streams[name]) for name in names)
    reference.propagate()
    assert len(forwards) == before
    monkeypatch.setattr("cloq.models.reference.KEPT_BYTES", 0)
    reference.enter(0, linears)
    reference.look([[name] for name in linears])
    assert len(forwards) == before
