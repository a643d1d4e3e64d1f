"""`cloq.load`: what it does beyond the plain way. That it equals the plain way is proven in test_real_libraries."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cloq
from cloq.errors import ExportError, MissingLibrary
from cloq.quantizers import Rtn
from cloq.use.loading import default_dtype
from tests.finished import edit_json, edit_tensors, finish, logits, needs

gptqmodel = needs("gptqmodel", "optimum")


def run_of(tmp_path, form="dense", **settings):
    run = finish("llama", tmp_path, lambda name, weight: Rtn(2, 32).quantize(weight))
    run.adapter(run.export(form, **settings))
    return run


@pytest.mark.parametrize(("stored", "loaded"), [("float16", torch.float32), ("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_without_a_gpu_float16_becomes_float32(tmp_path, monkeypatch, stored, loaded):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = run_of(tmp_path, dtype=stored).store.out
    assert cloq.load(out).base_model.model.dtype == loaded
    assert cloq.load(out, dtype=torch.float64).base_model.model.dtype == torch.float64


def test_with_a_gpu_the_stored_precision_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_dtype({"dtype": "float16"}) == default_dtype({"torch_dtype": "float16"}) == "auto"


def test_only_the_factors_train_and_only_when_asked(tmp_path):
    out = run_of(tmp_path, dtype="float32").store.out
    model = cloq.load(out, trainable=True)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    assert not any(p.requires_grad for p in cloq.load(out).parameters())


def test_a_moved_run_is_loaded_where_it_is(tmp_path):
    """The adapter still names the old place of its base."""
    run = run_of(tmp_path, dtype="float32")
    moved = tmp_path / "moved"
    shutil.move(run.store.out, moved)
    assert torch.allclose(logits(cloq.load(moved)), logits(run.reference(adapter=True)), atol=1e-4)


def test_without_a_base_of_its_own_the_one_that_the_adapter_names_is_taken(tmp_path):
    """As after `cloq init`, which writes an adapter alone."""
    run = run_of(tmp_path, dtype="float32")
    elsewhere = tmp_path / "given base"
    shutil.move(run.store.out / "model", elsewhere)
    edit_json(run.store.out / "adapter/adapter_config.json", lambda c: c.update(base_model_name_or_path=str(elsewhere)))
    expected = logits(run.reference(adapter=True))
    assert torch.allclose(logits(cloq.load(run.store.out)), expected, atol=1e-4)
    adapter = shutil.move(run.store.out / "adapter", tmp_path / "adapter elsewhere")
    assert torch.allclose(logits(cloq.load(run.store.out, base=elsewhere, adapter=adapter)), expected, atol=1e-4)


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(ExportError, match="holds no readable adapter"):
        cloq.load(tmp_path)
    out = run_of(tmp_path, dtype="float32").store.out
    shutil.rmtree(out / "model")
    with pytest.raises(ExportError, match=r"has no config\.json"):
        cloq.load(out)


@pytest.mark.parametrize(
    ("form", "library", "command"),
    [("gptq", "gptqmodel", "gptq"), ("gptq", "optimum", "gptq"), ("compressed-tensors", "compressed_tensors", "compressed-tensors")],
)
def test_a_missing_library_is_named_with_its_command(tmp_path, monkeypatch, form, library, command):
    out = run_of(tmp_path, form).store.out
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == library else find(name, *rest))
    with pytest.raises(
        MissingLibrary, match=rf'needs the library {library}, which is not installed. Install it with: pip install "cloq\[{command}\]"'
    ):
        cloq.load(out)


def test_a_damaged_base_is_refused_without_importing_what_would_abort(tmp_path):
    """transformers ends the process over a missing tensor, so nothing of it may have started."""
    out = run_of(tmp_path, "gptq").store.out
    edit_tensors(out / "model/model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.qzeros"))
    code = f"""
import cloq, sys
try:
    cloq.load({str(out)!r})
except cloq.CloqError as error:
    assert "up_proj.qzeros is missing" in str(error) and "cloq check says more" in str(error), error
    sys.exit(7 if "gptqmodel" not in sys.modules else 1)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7


@gptqmodel
@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_real_model_trains(tmp_path, bits):
    """A model folder in CLOQ_TEST_MODEL: a few steps lower the loss, and what is saved is what was trained."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = os.environ.get("CLOQ_TEST_MODEL")
    if not folder or not Path(folder).is_dir():
        pytest.skip("CLOQ_TEST_MODEL does not name a model folder")
    result = cloq.quantize(
        folder, out=tmp_path / "out", bits=bits, rank=16, calib="demo", calib_samples=4, seq_len=128, heldout=0.25, device="cpu"
    )
    model = cloq.load(result.out, trainable=True, dtype=torch.float32)
    text = "Each of the four factors is written to its own file, and each file is read back before the next one is opened. " * 8
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :64]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(result.base, dtype=torch.float32), tmp_path / "trained")
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
