"""Models whose blocks cannot be run one by one are refused, with the reason, before any block is worked on."""

from __future__ import annotations

import json

import pytest
import torch

from cloq.errors import ModelError
from cloq.models import Decoder
from cloq.models.probe import returned_values
from tests.tiny import FAMILIES, save_tiny

TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture
def odd_family(monkeypatch):
    """Adds a model type to the table of tiny models for one test."""

    def add(model_type: str, **settings) -> str:
        monkeypatch.setitem(FAMILIES, "odd", (model_type, settings))
        return "odd"

    return add


SMALL = {"vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


@pytest.mark.parametrize("model_type", ["bert", "electra", "roformer", "megatron-bert"])
def test_encoders_look_ahead(model_type, odd_family, tmp_path):
    decoder = Decoder(save_tiny(odd_family(model_type, **SMALL), tmp_path))
    with pytest.raises(ModelError, match=r"not a causal decoder.*depends on later tokens"):
        decoder.enter(TOKENS, 6)


def test_an_encoder_made_a_decoder_is_one(odd_family, tmp_path):
    decoder = Decoder(save_tiny(odd_family("bert", **SMALL, is_decoder=True), tmp_path))
    assert len(decoder.enter(TOKENS, 6)) == 2


def test_blocks_that_run_in_cycles(odd_family, tmp_path):
    family = odd_family("hrm_text", **(SMALL | {"num_hidden_layers": 4, "head_dim": 16, "num_layers_per_stack": 2}))
    with pytest.raises(ModelError, match="does not run its blocks once and in order"):
        Decoder(save_tiny(family, tmp_path)).enter(TOKENS, 6)


def test_hidden_states_of_another_shape(odd_family, tmp_path):
    family = odd_family("xlnet", vocab_size=288, d_model=64, n_layer=2, n_head=4, d_inner=96)
    with pytest.raises(ModelError, match=r"hidden states of shape \(8, 1, 64\)"):
        Decoder(save_tiny(family, tmp_path)).enter(TOKENS, 6)


@pytest.mark.parametrize("model_type", ["zamba2"])
def test_blocks_that_share_weights(model_type, odd_family, tmp_path):
    layers = {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "hybrid_layer_ids": [1, 3], "num_hidden_layers": 4}
    heads = {"mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 32, "num_key_value_heads": 4, "attention_head_dim": 32}
    family = odd_family(model_type, **(SMALL | layers | heads | {"num_mem_blocks": 1, "adapter_rank": 4, "kv_channels": 16}))
    with pytest.raises(ModelError, match=r"(ties weights inside its blocks|same layers in several blocks)"):
        Decoder(save_tiny(family, tmp_path))


def patched(decoder: Decoder, forward) -> Decoder:
    """The decoder with another forward of its inner model: what a stranger's architecture might do."""
    inner = decoder.model.model
    inner.forward = forward.__get__(inner)
    return decoder


def between(self, input_ids, **kwargs):
    from transformers.modeling_outputs import BaseModelOutputWithPast

    hidden = self.embed_tokens(input_ids)
    positions = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
    for block in self.layers:
        hidden = 1.5 * block(hidden, position_embeddings=positions)
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def handed_on(self, input_ids, **kwargs):
    from transformers.modeling_outputs import BaseModelOutputWithPast

    hidden = self.embed_tokens(input_ids)
    cosines, sines = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
    for block in self.layers:
        hidden = block(hidden, position_embeddings=(cosines + hidden.mean(), sines))
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def half_of_them(self, input_ids, **kwargs):
    from transformers.modeling_outputs import BaseModelOutputWithPast

    hidden = self.embed_tokens(input_ids)
    positions = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
    for block in self.layers[:-1]:
        hidden = block(hidden, position_embeddings=positions)
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def broken(self, input_ids, **kwargs):
    raise KeyError("an unheard-of argument")


REFUSED = {
    between: "changes hidden states between block 0 and 1",
    handed_on: "calls block 1 with what earlier blocks computed",
    half_of_them: "ran 2 of 3 blocks",
    broken: "cannot be run block by block.*unheard-of",
}


@pytest.mark.parametrize("forward", REFUSED, ids=lambda forward: forward.__name__)
def test_each_condition(forward, tmp_path):
    decoder = patched(Decoder(save_tiny("llama", tmp_path)), forward)
    with pytest.raises(ModelError, match=REFUSED[forward]):
        decoder.enter(TOKENS, 6)
    assert all(p.device.type == "meta" for p in decoder.model.parameters())


def test_a_block_that_overwrites_its_input(tmp_path, monkeypatch):
    decoder = Decoder(save_tiny("llama", tmp_path))
    kind = type(decoder.blocks[0])
    monkeypatch.setattr(kind, "forward", lambda self, hidden_states, **kwargs: hidden_states.mul_(2))
    with pytest.raises(ModelError, match="overwrites the hidden states"):
        decoder.enter(TOKENS, 6)


@pytest.mark.parametrize(("family", "length"), [("llama", None), ("bloom", 2), ("mpt", 2), ("falcon", 2), ("rwkv", 3), ("openai-gpt", 1)])
def test_what_blocks_return(family, length, tmp_path):
    assert set(returned_values(Decoder(save_tiny(family, tmp_path))).values()) == {length}


@pytest.mark.parametrize("spelling", ["hidden_states", None])
def test_hidden_states_may_come_as_keyword(spelling, tmp_path):
    decoder = Decoder(save_tiny("llama", tmp_path))
    expected = decoder.enter(TOKENS, 12)[0]

    def forward(self, input_ids, **kwargs):
        from transformers.modeling_outputs import BaseModelOutputWithPast

        hidden = self.embed_tokens(input_ids)
        positions = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for block in self.layers:
            call = {spelling: hidden} if spelling else {}
            hidden = block(*([] if spelling else [hidden]), position_embeddings=positions, **call)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    found = patched(Decoder(tmp_path), forward).enter(TOKENS, 12)[0]
    assert torch.equal(found.hidden, expected.hidden)
    assert [sorted(call[1]) for call in found.calls] == [["position_embeddings"]] * 3


def test_the_probe_leaves_no_trace(tmp_path):
    decoder = Decoder(save_tiny("llama", tmp_path))
    decoder.check_streamable()
    assert all(p.device.type == "meta" for p in decoder.model.parameters())
    assert all("forward" not in vars(block) for block in decoder.blocks)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def either(self, input_ids, **kwargs):
    from transformers.modeling_outputs import BaseModelOutputWithPast

    hidden = self.embed_tokens(input_ids)
    positions = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
    for block in self.layers:
        output = block(hidden, position_embeddings=positions)
        hidden = output[0] if isinstance(output, tuple) else output
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def test_blocks_of_several_kinds_are_each_looked_at(tmp_path):
    decoder = patched(Decoder(save_tiny("llama", tmp_path)), either)
    kind = type(decoder.blocks[1])
    other = type("OtherBlock", (kind,), {"forward": lambda self, hidden_states, **kwargs: (2 * hidden_states, None)})
    decoder.blocks[1].__class__ = other
    assert returned_values(decoder) == {kind: None, other: 2}
    batch = decoder.enter(TOKENS, 12)[0]
    assert torch.equal(decoder.run_block(1, batch), 2 * batch.hidden)
