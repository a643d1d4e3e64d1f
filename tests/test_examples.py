"""The scripts in examples/ as a user runs them: the run's own factors are trained, saved, and usable; nothing else changes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import cloq
from cloq.models import load_tokenizer
from cloq.quantizers import Rtn
from tests.finished import Finished, finish, needs

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = "Each block is written before the next one starts."


def run_of(root: Path, form: str, **settings) -> Finished:
    run = finish("llama", root, lambda name, weight: Rtn(4, 32).quantize(weight))
    run.adapter(run.export(form, **settings))
    return run


@torch.no_grad()
def loss(out: Path, adapter: str) -> float:
    model = cloq.load(out, adapter=out / adapter, dtype=torch.float32)
    ids = load_tokenizer(out / "model")(TEXT, return_tensors="pt").input_ids
    return float(model(input_ids=ids, labels=ids).loss)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("form", ["dense", pytest.param("gptq", marks=needs("gptqmodel", "optimum"))])
@pytest.mark.parametrize(
    "script", ["train_trainer.py", "train_plain_loop.py", pytest.param("train_trl.py", marks=needs("trl"))]
)  # fmt: skip
def test_a_script_trains_the_factors_that_the_run_found(tmp_path, monkeypatch, script, form):
    out = run_of(tmp_path, form, **({"dtype": "float32"} if form == "dense" else {})).store.out
    data = tmp_path / "data.jsonl"
    data.write_text((json.dumps({"text": TEXT}) + "\n") * 12)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [script, str(out), str(data)])
    before, base = contents(out / "adapter"), contents(out / "model")

    runpy.run_path(str(EXAMPLES / script), run_name="__main__")

    assert contents(out / "adapter") == before and contents(out / "model") == base
    initial, trained = (load_file(out / name / "adapter_model.safetensors") for name in ("adapter", "trained"))
    assert trained.keys() == initial.keys() and all(bool((trained[name] != initial[name]).any()) for name in initial)
    moved = max(float((trained[name] - initial[name]).abs().max()) for name in initial)
    assert moved < 0.02, "they are the run's factors, a few small steps on, and not others"
    assert loss(out, "trained") < loss(out, "adapter")
    merged = cloq.merge(out, tmp_path / "merged", adapter=out / "trained")
    assert 0 < merged.mean("trained") < merged.mean("adapter")


@pytest.mark.parametrize(
    ("file", "base", "adapter", "fatal"),
    [
        (
            "axolotl.yaml",
            "base_model",
            "lora_model_dir",
            {"load_in_4bit", "load_in_8bit", "peft_init_lora_weights", "lora_modules_to_save"},
        ),
        ("llama_factory.yaml", "model_name_or_path", "adapter_name_or_path", {"quantization_bit", "pissa_init", "use_dora", "lora_rank"}),
    ],
)
def test_a_configuration_names_base_and_adapter_and_says_that_it_is_untested(file, base, adapter, fatal):
    text = (EXAMPLES / file).read_text()
    values = yaml.safe_load(text)
    assert (values[base], values[adapter]) == ("RUN/model", "RUN/adapter")
    assert not fatal & values.keys() and values.get("create_new_adapter", False) is False and values.get("adapter", "lora") == "lora"
    assert "UNTESTED" in text and isinstance(values["learning_rate"], float)
