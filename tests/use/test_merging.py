"""`cloq merge`: one dense model that computes what PEFT computes with base and adapter, from their folders alone."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import cloq
from cloq.cli import main
from cloq.errors import ExportError, RunError
from cloq.export import folder
from cloq.quantizers import Nf4, Rtn
from cloq.use import merging
from tests.finished import Finished, edit_json, edit_tensors, finish, logits, needs
from tests.quantizers.test_regrid import nearest_by_trial
from tests.tiny import load_plain, save_tiny

UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Half a unit in the last place of 8 and 11 significant bits, relative to the value."""


def rtn(name, weight):
    return Rtn(2, 32).quantize(weight)


def run_of(root: Path, form: str = "dense", family: str = "llama", quantize=rtn, config=None, **settings) -> Finished:
    run = finish(family, root, quantize, **(config or {}))
    run.adapter(run.export(form, **settings))
    return run


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Finished:
    return run_of(tmp_path_factory.mktemp("packed"), "gptq")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Finished:
    """On a dense base in float32, which any PEFT adapter can be put on."""
    return run_of(tmp_path_factory.mktemp("plain"), dtype="float32")


def by_peft(base: Path, adapter: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(load_plain(base), adapter)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm()


# -- the same function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "phi3", "opt"])
def test_a_dense_base(tmp_path, family):
    """Conv1D is stored the other way round; the head of the first is tied. Experts: see test_mixtures."""
    run = run_of(tmp_path, family=family, dtype="float32")
    out = run.store.out
    merged = cloq.merge(out, tmp_path / "merged", dtype="float32")
    expected = logits(by_peft(out / "model", out / "adapter"))
    assert_close(logits(load_plain(merged.target)), expected, 1e-5)
    assert tensors_of(merged.target).keys() == tensors_of(out / "model").keys() and set(merged.layers) == set(run.results)


@needs("gptqmodel", "optimum")
def test_a_gptq_base(packed, tmp_path):
    """The sums are exact; the packed kernel itself multiplies in float16, a relative 2^-11 of every weight."""
    merged = cloq.merge(packed.store.out, tmp_path / "merged", dtype="float32")
    tensors = tensors_of(merged.target)
    for name, result in packed.results.items():
        assert torch.equal(tensors[f"{name}.weight"], result.effective_weight())
    found, reference = logits(load_plain(merged.target)), logits(packed.reference(adapter=True))
    assert_close(found, reference, 1e-5)
    assert_close(found, logits(by_peft(packed.store.out / "model", packed.store.out / "adapter")), 2e-3)


@needs("bitsandbytes")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_nf4_base(tmp_path, family):
    """While training, bitsandbytes multiplies exactly on a CPU too; GPT-2 has dropout there, which is switched off."""
    config = {"intermediate_size": 128} if family == "llama" else dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    out = run_of(tmp_path, "nf4", family, lambda name, weight: Nf4().quantize(weight), config).store.out
    merged = cloq.merge(out, tmp_path / "merged", dtype="float32")
    assert_close(logits(load_plain(merged.target)), logits(by_peft(out / "model", out / "adapter").train()), 1e-5)


@needs("compressed_tensors")
def test_a_compressed_tensors_base(tmp_path):
    """Decoded by the library to the float16 of its scales."""
    out = run_of(tmp_path, "compressed-tensors").store.out
    merged = cloq.merge(out, tmp_path / "merged", dtype="float32")
    assert_close(logits(load_plain(merged.target)), logits(by_peft(out / "model", out / "adapter")), 2e-3)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_it_is_rounded_once_and_says_how_much(packed, tmp_path, dtype):
    merged = cloq.merge(packed.store.out, tmp_path / "merged", dtype=dtype)
    tensors, precision = tensors_of(merged.target), getattr(torch, dtype)
    assert {tensor.dtype for tensor in tensors.values()} == {precision}
    assert json.loads((merged.target / "config.json").read_text())["dtype"] == dtype
    for name, result in packed.results.items():
        exact, found = result.effective_weight(), tensors[f"{name}.weight"]
        assert torch.equal(found, exact.to(precision))
        said = merged.layers[name]
        assert said.rounding == pytest.approx(float((found.float() - exact).norm() / exact.norm()), rel=1e-5)
        assert 0 < said.rounding <= UNIT_ROUNDOFF[dtype] and said.trained is None
        assert said.adapter == pytest.approx(float(result.factors.delta().norm() / exact.norm()), rel=1e-5)
    reference = packed.reference(adapter=True)
    for parameter in reference.parameters():
        parameter.data = parameter.to(precision).float()
    assert_close(logits(load_plain(merged.target)), logits(reference), 1e-5)


# -- adapters made elsewhere -------------------------------------------------------------------------------------------


def trained_elsewhere(base: Path, target: Path, **settings) -> Path:
    """As PEFT saves it, with random factors in place of the zeros."""
    model = get_peft_model(load_plain(base), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6} | settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"1.*q_proj": 5}},
        {"target_modules": ["v_proj", "o_proj"], "layers_to_transform": [1]},
        {"target_modules": ["v_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.o_proj"]},
        {"target_modules": r".*\.1\.mlp\..*_proj"},
        {"target_modules": ["lm_head"]},
    ],
    ids=str,
)  # fmt: skip
def test_any_plain_lora_is_merged_as_peft_applies_it(plain, tmp_path, settings):
    base = plain.store.out / "model"
    adapter = trained_elsewhere(base, tmp_path / "adapter", **settings)
    merged = cloq.merge(plain.store.out, tmp_path / "merged", adapter=adapter, dtype="float32")
    expected = logits(by_peft(base, adapter))
    assert_close(logits(load_plain(merged.target)), expected, 1e-5)
    assert (expected - logits(load_plain(base))).norm() > 1e-2 * expected.norm()
    before, after = tensors_of(base), tensors_of(merged.target)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {f"{name}.weight" for name in merged.layers}


def test_what_training_changed_stands_beside_the_rounding(plain, tmp_path):
    out = plain.store.out
    trained = shutil.copytree(out / "adapter", tmp_path / "trained")
    edit_tensors(trained / "adapter_model.safetensors", lambda t: t.update({n: v * 1.0001 for n, v in t.items() if "lora_B" in n}))
    merged = cloq.merge(out, tmp_path / "merged", adapter=trained)
    for name, layer in merged.layers.items():
        exact = plain.results[name].factors.delta()
        assert layer.trained == pytest.approx(1e-4 * layer.adapter, rel=0.02) and exact.any()
    assert "--dtype float16 or float32 keeps more of it" in merged.lines()[-1]
    assert "keeps more" not in "".join(cloq.merge(out, tmp_path / "exact", adapter=trained, dtype="float32").lines())


# -- where base and adapter are ----------------------------------------------------------------------------------------


def test_the_stored_blocks_are_not_needed_and_a_run_may_have_moved(tmp_path):
    run = run_of(tmp_path, dtype="float32")
    shutil.rmtree(run.store.folder)
    moved = shutil.move(run.store.out, tmp_path / "moved")
    merged = cloq.merge(moved, tmp_path / "merged", dtype="float32")
    assert_close(logits(load_plain(merged.target)), logits(run.reference(adapter=True)), 1e-5)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (merged.target / file).read_bytes() == (moved / "model" / file).read_bytes()
    assert json.loads((merged.target / "config.json").read_text()) == json.loads((moved / "model/config.json").read_text())


def test_a_copied_run(packed, tmp_path):
    """Its adapter names the original's base, which is still there, and equal; one changed byte makes it another base."""
    copy = shutil.copytree(packed.store.out, tmp_path / "copy")
    assert cloq.merge(copy, tmp_path / "merged", dtype="float32").base == copy / "model"
    edit_tensors(copy / "model/model.safetensors", lambda t: t["model.layers.0.mlp.up_proj.scales"].mul_(2))
    with pytest.raises(ExportError, match=r"says that it belongs to .*, not to .*copy/model"):
        cloq.merge(copy, tmp_path / "again")


def test_a_base_that_someone_else_quantized(packed, tmp_path):
    """As after `cloq init`: the run has an adapter, which names its base, and no base of its own."""
    shutil.copytree(packed.store.out / "adapter", tmp_path / "out/adapter")
    theirs = shutil.copytree(packed.store.out / "model", tmp_path / "theirs")
    edit_json(tmp_path / "out/adapter/adapter_config.json", lambda c: c.update(base_model_name_or_path=str(theirs)))
    merged = cloq.merge(tmp_path / "out", tmp_path / "merged", dtype="float32")
    assert merged.base == theirs
    assert_close(logits(load_plain(merged.target)), logits(packed.reference(adapter=True)), 1e-5)


def test_layers_that_are_quantized_and_have_no_factors_are_decoded(packed, tmp_path):
    adapter = trained_elsewhere(
        save_tiny("llama", tmp_path / "same shapes", num_hidden_layers=2), tmp_path / "adapter", target_modules=["q_proj"]
    )
    merged = cloq.merge(packed.store.out, tmp_path / "merged", adapter=adapter, base=packed.store.out / "model", dtype="float32")
    tensors = tensors_of(merged.target)
    for name, result in packed.results.items():
        assert torch.equal(tensors[f"{name}.weight"], result.weight.dequantize()) == (not name.endswith("q_proj"))


# -- memory and disk ---------------------------------------------------------------------------------------------------


def test_no_more_than_a_shard_is_in_memory(packed, tmp_path, monkeypatch):
    """Every merged tensor that was handed over is dead once its shard is written."""
    monkeypatch.setattr(folder, "SHARD_BYTES", 60_000)
    alive: list[weakref.ref] = []
    most = 0
    narrowed = merging.narrowed

    def watched(value, dtype, name):
        nonlocal most
        held = sum(tensor.nbytes for ref in alive if (tensor := ref()) is not None)
        most = max(most, held)
        result = narrowed(value, dtype, name)
        alive.append(weakref.ref(result))
        return result

    monkeypatch.setattr(merging, "narrowed", watched)
    merged = cloq.merge(packed.store.out, tmp_path / "merged", dtype="float32")
    largest = max(tensor.nbytes for tensor in tensors_of(merged.target).values())
    assert len(alive) == 14 and 0 < most <= 60_000 + largest < sum(r.weight.codes.numel() * 4 for r in packed.results.values()) / 2
    assert len(list(merged.target.glob("model-*.safetensors"))) > 4
    monkeypatch.undo()
    whole = cloq.merge(packed.store.out, tmp_path / "whole", dtype="float32")
    assert torch.equal(logits(load_plain(merged.target)), logits(load_plain(whole.target)))


def test_an_interrupted_merge_leaves_nothing(packed, tmp_path):
    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cloq.merge(packed.store.out, tmp_path / "merged", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "quantizer"), [("gptq", Rtn(2, 32)), ("gptq", Rtn(3, None, symmetric=True)), ("nf4", Nf4())], ids=str)
def test_merging_into_a_packed_base_is_refused_with_its_price(tmp_path, form, quantizer):
    """The price is that of the nearest point of every value's own grid, found here by trying all of them."""
    config = {"intermediate_size": 128} if form == "nf4" else None
    run = run_of(tmp_path, form, quantize=lambda name, weight: quantizer.quantize(weight), config=config)
    losses = []
    for result in run.results.values():
        exact = result.effective_weight()
        losses.append(float((nearest_by_trial(result.weight, exact) - exact).norm() / exact.norm()))
    price = f"would change the weights by {sum(losses) / len(losses):.1%} "
    for attempt in ({"dtype": "packed"}, {"dtype": form}, {"to": run.store.out / "model"}):
        with pytest.raises(ExportError, match=f"its grid does not hold|whose grid does not hold.*{price}.*cloq quantize"):
            cloq.merge(run.store.out, **{"to": tmp_path / "merged"} | attempt)
    assert not (tmp_path / "merged").exists()


def test_a_dense_base_has_nothing_packed(plain, tmp_path):
    with pytest.raises(ExportError, match="is not quantized, so there is nothing packed to merge into"):
        cloq.merge(plain.store.out, tmp_path / "merged", dtype="packed")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "more than a plain LoRA of linear layers \\(use_dora is True\\).*merge_and_unload"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is \\['lm_head'\\]"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"target_modules": ["q_proj"]}, "factors for .* that PEFT leaves aside"),
        ({"target_modules": None}, "factors for .* that PEFT leaves aside"),
        ({"r": 2, "lora_alpha": 2}, r"mlp.down_proj \(64, 96\) has A \(4, 96\) and B \(64, 4\) for rank 2"),
    ],
    ids=str,
)
def test_settings_that_mean_more_or_other_than_the_factors(plain, tmp_path, change, said):
    adapter = shutil.copytree(plain.store.out / "adapter", tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", lambda c: c.update(change))
    with pytest.raises(ExportError, match=said):
        cloq.merge(plain.store.out, tmp_path / "merged", adapter=adapter)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"), "lacks .*up_proj.lora_B.weight"),
        (
            lambda t: [t.pop(f"base_model.model.model.layers.1.mlp.up_proj.lora_{ab}.weight") for ab in "AB"],
            "its settings put factors on model.layers.1.mlp.up_proj, but it has none",
        ),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2)}), r"plain LoRA of linear layers \(base_model\.model\.lm"),
        (
            lambda t: t.update({f"base_model.model.model.layers.7.mlp.up_proj.lora_{ab}.weight": torch.zeros(4, 4) for ab in "AB"}),
            "do not belong together: it has factors for model.layers.7.mlp.up_proj, which is no linear layer of LlamaForCausalLM",
        ),
    ],
)  # fmt: skip
def test_damaged_adapters(plain, tmp_path, change, said):
    adapter = shutil.copytree(plain.store.out / "adapter", tmp_path / "adapter")
    edit_tensors(adapter / "adapter_model.safetensors", change)
    with pytest.raises(ExportError, match=said):
        cloq.merge(plain.store.out, tmp_path / "merged", adapter=adapter)


def test_another_model_s_adapter(plain, tmp_path):
    other = save_tiny("llama", tmp_path / "wider", num_hidden_layers=2, hidden_size=96)
    adapter = trained_elsewhere(other, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(
        ExportError, match=r"says that it belongs to .*wider, not to .*model; name the base that it was trained on with --base"
    ):
        cloq.merge(plain.store.out, tmp_path / "merged", adapter=adapter)
    with pytest.raises(ExportError, match=r"q_proj \(128, 64\) has A \(\d+, 96\) and B \(128, \d+\) for rank"):
        cloq.merge(plain.store.out, tmp_path / "merged", adapter=adapter, base=plain.store.out / "model")


@pytest.mark.parametrize(("stated", "fits"), [("org/the-original", False), ("out/model", True), ("/gone/model", True), (None, True)])
def test_a_base_that_is_not_there_any_more(plain, tmp_path, stated, fits):
    """A hub id is another model; a path is where the run was before."""
    adapter = shutil.copytree(plain.store.out / "adapter", tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", lambda c: c.update(base_model_name_or_path=stated))
    if fits:
        assert len(cloq.merge(plain.store.out, tmp_path / "merged", adapter=adapter).layers) == 14
        return
    with pytest.raises(ExportError, match="says that it belongs to org/the-original"):
        cloq.merge(plain.store.out, tmp_path / "merged", adapter=adapter)
    assert cloq.merge(plain.store.out, tmp_path / "merged", adapter=adapter, base=plain.store.out / "model").layers


def test_a_head_that_the_adapter_brings_with_it_is_the_base_s(plain, tmp_path):
    """PEFT saves the head's own weight beside its factors, and loads it over the base's."""
    adapter = trained_elsewhere(plain.store.out / "model", tmp_path / "adapter", target_modules=["lm_head"])
    edit_tensors(adapter / "adapter_model.safetensors", lambda t: t["base_model.model.lm_head.base_layer.weight"].mul_(2))
    with pytest.raises(ExportError, match="it brings a weight of lm_head with it, and the base has another"):
        cloq.merge(plain.store.out, tmp_path / "merged", adapter=adapter)


def test_a_tied_head_cannot_be_merged_alone(tmp_path):
    run = run_of(tmp_path, family="llama-tied", dtype="float32")
    adapter = trained_elsewhere(run.store.out / "model", tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(ExportError, match=r"the adapter changes lm_head, whose weight is also that of model\.embed_tokens"):
        cloq.merge(run.store.out, tmp_path / "merged", adapter=adapter)


def test_folders_that_are_not_there_or_not_free(plain, tmp_path):
    out = plain.store.out
    with pytest.raises(ExportError, match="holds no readable adapter"):
        cloq.merge(tmp_path / "nowhere", tmp_path / "merged")
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ExportError, match="exists already; choose a new or empty folder"):
        cloq.merge(out, tmp_path)
    for name in ("model-merged", "adapter"):
        with pytest.raises(ExportError, match=r"keeps its own parts|exists already"):
            cloq.merge(out, out / name)
    with pytest.raises(ExportError, match="dtype is 'int8'; a merged model takes bfloat16, float16, float32"):
        cloq.merge(out, tmp_path / "merged", dtype="int8")
    with pytest.raises(RunError, match=r"cannot write to .*mine\.txt.*choose another --to, and run the same command again$"):
        cloq.merge(out, tmp_path / "mine.txt/merged")
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_value_that_float16_cannot_hold(plain, tmp_path):
    adapter = shutil.copytree(plain.store.out / "adapter", tmp_path / "adapter")
    edit_tensors(adapter / "adapter_model.safetensors", lambda t: t.update({n: v * 1e4 for n, v in t.items()}))
    with pytest.raises(ExportError, match=r"which torch\.float16 cannot hold"):
        cloq.merge(plain.store.out, tmp_path / "merged", adapter=adapter, dtype="float16")
    assert not (tmp_path / "merged").exists()


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(plain, tmp_path, capsys):
    out = str(plain.store.out)
    assert main(["merge", out, "--to", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert "14 layers changed" in said and "rounding to bfloat16" in said and "of the adapter" in said
    assert main(["merge", out, "--to", str(tmp_path / "again"), "--dtype", "float32", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["mean"]["rounding"] == 0.0 and len(said["layers"]) == 14 and said["target"] == str(tmp_path / "again")


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["--packed"], "there is nothing packed"), (["--dtype", "int8"], "dtype is 'int8'"), (["--base", "none/such/base"], "none/such/base")],
)
def test_bad_input_is_one_clear_line(plain, tmp_path, capsys, argv, said):
    assert main(["merge", str(plain.store.out), "--to", str(tmp_path / "merged"), *argv]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and not (tmp_path / "merged").exists()
