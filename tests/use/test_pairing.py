"""Whether an adapter fits a base is one rule: `cloq check` reports what merging and training refuse."""

from __future__ import annotations

import shutil

import pytest
import torch

import cloq
from cloq.errors import ExportError
from cloq.export.peft import AdapterFolder
from cloq.models import Decoder
from cloq.quantizers import Rtn
from cloq.use.check import check_adapter
from cloq.use.pairing import Pair, fit, refuse_unfit
from tests.finished import edit_json, edit_tensors, finish
from tests.tiny import load_plain, save_tiny

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


# -- what PEFT may put on a base ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(made, tmp_path_factory):
    """The finished run of another model of the same shapes."""
    run = finish("llama", tmp_path_factory.mktemp("foreign"), lambda name, weight: Rtn(4, 32).quantize(weight), seed=7)
    run.adapter(run.export("gptq"))
    return run.store.out


def unfit(adapter, base, out):
    refuse_unfit(AdapterFolder(adapter), base, out)


def test_the_adapter_of_another_run_is_refused_unless_the_base_is_named(made, foreign):
    out = made.store.out
    with pytest.raises(ExportError, match=r"says that it belongs to .*, not to .*; name the base that it was trained on with --base"):
        unfit(foreign / "adapter", out / "model", out)
    unfit(foreign / "adapter", out / "model", None)
    with pytest.raises(ExportError, match="says that it belongs to"):
        cloq.load(out, adapter=foreign / "adapter")


@pytest.mark.parametrize("name", MISFITS)
def test_what_merging_refuses_is_not_loaded(made, adapter, name):
    MISFITS[name][0](adapter)
    for base in (None, made.store.out / "model"):
        with pytest.raises(ExportError):
            cloq.load(made.store.out, adapter=adapter, base=base)


def test_adapters_of_exports_of_copies_and_of_moved_runs_are_the_run_s(made, adapter, tmp_path):
    out = made.store.out
    named = {
        "an export beside the base": made.export("dense"),
        "a copy": shutil.copytree(out / "model", tmp_path / "copy"),
        "a place that is gone": tmp_path / "gone/model",
    }
    for base in named.values():
        settings(base_model_name_or_path=str(base))(adapter)
        unfit(adapter, out / "model", out)


def test_other_adapters_than_plain_lora_are_loaded_as_before(made, tmp_path):
    """DoRA has more tensors, and factors of experts as fused parameters have no layers: the first fits, of the second PEFT judges."""
    from peft import LoraConfig, get_peft_model

    base = save_tiny("mixtral", tmp_path / "base", num_hidden_layers=1)
    for number, changes in enumerate(
        ({"target_modules": ["q_proj"], "use_dora": True}, {"target_parameters": ["mlp.experts.gate_up_proj"]})
    ):
        get_peft_model(load_plain(base), LoraConfig(r=4, init_lora_weights=False, **changes)).save_pretrained(tmp_path / str(number))
        unfit(tmp_path / str(number), base, None)


def test_layers_of_experts_that_stay_fused_need_no_factors(tmp_path):
    """PEFT does not see them, though their names end as those of the layers that it was asked for."""
    from peft import LoraConfig, get_peft_model

    base = save_tiny("qwen2_moe", tmp_path / "base", num_hidden_layers=1)
    get_peft_model(load_plain(base), LoraConfig(r=4, target_modules=["up_proj"])).save_pretrained(tmp_path / "adapter")
    unfit(tmp_path / "adapter", base, None)
