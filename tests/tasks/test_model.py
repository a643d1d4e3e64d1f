"""Decoded and packed are one function: base and adapter decoded into a dense model give the logits that the libraries compute."""

import math
import os
from pathlib import Path

import pytest
import torch

from cloq.errors import ExportError, ModelError
from cloq.export.peft import AdapterFolder
from cloq.quantizers import Rtn
from cloq.tasks.model import decoded_model, opened
from cloq.types import LayerStats
from tests.finished import edit_json, edit_tensors, finish, logits, needs
from tests.tiny import load_plain, save_tiny

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # GPTQModel would compile its kernel, for which a C++ compiler is needed


def rtn(name, weight):
    return Rtn(bits=2, group_size=32).quantize(weight, LayerStats(torch.eye(weight.shape[1]), 1))


def of(base: Path, adapter: Path | None, decoded: bool):
    with opened(base, adapter, "cpu", decoded) as model:
        return logits(model.model), model.weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    finished = finish("llama", tmp_path_factory.mktemp("run"), rtn)
    base = finished.export("gptq")
    return finished, base, finished.adapter(base)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_decoded_is_the_dense_reference(run, with_adapter):
    finished, base, adapter = run
    found, weights = of(base, adapter if with_adapter else None, decoded=True)
    torch.testing.assert_close(found, logits(finished.reference(adapter=with_adapter)), atol=1e-5, rtol=1e-5)
    assert weights == "gptq 2-bit decoded to float32"


@needs("gptqmodel", "optimum")
@pytest.mark.parametrize("with_adapter", [False, True])
def test_packed_is_the_same_but_for_the_kernels_rounding(run, with_adapter):
    _, base, adapter = run
    decoded, _ = of(base, adapter if with_adapter else None, decoded=True)
    packed, weights = of(base, adapter if with_adapter else None, decoded=False)
    assert (packed - decoded).norm() <= 2e-3 * decoded.norm() and weights == "packed gptq 2-bit"


def test_a_transposed_weight_is_decoded_the_right_way_round(tmp_path):
    finished = finish("gpt2", tmp_path, rtn)
    base = finished.export("dense", dtype="float32")
    torch.testing.assert_close(of(base, finished.adapter(base), True)[0], logits(finished.reference(adapter=True)), atol=1e-4, rtol=1e-4)


def test_the_model_is_emptied_at_the_end(run):
    with decoded_model(run[1]) as model:
        assert not any(p.is_meta for p in model.parameters())
    assert all(p.is_meta for p in model.parameters())


# -- adapters of others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 12}, {"lora_alpha": 12, "use_rslora": True}, {"alpha_pattern": {"q_proj": 20}}], ids=str
)
def test_any_scaling_is_what_peft_makes_of_it(settings, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = save_tiny("llama", tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings)
    peft = get_peft_model(load_plain(base), config)
    peft.save_pretrained(tmp_path / "adapter")
    for decoded in (True, False):
        found, weights = of(base, tmp_path / "adapter", decoded)
        torch.testing.assert_close(found, logits(peft), atol=1e-4, rtol=1e-4)
        assert weights == ("float32, adapter added" if decoded else "float32, adapter by PEFT")
    rank, alpha = AdapterFolder(tmp_path / "adapter").rank_and_alpha("model.layers.0.self_attn.q_proj")
    assert alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank) != 1


def test_an_adapter_that_does_more_is_left_to_peft(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = save_tiny("llama", tmp_path / "base")
    peft = get_peft_model(load_plain(base), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, use_dora=True))
    peft.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match=r"more than a plain LoRA .*lora_magnitude_vector.*--packed"):
        of(base, tmp_path / "adapter", True)
    torch.testing.assert_close(of(base, tmp_path / "adapter", False)[0], logits(peft), atol=1e-4, rtol=1e-4)


def test_the_adapter_of_another_model_is_refused(run, tmp_path):
    other = save_tiny("gpt2", tmp_path / "other")
    with pytest.raises(ExportError, match=r"do not belong together: it has factors for .*, which is no linear layer of GPT2LMHeadModel"):
        of(other, run[2], True)


def test_every_end_of_text_token_ends_a_text(tmp_path):
    folder = save_tiny("llama", tmp_path)
    edit_json(folder / "generation_config.json", lambda values: values.update(eos_token_id=[0, 7]))
    with opened(folder, None, "cpu", True) as model:
        assert model.end == (0, 7)


def test_pickled_and_damaged_weights_are_refused(tmp_path):
    folder = save_tiny("llama", tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError):
        of(folder, None, True)
    (folder / "model.safetensors").write_bytes(weights)
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"up_proj"):
        of(folder, None, True)
