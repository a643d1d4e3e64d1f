"""The adapter folder: PEFT puts the fitted product on exactly the fitted layers, multiplied by 1."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from cloq.errors import ExportError
from cloq.export import write_adapter, write_one_rank
from cloq.export.peft import AdapterFolder, lora_config
from cloq.quantizers import Rtn
from tests.finished import edit_json, finish, logits
from tests.tiny import load_plain


def rtn(name, weight):
    return Rtn(3, 32).quantize(weight)


def config_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def assert_peft_gives(run, base, adapter) -> None:
    model = PeftModel.from_pretrained(load_plain(base), adapter)
    assert torch.allclose(logits(model), logits(run.reference(adapter=True)), atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(run.reference()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_peft_adds_the_fitted_product(tmp_path, family):
    run = finish(family, tmp_path, rtn)
    base = run.export("dense", dtype="float32")
    assert_peft_gives(run, base, run.adapter(base))


def test_several_ranks(tmp_path):
    """Eleven blocks, so that the name of one is the beginning of another's; PEFT reads the names of other ranks as patterns."""

    def rank(name):
        return 2 if ".1." in name else 7 if name.endswith("down_proj") else 4

    run = finish("llama", tmp_path, rtn, rank=rank, num_hidden_layers=11)
    base = run.export("dense", dtype="float32")
    adapter = run.adapter(base)
    config, source = config_of(adapter), AdapterFolder(adapter)
    assert config["r"] == config["lora_alpha"] == 4 and config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(config["rank_pattern"].values()) == [2] * 7 + [7] * 10
    for name in run.results:
        assert source.rank_and_alpha(name) == (rank(name), rank(name))
    assert_peft_gives(run, base, adapter)


def test_a_scale_changes_the_steps_of_training_and_no_bit_of_the_product(tmp_path):
    run = finish("llama", tmp_path, rtn, rank=lambda name: 2 if "q_proj" in name else 4)
    base = run.export("dense", dtype="float32")
    plain = AdapterFolder(run.adapter(base))
    folder = write_adapter(run.store, str(base.resolve()), run.decoder.all_linears(), tmp_path / "scaled", scale=1 / 16)
    config, scaled = config_of(folder), AdapterFolder(folder)
    assert config["r"] == 4 and config["lora_alpha"] == 0.25 and set(config["alpha_pattern"].values()) == {0.125}
    assert (plain.fitted_scale, scaled.fitted_scale) == (1.0, 1 / 16)
    for name in run.results:
        assert torch.equal(scaled.read(name).A, 4 * plain.read(name).A) and torch.equal(scaled.read(name).B, 4 * plain.read(name).B)
        assert scaled.scale(name) == 1 / 16 and torch.equal(scaled.delta(name), plain.delta(name))
    assert_peft_gives(run, base, folder)


@pytest.mark.parametrize("rank, alpha", [(64, 4), (4, 0.25)])
def test_a_whole_alpha_is_written_as_one(rank, alpha):
    found = lora_config({"layer": rank}, "base", ["layer"], 1 / 16).lora_alpha
    assert found == alpha and type(found) is type(alpha)


@pytest.mark.parametrize("stabilised", [False, True])
def test_one_rank_for_all_layers_is_the_same_adapter(stabilised, tmp_path):
    """Scales that differ from layer to layer go into B, since nothing is left in the configuration to say them."""
    run = finish("llama", tmp_path, rtn, rank=lambda name: 2 if "q_proj" in name else 7 if name.endswith("down_proj") else 4)
    base = run.export("dense", dtype="float32")
    adapter = run.adapter(base)
    edit_json(
        adapter / "adapter_config.json",
        lambda c: c.update(lora_alpha=6, use_rslora=stabilised, alpha_pattern={"model.layers.1.mlp.down_proj": 3}),
    )
    padded = write_one_rank(AdapterFolder(adapter), tmp_path / "padded")
    config, source = config_of(padded), AdapterFolder(padded)
    assert config["r"] == config["lora_alpha"] == 7 and not config["rank_pattern"] and not config["alpha_pattern"] and source.of_one_rank
    for name in run.results:
        assert len(source.read(name).A) == 7
        torch.testing.assert_close(source.delta(name), AdapterFolder(adapter).delta(name))
        torch.testing.assert_close(source.read(name).delta(), source.delta(name))  # what reads the tensors alone
    theirs = PeftModel.from_pretrained(load_plain(base), adapter)
    assert torch.allclose(logits(PeftModel.from_pretrained(load_plain(base), padded)), logits(theirs), atol=1e-4)


def test_one_rank_is_refused_for_more_than_products(tmp_path):
    run = finish("llama", tmp_path, rtn)
    adapter = run.adapter(tmp_path)
    edit_json(adapter / "adapter_config.json", lambda c: c.update(use_dora=True))
    with pytest.raises(ExportError, match="more than a plain LoRA"):
        write_one_rank(AdapterFolder(adapter), tmp_path / "padded")
    assert not (tmp_path / "padded").exists()


def test_one_rank_takes_nobodys_place(tmp_path):
    run = finish("llama", tmp_path, rtn)
    adapter = AdapterFolder(run.adapter(tmp_path))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("years of work")
    for target in (tmp_path / "kept", adapter.folder):
        with pytest.raises(ExportError, match="exists already; choose a new or empty folder"):
            write_one_rank(adapter, target)
    assert (tmp_path / "kept" / "thesis.txt").exists()
    assert write_one_rank(adapter, write_one_rank(adapter, tmp_path / "padded"), own=True)


def test_targets_are_short_where_they_are_not_ambiguous(tmp_path):
    whole = finish("llama", tmp_path / "whole", rtn)
    assert config_of(whole.adapter(tmp_path))["target_modules"] == sorted({name.rsplit(".", 1)[1] for name in whole.results})
    part = finish("llama", tmp_path / "part", lambda name, weight: None if name == "model.layers.1.mlp.up_proj" else rtn(name, weight))
    base = part.export("dense", dtype="float32")
    adapter = part.adapter(base)
    assert config_of(adapter)["target_modules"] == sorted(part.results)
    assert_peft_gives(part, base, adapter)


def test_a_module_outside_the_blocks_makes_names_ambiguous():
    def targets(modules):
        return lora_config({"layers.0.proj": 4, "layers.1.proj": 4}, "base", modules).target_modules

    layers = ["layers.0.proj", "layers.1.proj"]
    assert targets([*layers, "head"]) == {"proj"}
    assert targets([*layers, "vision.proj"]) == set(layers)


def test_the_commonest_rank_is_the_rank_and_ties_go_to_the_larger():
    assert lora_config({"a": 4, "b": 8, "c": 4}, "base", "abc").r == 4
    for ranks in ({"a": 4, "b": 8}, {"a": 8, "b": 4}):
        assert lora_config(ranks, "base", "ab").r == 8


def test_settings_and_bytes(tmp_path):
    run = finish("llama", tmp_path, rtn)
    once, twice = (write_adapter(run.store, "the base", run.decoder.all_linears(), tmp_path / name) for name in ("once", "twice"))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (once / file).read_bytes() == (twice / file).read_bytes()
    config = config_of(once)
    assert config["base_model_name_or_path"] == "the base" and config["init_lora_weights"] is True
    assert (
        not config["use_rslora"]
        and not config["use_dora"]
        and config["bias"] == "none"
        and config["target_modules"] == sorted(config["target_modules"])
    )


def test_factors_are_read_back(tmp_path):
    run = finish("llama", tmp_path, rtn)
    adapter = run.adapter(tmp_path)
    source = AdapterFolder(adapter)
    assert source.names == frozenset(run.results) and source.expected_keys(run.results) == source.keys
    for name, result in run.results.items():
        assert torch.equal(source.read(name).A, result.factors.A) and torch.equal(source.read(name).B, result.factors.B)
    with pytest.raises(ExportError, match=r"lacks base_model\.model\.lm_head\.lora_A\.weight"):
        source.read("lm_head")


def test_targets_are_peft_s(tmp_path):
    run = finish("llama", tmp_path, rtn)
    adapter = run.adapter(tmp_path)
    modules = {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.xup_proj", "lm_head", "up_proj"}
    assert AdapterFolder(adapter).targets(modules) == {"model.layers.0.mlp.up_proj", "up_proj"}
    edit_json(adapter / "adapter_config.json", lambda c: c.update(target_modules=r".*\.0\..*"))
    assert AdapterFolder(adapter).targets(modules) == {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.xup_proj"}


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter_is_refused(tmp_path, file):
    adapter = finish("llama", tmp_path, rtn).adapter(tmp_path)
    for damage in (lambda path: path.write_text("{"), lambda path: path.unlink()):
        damage(adapter / file)
        with pytest.raises(ExportError, match="holds no readable adapter"):
            AdapterFolder(adapter)
