"""An exported folder streams as the dense model with the decoded weights, whatever its format; what cannot be read exactly is refused."""

from __future__ import annotations

import re

import pytest
import torch

from cloq.errors import ExportError, ModelError
from cloq.export.format import check_pattern
from cloq.export.read import QuantizedFolder
from cloq.quantizers import Gptq, Nf4, Rtn
from cloq.types import LayerStats
from tests.finished import edit_json, edit_tensors, finish, logits, streamed_logits
from tests.tiny import load_plain, save_tiny


def rtn(bits: int, group_size: int | None = 32, **settings):
    return lambda name, weight: Rtn(bits, group_size, **settings).quantize(weight)


def permuted(name, weight):
    inputs = torch.randn(200, weight.shape[1], generator=torch.Generator().manual_seed(1)) * torch.rand(weight.shape[1])
    return Gptq(2, 32, act_order=True).quantize(weight, LayerStats(inputs.T @ inputs, 200))


CASES = [
    ("llama", "gptq", rtn(2, 64)),  # 64 does not divide 96
    ("llama", "gptq", permuted),
    ("llama", "gptq", lambda name, weight: None if name.endswith("v_proj") else Rtn(3, None).quantize(weight)),
    ("llama-tied", "container", rtn(3)),
    ("phi3", "compressed-tensors", rtn(8)),
    ("llama", "compressed-tensors", lambda name, weight: Rtn(2 if "mlp" in name else 4, 32).quantize(weight)),
    ("llama", "nf4", lambda name, weight: Nf4().quantize(weight)),
    ("gpt2", "nf4", lambda name, weight: Nf4().quantize(weight)),
    ("mixtral", "gptq", rtn(2)),
]


@pytest.mark.parametrize(("family", "form", "quantize"), CASES, ids=[f"{family}-{form}-{i}" for i, (family, form, _) in enumerate(CASES)])
def test_an_exported_folder_streams_as_the_dense_reference(tmp_path, family, form, quantize):
    run = finish(family, tmp_path, quantize, **({"intermediate_size": 128} if (family, form) == ("llama", "nf4") else {}))
    source = QuantizedFolder(run.export(form))
    assert source.names == frozenset(run.results)
    for name, result in run.results.items():
        assert source.shape(name) == result.weight.shape
        assert torch.equal(source.weight(name).dequantize(), result.weight.dequantize()), name
    assert torch.allclose(streamed_logits(source.decoder()), logits(run.reference()), atol=1e-4)


def test_a_dense_export_and_a_plain_folder_have_no_quantized_layers(tmp_path):
    run = finish("gpt2", tmp_path, rtn(3))
    source = QuantizedFolder(run.export("dense", dtype="float32"))
    assert not source.names
    assert torch.equal(streamed_logits(source.decoder()), logits(run.reference()))
    assert not QuantizedFolder(run.decoder.folder).names


def test_the_fingerprint_is_of_tensors_and_of_how_they_are_read(tmp_path):
    run = finish("llama", tmp_path, rtn(2))
    folder = run.export("gptq")
    first = QuantizedFolder(folder).fingerprint()
    assert QuantizedFolder(folder).fingerprint() == first == QuantizedFolder(folder).decoder().checkpoint.fingerprint()
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(checkpoint_format="gptq"))
    assert QuantizedFolder(folder).fingerprint() != first


MIXED = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}
UNREADABLE = [
    ({"quant_method": "awq", "bits": 4}, "quantized with 'awq'; read are gptq, bitsandbytes, compressed-tensors"),
    ({"quant_method": "gptq", "bits": 5}, "has 5 bits in the format 'gptq'"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "in the format 'marlin'"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}}, "several widths (dynamic) in the old format"),
    (MIXED | {"dynamic": {"+:.*down.*": {"bits": 5}}}, "has 5 bits for the modules '+:.*down.*'"),
    (MIXED | {"dynamic": {".*down.*": {"bits": 8, "adapter": {}}}}, "sets adapter for the modules '.*down.*'"),
    (MIXED | {"dynamic": {"*down": {"bits": 8}}}, "is no regular expression"),
    (MIXED | {"dynamic": {"(a+)+$": {"bits": 8}}}, "repeats more than names of layers need"),
    (MIXED | {"dynamic": {".*a.*b.*c.*d.*e": {"bits": 8}}}, "repeats more than names of layers need"),
    (MIXED | {"dynamic": {".*down": {"group_size": 0}}}, "group_size is a number of columns or -1"),
    (MIXED | {"dynamic": [".*down"]}, "is not one of gptq"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "this bitsandbytes base is LLM.int8(); nf4 is what can be read"),
    ({"load_in_4bit": True}, "this bitsandbytes base is 4-bit fp4"),
    ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "has the format 'float-quantized'"),
]


@pytest.mark.parametrize(("settings", "message"), UNREADABLE)
def test_what_cannot_be_read_exactly_is_refused(tmp_path, settings, message):
    folder = save_tiny("llama", tmp_path, num_hidden_layers=1)
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=settings))
    with pytest.raises(ExportError, match=re.escape(message)):
        QuantizedFolder(folder)


@pytest.mark.parametrize(
    "pattern",
    [r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj$", r".*\.(?:18|19)\..*gate.*", r"(?!.*lm_head).*", r"[+*{]+a\*\+\{x{2}", "(a)?c"],
)
def test_patterns_of_names_are_taken(pattern):
    check_pattern(pattern, "a file")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)*b", "(a*){9}", ".*.*.*.*.*x", "a{1,9}b{1,9}c{1,9}d*e+"])
def test_patterns_that_could_take_for_ever_are_refused(pattern):
    with pytest.raises(ExportError, match="could take for ever"):
        check_pattern(pattern, "a file")


WEIGHTS = {"num_bits": 4, "strategy": "group", "group_size": 32}
UNREADABLE_GROUPS = [
    ({"weights": WEIGHTS | {"num_bits": 5}}, "has 5 bits (int) per group"),
    ({"weights": WEIGHTS | {"type": "float"}}, "has 4 bits (float) per group"),
    ({"weights": {"num_bits": 8}}, "has 8 bits (int) per tensor"),
    ({"weights": WEIGHTS, "input_activations": {"num_bits": 8}}, "quantizes activations too"),
]


@pytest.mark.parametrize(("group", "message"), UNREADABLE_GROUPS)
def test_config_groups_that_cannot_be_read_are_refused(tmp_path, group, message):
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"]} | group},
    }
    folder = save_tiny("llama", tmp_path, num_hidden_layers=1)
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=settings))
    with pytest.raises(ExportError, match=re.escape(message)):
        QuantizedFolder(folder)


LAYER = "model.layers.1.mlp.up_proj"
DAMAGES = [
    ("gptq", lambda t: t.pop(f"{LAYER}.scales"), f"{LAYER} has g_idx, qweight, qzeros but no scales"),
    ("gptq", lambda t: t[f"{LAYER}.g_idx"].fill_(99), "names groups outside of 0…1"),
    ("gptq", lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"][:2]}), "config.json and the tensors disagree"),
    ("compressed-tensors", lambda t: t.pop(f"{LAYER}.weight_zero_point"), "but no weight_zero_point"),
    ("compressed-tensors", lambda t: t.update({f"{LAYER}.weight_g_idx": torch.zeros(64)}), "which compressed-tensors no longer reads"),
    (
        "compressed-tensors",
        lambda t: t.update({f"{LAYER}.weight_packed": torch.zeros(96, 7, dtype=torch.int32)}),
        "old version of the library",
    ),
]


@pytest.mark.parametrize(("form", "damage", "message"), DAMAGES)
def test_damaged_layers_are_refused(tmp_path, form, damage, message):
    folder = finish("llama", tmp_path, rtn(3)).export(form)
    edit_tensors(folder / "model.safetensors", damage)
    with pytest.raises(ExportError, match=re.escape(message)):
        QuantizedFolder(folder).weight(LAYER)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t[f"{LAYER}.weight.quant_map"].mul_(0.9), "is not the NF4 codebook"),
        (lambda t: t.update({f"{LAYER}.weight.absmax": t[f"{LAYER}.weight.absmax"][1:]}), "it is damaged"),
    ],
)
def test_damaged_nf4_layers_are_refused(tmp_path, damage, message):
    folder = finish("llama", tmp_path, lambda name, weight: Nf4().quantize(weight), intermediate_size=128).export("nf4")
    edit_tensors(folder / "model.safetensors", damage)
    with pytest.raises(ExportError, match=re.escape(message)):
        QuantizedFolder(folder).weight(LAYER)


def test_names_and_folders_that_are_not_there(tmp_path):
    run = finish("llama", tmp_path, rtn(2))
    source = QuantizedFolder(run.export("gptq"))
    with pytest.raises(ExportError, match="has no quantized layer lm_head"):
        source.weight("lm_head")
    with pytest.raises(ExportError, match=re.escape("has no config.json; it is not a model folder")):
        QuantizedFolder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ExportError, match="is not a JSON object"):
        QuantizedFolder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no weights"):
        QuantizedFolder(tmp_path)


def test_plain_transformers_names_what_our_reader_names(tmp_path):
    """Layers that are dense inside the blocks, and the head, are told apart by the configuration, not only by what is stored."""
    run = finish("llama", tmp_path, lambda name, weight: Rtn(2, 32).quantize(weight) if "self_attn" in name else None)
    for form in ("gptq", "container", "compressed-tensors"):
        source = QuantizedFolder(run.export(form))
        assert source.reader.layers(load_plain(run.decoder.folder)) == source.names == set(run.results)
