"""`cloq check` finds every way in which a run's files can be wrong, says what to do, and needs none of the libraries that load them."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from cloq.quantizers import Nf4, Rtn
from cloq.use.check import Finding, check, check_base
from tests.finished import edit_json, edit_tensors, finish

LAYER = "model.layers.1.mlp.up_proj"
KEY = f"base_model.model.{LAYER}"


def rtn(name, weight):
    return Rtn(2, 32).quantize(weight)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = finish("llama", tmp_path_factory.mktemp("made"), rtn)
    run.adapter(run.export("gptq"))
    return run.store.out


@pytest.fixture
def out(made, tmp_path):
    """A copy to damage. The adapter names its base by path, so it is told the new one."""
    copy = shutil.copytree(made, tmp_path / "out")
    edit_json(copy / "adapter/adapter_config.json", lambda c: c.update(base_model_name_or_path=str((copy / "model").resolve())))
    return copy


def failed(out) -> list[str]:
    return [finding.what for finding in check(out) if not finding.ok]


def test_a_run_as_it_was_written_is_in_order(made):
    findings = check(made)
    assert all(isinstance(finding, Finding) for finding in findings) and len(findings) >= 15
    assert failed(made) == []


@pytest.mark.parametrize("form", ["container", "compressed-tensors", "dense", "nf4"])
def test_every_format_is_in_order_as_the_base_and_beside_it(tmp_path, form):
    run = finish("llama", tmp_path, lambda n, w: Nf4().quantize(w) if form == "nf4" else rtn(n, w), intermediate_size=128)
    run.adapter(run.export(form))
    if form != "nf4":
        run.export("gptq")
    assert failed(run.store.out) == []
    beside = {finding.what.split(":")[0] for finding in check(run.store.out)}
    assert beside == {"model", "adapter", "stored blocks"} | ({"model-gptq"} if form != "nf4" else set())


def weights(change):
    return lambda out: edit_tensors(out / "model/model.safetensors", change)


def factors(change):
    return lambda out: edit_tensors(out / "adapter/adapter_model.safetensors", change)


def config(change):
    return lambda out: edit_json(out / "model/config.json", change)


def settings(**values):
    return lambda out: edit_json(out / "adapter/adapter_config.json", lambda c: c.update(values))


def quantization(**values):
    return config(lambda c: c["quantization_config"].update(values))


def version_1(out):
    config(lambda c: c["quantization_config"].update(checkpoint_format="gptq"))(out)


DAMAGES = [
    # the base
    (lambda out: (out / "model/config.json").unlink(), "has no config.json"),
    (lambda out: (out / "model/model.safetensors").unlink(), "has no weights"),
    (
        lambda out: (out / "model/model.safetensors").write_bytes((out / "model/model.safetensors").read_bytes()[:9999]),
        "truncated or damaged",
    ),
    (weights(lambda t: t.pop("model.norm.weight")), "lacks the tensor model.norm.weight"),
    (weights(lambda t: t.pop(f"{LAYER}.qweight")), f"lacks the tensor {LAYER}.weight"),
    (weights(lambda t: t.pop(f"{LAYER}.qzeros")), f"{LAYER}.qzeros is missing"),
    (weights(lambda t: t.pop(f"{LAYER}.g_idx")), f"{LAYER}.g_idx is missing"),
    (weights(lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"][:1]})), f"{LAYER}.scales is F16 [1, 96]"),
    (weights(lambda t: t.update({f"{LAYER}.qzeros": t[f"{LAYER}.qzeros"].long()})), f"{LAYER}.qzeros is I64"),
    (weights(lambda t: t.update(stranger=torch.zeros(3))), "stranger: not part of the model"),
    (weights(lambda t: t[f"{LAYER}.scales"].fill_(float("inf"))), f"all scales are finite: NO: {LAYER}"),
    (weights(lambda t: [t[key].add_(1) for key in t if key.endswith("qweight")]), "decode to what was fitted, bit by bit: NO"),
    (config(lambda c: c.update(intermediate_size=128)), "down_proj.weight is (64, 96) in"),
    (config(lambda c: c.pop("quantization_config")), "lacks the tensor"),
    (quantization(bits=4), "in the shape and dtype of its format: NO"),
    (quantization(group_size=64), "in the shape and dtype of its format: NO"),
    (quantization(modules_in_block_to_quantize=[["self_attn.q_proj"]]), "are the ones with codes: NO"),
    (quantization(sym=True), "have other zero points, which servers ignore"),
    (version_1, "a v2 base was probably loaded and saved again"),
    # the adapter
    (lambda out: shutil.rmtree(out / "adapter"), "holds no readable adapter"),
    (factors(lambda t: t.pop(f"{KEY}.lora_A.weight")), f"will put some on: NO: {KEY}.lora_A.weight: missing"),
    (factors(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)})), "lm_head.lora_A.weight: not used"),
    (factors(lambda t: t.update({f"{KEY}.lora_A.weight": t[f"{KEY}.lora_A.weight"][:, 1:]})), f"{LAYER} (96, 64) has A (4, 63)"),
    (factors(lambda t: t[f"{KEY}.lora_B.weight"].fill_(float("nan"))), f"{LAYER} holds NaN or Inf"),
    (factors(lambda t: [t[k].zero_() for k in t if "lora_B" in k]), "have a B of zeros, as get_peft_model leaves it"),
    (factors(lambda t: [t[k].mul_(1.5) for k in t if "lora_B" in k]), "differ from the run's: trained since"),
    (settings(lora_alpha=8), "is multiplied by alpha / r = 8 / 4"),
    (settings(alpha_pattern={"up_proj": 2}), f"{LAYER} is multiplied by alpha / r = 2 / 4"),
    (settings(r=8, lora_alpha=8), "for rank 8"),
    (settings(use_rslora=True), "use_rslora is True"),
    (settings(use_dora=True), "use_dora is True"),
    (settings(init_lora_weights="pissa"), "init_lora_weights is 'pissa', not True"),
    (settings(bias="all"), "bias is 'all', not 'none'"),
    (settings(modules_to_save=["lm_head"]), "modules_to_save is ['lm_head']"),
    (settings(target_modules=["q_proj"]), "not used"),
    (settings(base_model_name_or_path="somewhere/else"), "says that it belongs to somewhere/else, which is not"),
]


@pytest.mark.parametrize(("damage", "phrase"), DAMAGES, ids=[phrase[:40] for _, phrase in DAMAGES])
def test_damage_is_found_and_named(out, damage, phrase):
    damage(out)
    found = failed(out)
    assert any(phrase in what for what in found), found


def test_an_adapter_of_another_run_is_found(out, tmp_path):
    """Factors for fewer layers than are quantized."""
    part = finish("llama", tmp_path / "part", lambda name, weight: rtn(name, weight) if "mlp" in name else None)
    shutil.rmtree(out / "adapter")
    shutil.copytree(part.adapter(out / "model"), out / "adapter")
    assert any("factors for every quantized layer: NO: model.layers.0.self_attn" in what for what in failed(out))


def test_zeros_are_in_order_where_the_run_asked_for_them(out):
    edit_tensors(out / "adapter/adapter_model.safetensors", lambda t: [t[key].zero_() for key in t if "lora_B" in key])
    edit_json(out / ".cloq/manifest.json", lambda c: c["settings"]["lora"].update(init="zero"))
    assert not any("B of zeros" in what for what in failed(out))


def test_without_stored_blocks_the_rest_is_still_checked(out):
    shutil.rmtree(out / ".cloq")
    assert failed(out) == [] and any("no stored blocks" in finding.what for finding in check(out))
    settings(lora_alpha=8)(out)
    assert any("alpha / r" in what for what in failed(out))


def test_a_broken_export_beside_the_base_is_found(made, out):
    shutil.copytree(out / "model", out / "model-container")
    edit_tensors(out / "model-container/model.safetensors", lambda t: t.pop(f"{LAYER}.scales"))
    assert all(what.startswith("model-container:") for what in failed(out)) and len(failed(out)) == 1


def test_a_damaged_base_does_not_hide_a_damaged_adapter(out):
    weights(lambda t: t.pop("model.norm.weight"))(out)
    settings(use_dora=True)(out)
    assert any("model.norm" in what for what in failed(out)) and any("use_dora" in what for what in failed(out))


def test_the_loading_libraries_are_not_needed(made):
    code = f"""
import sys
for name in ("gptqmodel", "optimum", "bitsandbytes", "compressed_tensors"):
    sys.modules[name] = None
from cloq.use.check import check
sys.exit(sum(not finding.ok for finding in check({str(made)!r})))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_base_alone(made, tmp_path):
    assert all(finding.ok for finding in check_base(made / "model"))
    [finding] = check_base(tmp_path)
    assert not finding.ok and "has no config.json" in finding.what


def test_a_stored_block_is_looked_at_byte_by_byte(out):
    path = out / ".cloq/blocks/00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert any("00001.safetensors is damaged or missing (its checksum does not match" in what for what in failed(out))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("model/config.json", lambda c: c["quantization_config"].update(group_size=[])),
        ("model/config.json", lambda c: c["quantization_config"].update(block_name_to_quantize=[[]])),
        ("model/config.json", lambda c: c["quantization_config"].update(modules_in_block_to_quantize=[3])),
        ("model/config.json", lambda c: c["quantization_config"].update(quant_method=["gptq"])),
        ("model/config.json", lambda c: c.update(quantization_config="gptq")),
        ("adapter/adapter_config.json", lambda c: c.update(layers_to_transform=0.5)),
        ("adapter/adapter_config.json", lambda c: c.update(target_modules="[")),
        (".cloq/manifest.json", lambda c: c.pop("settings")),
    ],
)
def test_odd_settings_are_findings_and_nothing_falls_over(part, change, out):
    edit_json(out / part, change)
    found = failed(out)
    assert found and all("\n" not in what for what in found)
