"""Files: read as they are, refused with what is wrong and what to do."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cloq.errors import ModelError
from cloq.models import Checkpoint, Decoder
from cloq.models.checkpoint import check_finite
from tests.tiny import save_tiny

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    save_file({"a": torch.randn(3, 5), "b": torch.arange(7)}, tmp_path / "model.safetensors")
    return tmp_path


def sharded(folder):
    save_tiny("llama", folder, shards=3)
    return folder, sorted(folder.glob("model-*.safetensors"))


def rewrite(folder, change):
    """Applies `change(tensors)` to a single-file checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_names_shapes_and_values(folder):
    files, stored = Checkpoint(folder), load_file(folder / "model.safetensors")
    assert sorted(files.names) == ["a", "b"]
    assert files.shape("a") == (3, 5) and files.shape("b") == (7,)
    assert all(torch.equal(files.read(name), stored[name]) and files.read(name).dtype == stored[name].dtype for name in stored)
    for ask in (files.read, files.shape):
        with pytest.raises(ModelError, match="holds no tensor c"):
            ask("c")


def test_fingerprint_follows_bytes_names_and_shards(folder):
    first = Checkpoint(folder).fingerprint()
    assert Checkpoint(folder).fingerprint() == first
    stored = load_file(folder / "model.safetensors")
    changed = stored | {"a": stored["a"].clone()}
    changed["a"][2, 4] += 1
    seen = {first}
    for tensors in (changed, {"c": stored["a"], "b": stored["b"]}, stored | {"d": torch.zeros(1)}):
        save_file(tensors, folder / "model.safetensors")
        seen.add(Checkpoint(folder).fingerprint())
    assert len(seen) == 4


def test_shards_are_one_checkpoint(tmp_path):
    folder, shards = sharded(tmp_path)
    assert len(shards) >= 3
    assert sorted(Checkpoint(folder).names) == sorted(json.loads((folder / INDEX).read_text())["weight_map"])


def test_missing_shard(tmp_path):
    folder, shards = sharded(tmp_path)
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"shard {shards[1].name} is missing.*fetch the model again"):
        Decoder(folder)


def test_a_shard_that_vanishes_after_opening(tmp_path):
    folder, shards = sharded(tmp_path)
    files = Checkpoint(folder)
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"{shards[1].name} is missing.*fetch the model again"):
        files.fingerprint()
    shards[0].write_bytes(shards[0].read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"{shards[0].name} cannot be read.*truncated or damaged"):
        files.fingerprint()


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_truncated_shard(left, tmp_path):
    folder, shards = sharded(tmp_path)
    shards[1].write_bytes(shards[1].read_bytes()[:left])
    with pytest.raises(ModelError, match=f"{shards[1].name} cannot be read.*truncated or damaged"):
        Decoder(folder)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/tmp/elsewhere.safetensors", "sub/elsewhere.safetensors", 7])
def test_index_may_not_point_outside(name, folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="not a plain file name"):
        Checkpoint(folder)


def test_a_shard_may_be_a_link_into_a_store(folder, tmp_path_factory):
    """The hub's cache is made of such links: the index names a plain file of the folder, wherever the bytes lie."""
    blob = tmp_path_factory.mktemp("blobs") / "3f2a"
    (folder / "model.safetensors").rename(blob)
    (folder / "shard.safetensors").symlink_to(blob)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "shard.safetensors", "b": "shard.safetensors"}}))
    assert sorted(Checkpoint(folder).names) == ["a", "b"]


@pytest.mark.parametrize("name", ["", ".", "a\0b", "x" * 10_000, "x" * 200])
def test_index_names_what_is_no_file(name, folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"not a plain file name|is missing|cannot be read"):
        Checkpoint(folder)


@pytest.mark.parametrize("length", [0, 1, 10**8, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_lies_about_its_length(length, folder):
    path = folder / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    tracemalloc.start()
    with pytest.raises(ModelError, match="cannot be read"):
        Checkpoint(folder)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("offsets", [[0, 2**63], [0, 4], [56, 0], [8, 68], [0, 2**70]])
def test_offsets_that_overlap_or_lead_elsewhere(offsets, folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["a"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(ModelError, match="cannot be read"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_broken_index(text, folder):
    (folder / INDEX).write_text(text)
    with pytest.raises(ModelError, match="not a valid safetensors index"):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused_unread(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(ModelError, match=f"pickled weights .{name}.*convert them to safetensors"):
        Checkpoint(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(ModelError, match=r"no weights: neither model\.safetensors nor"):
        Checkpoint(tmp_path)


# -- what a Decoder refuses about them ------------------------------------------------------------------------------------


def test_missing_tensor(tmp_path):
    rewrite(save_tiny("llama", tmp_path), lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight that LlamaForCausalLM needs"):
        Decoder(tmp_path)


def test_many_missing_tensors_are_counted(tmp_path):
    rewrite(save_tiny("llama", tmp_path), lambda t: [t.pop(name) for name in list(t) if "layers.2" in name])
    with pytest.raises(ModelError, match=r"lacks the tensor model\.layers\.2\.\S+ and 8 more"):
        Decoder(tmp_path)


def test_missing_pair_of_tied_tensors(tmp_path):
    rewrite(save_tiny("llama-tied", tmp_path), lambda t: t.pop("model.embed_tokens.weight"))
    with pytest.raises(ModelError, match=r"lacks the tensor model\.embed_tokens\.weight or lm_head\.weight"):
        Decoder(tmp_path)


def test_missing_expert(tmp_path):
    rewrite(save_tiny("mixtral", tmp_path), lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj .*(cannot be made of|do not belong together)"):
        Decoder(tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wrong_shape(family, tmp_path):
    save_tiny(family, tmp_path)
    name = next(n for n in Checkpoint(tmp_path).names if n.endswith(("mlp.down_proj.weight", "mlp.c_proj.weight")))
    rewrite(tmp_path, lambda t: t.update({name: t[name].T.contiguous()}))
    with pytest.raises(ModelError, match=r"\(\d+, \d+\) in .* but \(\d+, \d+\) by its config\.json"):
        Decoder(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers(value, tmp_path):
    save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    rewrite(tmp_path, lambda t: t["model.layers.1.mlp.up_proj.weight"][3, 2:5].fill_(value))
    decoder = Decoder(tmp_path)
    decoder.load_block(0)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 3 NaN or Inf values of 6144"):
        decoder.load_block(1)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    size=st.integers(0, 40),
    bad=st.dictionaries(st.integers(0, 39), st.sampled_from([float("nan"), float("inf"), float("-inf")]), max_size=3),
)
def test_every_bad_value_is_found_and_counted(dtype, size, bad):
    tensor = torch.randn(size).to(dtype)
    inside = {at: value for at, value in bad.items() if at < size}
    for at, value in inside.items():
        tensor[at] = value
    if inside:
        with pytest.raises(ModelError, match=f"w holds {len(inside)} NaN or Inf values of {size};"):
            check_finite(tensor, "w")
    else:
        assert check_finite(tensor, "w") is tensor


def test_extra_tensors_are_left_alone(tmp_path):
    rewrite(save_tiny("llama", tmp_path), lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}))
    assert "rotary_emb" not in " ".join(Decoder(tmp_path).source_names)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_a_dropped_block_leaves_no_file_mapped(tmp_path):
    """What was read stays mapped as long as the file is open: over a run that would be the whole checkpoint."""
    decoder = Decoder(save_tiny("llama", tmp_path))

    def mapped() -> bool:
        return str(tmp_path / "model.safetensors") in Path("/proc/self/maps").read_text()

    first = decoder.load_block(0).self_attn.q_proj.weight.clone()
    assert mapped()
    decoder.drop_block(0)
    assert not mapped()
    assert torch.equal(decoder.load_block(0).self_attn.q_proj.weight, first)
