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
