"""What is found out about blocks, and how often they are looked at."""

import torch

from cloq.models import Decoder, Kinds
from cloq.models import kinds as module
from tests.tiny import save_tiny


def test_blocks_of_a_kind_are_looked_into_once(tmp_path, monkeypatch):
    calls = []
    find = module.junctions
    monkeypatch.setattr(module, "junctions", lambda run, block, layers: calls.append(block) or find(run, block, layers))
    decoder = Decoder(save_tiny("qwen3_moe", tmp_path))  # whose first block has no experts
    batches, kinds = decoder.enter(torch.arange(32).reshape(2, 16), 32), Kinds(decoder)
    for index in range(len(decoder.blocks)):
        decoder.load_block(index)
        kind = kinds.of(index, batches)
        joined = kind.joined(decoder, index)
        assert joined and all(name.startswith(decoder.block_name(index)) for name in joined)
        assert kind.ends["self_attn"].layer == "self_attn.o_proj" and ("mlp" in kind.ends) == (index == 0)
        decoder.drop_block(index)
    assert len(calls) == 2 < len(decoder.blocks)
