"""config.json: what is no causal language model is refused in one line that says what to do, and no stranger's code runs."""

from __future__ import annotations

import builtins
import json

import pytest
import torch

from cloq.errors import ModelError
from cloq.models import Decoder, load_config, load_tokenizer
from cloq.models.skeleton import build_skeleton
from tests.tiny import save_tiny


@pytest.fixture(autouse=True)
def nobody_to_ask(monkeypatch):
    def asked(*args):
        raise AssertionError("standard input was read")

    monkeypatch.setattr(builtins, "input", asked)


def configured(folder, **values):
    """The folder with a changed config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (config | values).items() if v is not None}))
    return folder


def test_no_config(tmp_path):
    with pytest.raises(ModelError, match="does not describe a model"):
        Decoder(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"hidden_size": 64}'])
def test_config_that_is_none(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json does not describe a model that transformers knows"):
        Decoder(tmp_path)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("num_key_value_heads", {}, "num_key_value_heads.*expected int"),
        ("hidden_size", "../..", "hidden_size.*expected int"),
        ("num_attention_heads", 2**64, "not a multiple"),
        ("hidden_act", "x" * 10_000, "is not a causal language model that transformers can build"),
        ("dtype", 0.5, "is not a causal language model that transformers can build"),
    ],
)
def test_odd_values_of_a_config(setting, value, said, tmp_path):
    with pytest.raises(ModelError, match=said) as caught:
        Decoder(configured(save_tiny("llama", tmp_path), **{setting: value}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_unknown_model_type(tmp_path):
    with pytest.raises(ModelError, match=r"does not describe a model that transformers knows.*nosuchmodel"):
        Decoder(configured(save_tiny("llama", tmp_path), model_type="nosuchmodel"))


@pytest.mark.parametrize("model_type", ["t5", "bart", "whisper", "mbart"])
def test_encoder_decoders(model_type, tmp_path):
    with pytest.raises(ModelError, match=f"{model_type} is an encoder-decoder; cloq takes decoder-only"):
        Decoder(configured(tmp_path, model_type=model_type))


@pytest.mark.parametrize("model_type", ["vit", "distilbert", "clip"])
def test_no_language_model(model_type, tmp_path):
    with pytest.raises(ModelError, match=f"{model_type} is not a causal language model that transformers can build"):
        Decoder(configured(tmp_path, model_type=model_type))


def test_no_linear_layers(tmp_path):
    from transformers import LlamaConfig

    from cloq.models.skeleton import find_blocks

    model = build_skeleton(LlamaConfig(num_hidden_layers=0, hidden_size=64, vocab_size=288), torch.float32)
    with pytest.raises(ModelError, match="no row of blocks that hold linear layers"):
        find_blocks(model)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "compressed-tensors", "fp8"])
def test_quantized_weights_point_to_init(method, tmp_path):
    folder = configured(save_tiny("llama", tmp_path), quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=f"already quantized .{method}.*cloq init --dense ORIGINAL --quantized"):
        Decoder(folder)


def test_quantized_weights_with_a_source_that_decodes_them(tmp_path):
    from cloq.models import Checkpoint

    folder = configured(save_tiny("llama", tmp_path), quantization_config={"quant_method": "gptq", "bits": 4})
    decoder = Decoder(folder, tensors=Checkpoint(folder))
    assert len(decoder.all_linears()) == 21
    assert getattr(decoder.model.config, "quantization_config", None) is None


STRANGER = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM
class StrangeConfig(LlamaConfig):
    model_type = "strange"
class StrangeModel(LlamaForCausalLM):
    config_class = StrangeConfig
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A model with code of its own, and a modules cache that is thrown away."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save_tiny("llama", tmp_path / "strange")
    (folder / "strange.py").write_text(STRANGER)
    own = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.StrangeModel"}
    return configured(folder, model_type="strange", architectures=["StrangeModel"], auto_map=own)


def test_code_of_a_model_does_not_run_unasked(stranger, tmp_path):
    with pytest.raises(ModelError, match=r"brings its own Python code.*--trust-remote-code"):
        Decoder(stranger)
    assert not list(tmp_path.rglob("ran"))


def test_code_of_a_model_runs_when_trusted(stranger, tmp_path):
    decoder = Decoder(stranger, trust_remote_code=True)
    assert type(decoder.model).__name__ == "StrangeModel"
    assert len(decoder.enter(torch.arange(12).view(2, 6), 6)) == 2
    assert list(tmp_path.rglob("ran"))


def test_code_for_a_known_model_is_not_needed(stranger, tmp_path):
    decoder = Decoder(configured(stranger, model_type="llama"))
    assert type(decoder.model).__name__ == "LlamaForCausalLM"
    assert not list(tmp_path.rglob("ran"))


def test_skeleton_has_no_weights_but_real_buffers(tmp_path):
    model = build_skeleton(load_config(save_tiny("llama", tmp_path)), torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(b.device.type == "cpu" and bool(b.isfinite().all()) for b in model.buffers())
    assert not model.training


def test_tokenizer(tmp_path):
    save_tiny("llama", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = "Grüße, 東京!\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_makes_no_tokens(tmp_path):
    save_tiny("llama", tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "long"}))
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("where", ["tokenizer", "../tokenizer", "/tmp/tokenizer", "someone/else--tokenizer"])
def test_code_of_a_tokenizer_does_not_run_unasked(where, tmp_path):
    """Named in its settings, beside it or elsewhere: refused, or left aside for the library's own class."""
    folder = save_tiny("llama", tmp_path / "model")
    for place in (folder, tmp_path):
        (place / "tokenizer.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Odd: pass\n")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": [f"{where}.Odd", f"{where}.Odd"]}}
    path.write_text(json.dumps(settings))
    try:
        assert load_tokenizer(folder)("a").input_ids
    except ModelError as error:
        assert "no usable tokenizer" in str(error)
    assert not (tmp_path / "ran").exists()
