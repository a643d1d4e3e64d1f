"""GPTQ folders whose layers have several widths and group sizes: our reader, GPTQModel's own rules, and the model that is loaded."""

from __future__ import annotations

import json

import pytest
import torch

import cloq
from cloq.export.gptq import GptqReader
from cloq.export.read import QuantizedFolder
from cloq.quantizers import Rtn
from cloq.training import resolve
from tests.finished import Finished, edit_json, finish, logits, needs
from tests.tiny import load_plain

pytestmark = needs("gptqmodel", "optimum")


def grid_of(name: str) -> tuple[int, int | None]:
    """Three widths and two group sizes; attention alike but for one layer, in one block."""
    if name.startswith("model.layers.1.mlp"):
        return 4, None
    return (3, 32) if "self_attn" in name and "layers.0.self_attn.o_proj" not in name else (2, 32)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Finished:
    made = finish("llama", tmp_path_factory.mktemp("several"), lambda name, weight: Rtn(*grid_of(name)).quantize(weight))
    made.adapter(made.export("gptq"))
    return made


@pytest.fixture(scope="module")
def config(run) -> dict:
    return json.loads((run.store.out / "model/config.json").read_text())["quantization_config"]


def test_our_reader_decodes_what_was_written(run):
    source = QuantizedFolder(run.store.out / "model")
    assert source.names == frozenset(run.results)
    for name, result in run.results.items():
        assert source.reader.grid(name) == grid_of(name) and source.shape(name) == result.weight.shape
        assert torch.equal(source.weight(name).dequantize(), result.weight.dequantize()), name


def test_gptqmodel_finds_the_same_widths_by_its_own_rules(run, config):
    from gptqmodel.quantization.config import dynamic_get

    for name in run.results:
        found = tuple(dynamic_get(config["dynamic"], name, key, config[key]) for key in ("bits", "group_size"))
        bits, size = grid_of(name)
        assert found == (bits, -1 if size is None else size), name
    assert dynamic_get(config["dynamic"], "model.layers.10.mlp.up_proj", "bits", config["bits"]) == config["bits"]  # no start of a name


def test_servers_find_layers_that_they_hold_as_one(config):
    reader = GptqReader.of(config)
    assert reader.grid("model.layers.0.self_attn.qkv_proj") == reader.grid("model.layers.1.self_attn.qkv_proj") == (3, 32)
    assert reader.grid("model.layers.1.mlp.gate_up_proj") == (4, None) and reader.grid("model.layers.0.mlp.gate_up_proj") == (2, 32)


def test_the_commonest_width_stands_for_all_and_the_others_in_few_patterns(config):
    assert (config["bits"], config["group_size"]) == (3, 32) and len(config["dynamic"]) == 3


def test_the_loaded_model_is_the_dense_reference(run):
    model = cloq.load(run.store.out)
    assert torch.allclose(logits(model), logits(run.reference(adapter=True, precision=torch.float16)), atol=1e-4)
    packed = [m for m in model.modules() if hasattr(m, "qweight")]
    assert {(m.bits, m.group_size) for m in packed} == {(2, 32), (3, 32), (4, 64), (4, 96)}  # GPTQModel counts a channel's inputs


def test_gptqmodel_itself_loads_it(run):
    """In bfloat16, which is what it computes with on a CPU."""
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(run.store.out / "model"), device="cpu", backend=BACKEND.TORCH).model
    expected = logits(run.reference())
    assert (logits(model) - expected).norm() < 0.03 * expected.norm()


def test_it_trains(run):
    model = cloq.load(run.store.out, trainable=True)
    loss = model(input_ids=torch.arange(1, 13)[None], labels=torch.arange(1, 13)[None]).loss
    loss.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(run.results) and all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in trainable)


def test_afterwards_optimum_is_as_it_was_and_knows_one_width(run):
    from optimum.gptq import GPTQQuantizer

    before = GPTQQuantizer._replace_by_quant_layers
    cloq.load(run.store.out)
    assert GPTQQuantizer._replace_by_quant_layers is before
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load_plain(run.store.out / "model")


def test_what_a_base_of_one_width_says_is_what_it_said(tmp_path):
    made = finish("llama", tmp_path, lambda name, weight: Rtn(3, 32).quantize(weight))
    assert "dynamic" not in json.loads((made.export("gptq") / "config.json").read_text())["quantization_config"]


def test_a_pattern_that_leaves_something_out_keeps_what_the_folder_says_of_the_rest(tmp_path):
    made = finish("llama", tmp_path, lambda name, weight: Rtn(3, 32).quantize(weight))
    folder = made.export("gptq")
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(dynamic={".*mlp.*": {"sym": False}, ".*": {"bits": 2}}))
    reader = QuantizedFolder(folder).reader
    assert reader.grid("model.layers.0.mlp.up_proj") == (3, 32) and reader.grid("model.layers.0.self_attn.q_proj") == (2, 32)
    with pytest.raises(cloq.errors.ExportError, match="the tensors disagree"):
        QuantizedFolder(folder).weight("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(("form", "lowest"), [("gptq", 2), ("compressed-tensors", 2), ("dense", None)])
def test_a_recipe_is_that_of_the_lowest_width(tmp_path, form, lowest):
    made = finish("llama", tmp_path, lambda name, weight: Rtn(2 if "v_proj" in name else 3, 32).quantize(weight))
    base = made.export(form)
    assert resolve(made.store.out, None, {"base": str(base), "data": "a.txt", "recipe": "gsm8k"}).recipe == f"gsm8k-{lowest or 4}bit"
