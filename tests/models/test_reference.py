"""The original model's activations stay its own while another model's weights are in the blocks."""

import pytest
import torch

from cloq.models import Decoder, Kinds, Reference, Room, set_weight
from tests.tiny import save_tiny


@pytest.mark.parametrize("room", (0, 1 << 30))
@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma4-shared", "mixtral"))
def test_activations_are_those_of_the_original(family, room, tmp_path):
    tokens = torch.arange(48).reshape(3, 16)
    alone, decoder = Decoder(save_tiny(family, tmp_path)), Decoder(tmp_path)
    true = alone.enter(tokens, 32)
    compressed, reference, kinds = decoder.enter(tokens, 32), Reference(decoder, decoder.enter(tokens, 32)), Kinds(decoder)
    for index in range(len(decoder.blocks)):
        alone.load_block(index), decoder.load_block(index)
        linears = decoder.linears(index)
        reference.enter(index, linears, kinds.of(index, compressed), Room(room))
        first = next(name for name in linears if name not in decoder.expert_layers)
        for position in range(len(compressed)):  # so that something can be kept
            reference.seen(position, [first], reference.joined)
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


def test_what_is_kept_is_what_would_be_seen(tmp_path):
    """The result of a run does not depend on how much memory there is for it."""
    decoder = Decoder(save_tiny("llama", tmp_path))
    batches = decoder.enter(torch.arange(64).reshape(4, 16), 32)
    decoder.load_block(0)
    linears, kind = decoder.linears(0), Kinds(decoder).of(0, batches)
    attentions = []
    decoder.blocks[0].self_attn.q_proj.register_forward_hook(lambda *_: attentions.append(1))
    keeping, computing = Reference(decoder, list(batches)), Reference(decoder, list(batches))
    keeping.enter(0, linears, kind, Room(1 << 30)), computing.enter(0, linears, kind, Room(0))
    counts = {}
    for reference in (computing, keeping):
        attentions.clear()
        for layer in ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            name = f"model.layers.0.{layer}"
            adding = {name: reference.joined[name]} if name in reference.joined else {}
            for position in range(2):
                one, other = reference.seen(position, [name], adding), computing.seen(position, [name], adding)
                assert torch.equal(one.rows[name], other.rows[name]) and one.sums.keys() == set(adding)
                assert all(torch.equal(one.sums[n], other.sums[n]) for n in adding)
        counts[reference] = len(attentions)
    assert counts[computing] == 12 and counts[keeping] == 6 + 2
    keeping.propagate(), computing.propagate()
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(keeping.batches, computing.batches, strict=True))
