"""A streamed model is the model: for every family, precision and layout of files, its logits are those of plain transformers."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import Tensor

from cloq.calibration import shared_inputs
from cloq.models import Checkpoint, Decoder, linear_shape, set_weight
from tests.tiny import FAMILIES, MIXTURES, load_plain, save_tiny, tiny_model

SEQUENCES, LENGTH = 5, 20  # longer than the sliding windows of 8; micro-batches of 2, 2 and 1
BATCH_TOKENS = 40


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, 257, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(7))


def streamed_logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Enter, every block with its weights in place and dropped again, leave: as a run does it, over all batches."""
    batches = decoder.enter(tokens, BATCH_TOKENS)
    for index in range(len(decoder.blocks)):
        decoder.load_block(index)
        batches = [dataclasses.replace(batch, hidden=decoder.run_block(index, batch)) for batch in batches]
        decoder.drop_block(index)
    with decoder.outer():
        rows = tokens.split(BATCH_TOKENS // tokens.shape[1])
        return torch.cat([decoder.leave(batch.hidden, ids) for batch, ids in zip(batches, rows, strict=True)])


@torch.no_grad()
def plain_logits(model, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    """Within `tolerance` of the largest logit: experts and scans sum in another order when batches are cut otherwise."""
    return one.shape == other.shape and float((one - other).abs().max()) <= tolerance * float(other.abs().max())


# -- the model is the model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_the_models(family, tokens, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path))
    expected = plain_logits(load_plain(tmp_path), tokens)
    assert float(expected.std()) > 0.05  # the tiny model says something
    found = streamed_logits(decoder, tokens)
    assert close(found, expected)
    assert family in (*MIXTURES, "mamba") or torch.equal(found, expected)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_any_stored_precision_and_any_number_of_files(family, dtype, shards, tokens, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path, dtype=dtype, shards=shards))
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    assert decoder.read(decoder.all_linears()[0] + ".weight").dtype == dtype
    assert close(streamed_logits(decoder, tokens), plain_logits(load_plain(tmp_path), tokens))


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3"])
def test_blocks_can_compute_in_half_precision(family, tokens, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path), dtype=torch.bfloat16)
    expected = plain_logits(load_plain(tmp_path, torch.bfloat16), tokens)
    assert close(streamed_logits(decoder, tokens).float(), expected.float(), tolerance=0.05)
    dtypes = {p.dtype for p in decoder.load_block(0).parameters()}
    assert dtypes == {p.dtype for p in load_plain(tmp_path, torch.bfloat16).get_submodule(decoder.block_name(0)).parameters()}


def test_files_of_the_base_model_have_no_prefix(tokens, tmp_path):
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    assert "h.0.attn.c_attn.weight" in Checkpoint(tmp_path).names
    assert torch.equal(streamed_logits(Decoder(tmp_path), tokens), plain_logits(model, tokens))


def test_batches_are_cut_by_tokens_and_share_what_is_equal(tokens, tmp_path):
    decoder = Decoder(save_tiny("mistral", tmp_path))
    batches = decoder.enter(tokens, BATCH_TOKENS)
    assert [len(batch.hidden) for batch in batches] == [2, 2, 1]
    assert [len(batch.hidden) for batch in decoder.enter(tokens, 1)] == [1] * SEQUENCES
    cosines = {id(call[1]["position_embeddings"][0]) for batch in batches for call in batch.calls}
    assert len(cosines) == 1  # one table for every block of every batch


# -- weights come and go ---------------------------------------------------------------------------------------------------


def held(decoder: Decoder) -> int:
    """Parameters that are in memory now, tied ones once."""
    return sum(p.numel() for p in {id(p): p for p in decoder.model.parameters()}.values() if p.device.type != "meta")


@pytest.mark.parametrize("family", ["llama-tied", "falcon", "gpt2", "qwen3_moe", "jetmoe"])
def test_never_more_than_one_block_and_the_outer_parts(family, tokens, tmp_path, monkeypatch):
    decoder = Decoder(save_tiny(family, tmp_path))
    assert held(decoder) == 0
    largest = max(decoder.block_parameters(index) for index in range(len(decoder.blocks)))
    peak = 0
    read = decoder.read

    def watched(name: str) -> Tensor:
        nonlocal peak
        value = read(name)
        peak = max(peak, held(decoder) + value.numel())
        return value

    monkeypatch.setattr(decoder, "read", watched)
    streamed_logits(decoder, tokens)
    assert held(decoder) == 0
    assert 0 < peak <= largest + decoder.outer_parameters()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_the_way_in_needs_no_head(family, tokens, tmp_path, monkeypatch):
    decoder = Decoder(save_tiny(family, tmp_path))
    head = decoder.model.get_output_embeddings().weight.numel()
    own = 0 if decoder.tied_names() else head
    with decoder.outer(head=False):
        assert held(decoder) == decoder.outer_parameters(head=False) == decoder.outer_parameters() - own
        with decoder.outer():
            assert decoder.leave(torch.zeros(1, 3, 64), tokens[:1, :3]).shape == (1, 3, decoder.config.vocab_size)
    assert held(decoder) == 0
    read = decoder.read
    monkeypatch.setattr(decoder, "read", lambda name: pytest.fail(name) if name == "lm_head.weight" else read(name))
    assert decoder.enter(tokens, 40)[0].hidden.shape == (2, 20, 64) and held(decoder) == 0


def test_outer_inside_outer_keeps_the_parts(tmp_path):
    decoder = Decoder(save_tiny("llama", tmp_path))
    with decoder.outer():
        with decoder.outer():
            pass
        assert held(decoder) == decoder.outer_parameters()
    assert held(decoder) == 0


def test_a_changed_weight_is_forgotten_with_its_block(tokens, tmp_path):
    decoder = Decoder(save_tiny("llama", tmp_path))
    batch = decoder.enter(tokens, 10**6)[0]
    decoder.load_block(1)
    before = decoder.run_block(1, batch)
    linears = decoder.linears(1)
    name = "model.layers.1.mlp.up_proj"
    set_weight(linears[name], torch.zeros(linear_shape(linears[name])))
    assert not torch.allclose(decoder.run_block(1, batch), before)
    decoder.drop_block(1)
    decoder.load_block(1)
    assert torch.equal(decoder.run_block(1, batch), before)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_are_out_by_in_whatever_way_round_they_are_stored(family, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path))
    decoder.load_block(0)
    for name, module in decoder.linears(0).items():
        weight = decoder.weight(name, module)
        rows, columns = linear_shape(module)
        assert weight.shape == (rows, columns) and weight.dtype == torch.float32 and weight.is_contiguous()
        x = torch.randn(4, columns)
        offset = 0 if module.bias is None else module.bias
        torch.testing.assert_close(module(x), x @ weight.T + offset)
        set_weight(module, 2 * weight)
        torch.testing.assert_close(module(x), 2 * x @ weight.T + offset)


def test_tied_heads(tokens, tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny("llama-tied", tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    table = stored["model.embed_tokens.weight"]
    assert "lm_head.weight" not in stored
    expected = plain_logits(load_plain(tmp_path), tokens)
    tied = {"lm_head.weight": "model.embed_tokens.weight"}

    assert Decoder(tmp_path).tied_names() == tied

    save_file(stored | {"lm_head.weight": table.clone()}, path, {"format": "pt"})  # both, and equal
    decoder = Decoder(tmp_path)
    assert decoder.tied_names() == tied
    assert torch.equal(streamed_logits(decoder, tokens), expected)

    alone = {name: value for name, value in stored.items() if name != "model.embed_tokens.weight"}
    save_file(alone | {"lm_head.weight": table.clone()}, path, {"format": "pt"})  # the other one of the two
    decoder = Decoder(tmp_path)
    assert decoder.tied_names() == {"model.embed_tokens.weight": "lm_head.weight"}
    assert torch.equal(streamed_logits(decoder, tokens), expected)
    assert decoder.outer_parameters() == table.numel() + table.shape[1]

    save_file(stored | {"lm_head.weight": 2 * table}, path, {"format": "pt"})  # both, and different: not tied, whatever config.json says
    decoder = Decoder(tmp_path)
    assert decoder.tied_names() == {}
    found = streamed_logits(decoder, tokens)
    torch.testing.assert_close(found, 2 * expected)
    assert torch.equal(found, plain_logits(load_plain(tmp_path), tokens))


# -- what is there, without reading ----------------------------------------------------------------------------------------


class Unread:
    """A checkpoint whose tensors must not be read."""

    def __init__(self, folder):
        self._files = Checkpoint(folder)
        self.names, self.shape, self.fingerprint = self._files.names, self._files.shape, self._files.fingerprint

    def read(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral", "opt", "falcon"])
def test_shapes_and_counts_need_no_weight(family, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path), tensors=Unread(tmp_path))
    model = load_plain(tmp_path)
    inside = sum(decoder.block_parameters(index) for index in range(len(decoder.blocks)))
    assert inside + decoder.outer_parameters() == model.num_parameters()
    for index in range(len(decoder.blocks)):
        for name, module in decoder.linears(index).items():
            rows, columns = linear_shape(module)
            assert name in decoder.expert_layers or model.get_submodule(name)(torch.zeros(1, columns)).shape == (1, rows)
    assert decoder.all_linears() == [name for index in range(len(decoder.blocks)) for name in decoder.linears(index)]
    assert decoder.max_positions == 128


def test_another_source_of_tensors(tokens, tmp_path):
    class Halved(Checkpoint):
        def read(self, name: str) -> Tensor:
            return super().read(name) / 2 if name.endswith("lm_head.weight") else super().read(name)

    save_tiny("llama", tmp_path)
    plain = streamed_logits(Decoder(tmp_path), tokens)
    assert torch.equal(streamed_logits(Decoder(tmp_path, tensors=Halved(tmp_path)), tokens), plain / 2)


# -- which layers share an input -------------------------------------------------------------------------------------------

SHARED = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gemma2": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "cohere": [
        ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
        ["o_proj"],
        ["down_proj"],
    ],  # attention and MLP side by side
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "falcon": [["query_key_value", "dense_h_to_4h"], ["attention.dense"], ["dense_4h_to_h"]],
    "qwen3_moe": [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        *([f"experts.{i}.{name}" for name in names] for i in range(4) for names in (("gate_proj", "up_proj"), ("down_proj",))),
    ],
}


@pytest.mark.parametrize("family", SHARED)
def test_layers_that_share_an_input(family, tokens, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path))
    last = len(decoder.blocks) - 1
    batch = decoder.enter(tokens[:2], BATCH_TOKENS)[0]
    decoder.load_block(last)
    groups = shared_inputs(lambda: decoder.run_block(last, batch), decoder.linears(last))
    assert len(groups) == len(SHARED[family])
    for group, expected in zip(groups, SHARED[family], strict=True):
        assert sorted(name.rsplit(".", 1)[-1] for name in group) == sorted(name.rsplit(".", 1)[-1] for name in expected)
        assert all(any(name.endswith(suffix) for suffix in expected) for name in group)


# -- mixtures of experts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_what_is_no_single_expert_is_read_as_from_pretrained_reads_it(family, tmp_path):
    """Of experts that are taken apart: see test_experts."""
    decoder = Decoder(save_tiny(family, tmp_path))
    model = load_plain(tmp_path)
    last = len(decoder.blocks) - 1
    apart = tuple(f"{path}." for path in decoder.experts(last))
    for name, expected in model.state_dict().items():
        if name.startswith(decoder.block_name(last)) and not name.startswith(apart):
            assert torch.equal(decoder.read(name), expected), name
    one_by_one = any(re.search(r"\.experts\.\d+\.", name) for name in Checkpoint(tmp_path).names)
    assert one_by_one == (family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek_v3"))


ROUTERS = {
    "mixtral": [],  # a parameter of a module of its own
    "qwen3_moe": [],
    "olmoe": [],
    "phimoe": [],  # a subclass of nn.Linear that does more
    "qwen2_moe": ["mlp.shared_expert_gate"],
    "jetmoe": ["mlp.router.layer", "self_attention.experts.router.layer"],
}


@pytest.mark.parametrize("family", ROUTERS)
def test_routers_are_no_layers_to_quantize(family, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path))
    last = len(decoder.blocks) - 1
    assert decoder.routers(last) == [f"{decoder.block_name(last)}.{name}" for name in ROUTERS[family]]
    assert not any("router" in name or name.endswith(("gate", "experts")) for name in decoder.linears(last))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen2_moe", "gemma4-shared", "lfm2"])
def test_blocks_compute_on_the_device_that_was_asked_for(family, tokens, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    decoder = Decoder(save_tiny(family, tmp_path), device="cuda")
    found = streamed_logits(decoder, tokens)
    assert found.device.type == "cuda" and decoder.weight(decoder.all_linears()[0], decoder.blocks[0]).device.type == "cuda"
    assert close(found.cpu(), plain_logits(load_plain(tmp_path), tokens), tolerance=1e-3)


# -- the real thing, where it is at hand -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_embedded_model_streams_exactly():
    from cloq.models.locate import embedded_folder

    folder = embedded_folder()
    if not (folder / "config.json").is_file():
        pytest.skip("the embedded default model is not in the cache; cloq demo fetches it")
    tokens = torch.randint(0, 40000, (3, 40), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(folder)
    assert decoder.block_parameters(0) * len(decoder.blocks) + decoder.outer_parameters() == 134_515_008
    assert torch.equal(streamed_logits(decoder, tokens), plain_logits(load_plain(folder), tokens))
