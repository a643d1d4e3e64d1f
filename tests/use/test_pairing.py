"""Whether an adapter fits a base is one rule: `cloq check` reports what merging and training refuse."""

from __future__ import annotations

import shutil

import pytest
import torch

from cloq.errors import ExportError
from cloq.export.peft import AdapterFolder
from cloq.models import Decoder
from cloq.quantizers import Rtn
from cloq.use.check import check_adapter
from cloq.use.pairing import Pair, fit
from tests.finished import edit_json, edit_tensors, finish

UP, KEY = "model.layers.0.mlp.up_proj", "base_model.model.model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = finish("llama", tmp_path_factory.mktemp("run"), lambda name, weight: Rtn(2, 32).quantize(weight))
    run.adapter(run.export("gptq"))
    return run


@pytest.fixture
def adapter(made, tmp_path):
    return shutil.copytree(made.store.out / "adapter", tmp_path / "adapter")


def tensors(change):
    return lambda folder: edit_tensors(folder / "adapter_model.safetensors", change)


def settings(**values):
    return lambda folder: edit_json(folder / "adapter_config.json", lambda config: config.update(values))


def put(name: str, a: tuple[int, int], b: tuple[int, int]):
    return tensors(
        lambda t: t.update(
            {f"base_model.model.{name}.lora_A.weight": torch.zeros(a), f"base_model.model.{name}.lora_B.weight": torch.zeros(b)}
        )
    )


MISFITS = {
    "missing half": (tensors(lambda t: t.pop(f"{KEY}.lora_B.weight")), {"missing": f"{KEY}.lora_B.weight"}),
    "missing": (tensors(lambda t: [t.pop(f"{KEY}.lora_{ab}.weight") for ab in "AB"]), {"missing": f"{KEY}.lora_A.weight"}),
    "a stranger": (
        put("model.layers.9.mlp.up_proj", (4, 64), (96, 4)),
        {"strangers": "model.layers.9.mlp.up_proj", "unused": "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"},
    ),
    "left aside": (put("lm_head", (4, 64), (288, 4)), {"unused": "base_model.model.lm_head.lora_A.weight"}),
    "too narrow": (put(UP, (4, 63), (96, 4)), {"misshapen": f"{UP} (96, 64) has A (4, 63) and B (96, 4) for rank 4"}),
    "ranks of its own": (put(UP, (4, 64), (96, 3)), {"misshapen": f"{UP} (96, 64) has A (4, 64) and B (96, 3) for rank 4"}),
    "another rank": (put(UP, (2, 64), (96, 2)), {"misshapen": f"{UP} (96, 64) has A (2, 64) and B (96, 2) for rank 4"}),
    "other settings": (settings(rank_pattern={"mlp.up_proj": 8}), {"misshapen": f"{UP} (96, 64) has A (4, 64) and B (96, 4) for rank 8"}),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_found_reported_and_refused(made, adapter, name):
    change, expected = MISFITS[name]
    change(adapter)
    base, folder = made.store.out / "model", AdapterFolder(adapter)
    found = fit(folder, Decoder(made.decoder.folder).model)
    assert {kind: getattr(found, kind)[0] for kind in ("missing", "unused", "strangers", "misshapen") if getattr(found, kind)} == expected
    failed = [finding.what for finding in check_adapter(folder, base) if not finding.ok]
    assert any(what in said for what in expected.values() for said in failed)
    with pytest.raises(ExportError):
        Pair.open(made.store.out, adapter, base, False)


def test_what_fits_is_on_every_layer_in_the_model_s_order(made, adapter):
    found = fit(AdapterFolder(adapter), made.decoder.model)
    assert list(found.modules) == made.decoder.all_linears() and not (found.missing or found.unused or found.strangers or found.misshapen)
    pair = Pair.open(made.store.out, adapter, None, False)
    assert list(pair.modules) == list(found.modules)


def test_a_head_s_own_weight_is_not_left_aside(made, adapter):
    """PEFT loads it over the base's."""
    put("lm_head", (4, 64), (288, 4))(adapter)
    tensors(lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.zeros(288, 64)}))(adapter)
    settings(target_modules=["lm_head", *AdapterFolder(adapter).config["target_modules"]])(adapter)
    found = fit(AdapterFolder(adapter), made.decoder.model)
    assert not found.unused and "lm_head" in found.modules


def test_settings_that_peft_cannot_read(made, adapter):
    settings(layers_to_transform=[0], target_modules=".*up_proj")(adapter)
    with pytest.raises(ExportError, match=r"PEFT cannot read .*adapter_config\.json"):
        fit(AdapterFolder(adapter), made.decoder.model)
    assert any("PEFT cannot read" in finding.what for finding in check_adapter(AdapterFolder(adapter), made.store.out / "model"))
