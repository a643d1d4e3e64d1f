"""The main job end to end on tiny models: what comes out, that it resumes to the same bytes, and that it refuses what it should."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cloq
from cloq.api import RUN_FILE, evaluate_tokens, export, read_run_file, run
from cloq.errors import CalibrationError, ExportError, ModelError, RunError, SpecError
from cloq.export.peft import AdapterFolder
from cloq.export.read import QuantizedFolder
from cloq.report import read_report
from cloq.specs import Rule, RunSpec, run_spec
from cloq.streaming.device import resolve_device
from cloq.streaming.store import Store
from tests.tiny import save_tiny

SETTINGS = {"bits": 2, "group_size": 32, "rank": 8, "calib_samples": 6, "seq_len": 48, "heldout": 0.5, "device": "cpu"}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """English enough: what the interpreter says about itself."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n\n".join(str(o.__doc__) for o in (str, list, dict, int, float, bytes, sorted, print, open) if o.__doc__) * 3)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def finished(llama, text, tmp_path_factory):
    return cloq.quantize(str(llama), out=tmp_path_factory.mktemp("runs") / "out", calib=str(text), **SETTINGS)


def digest(out: Path) -> dict[str, str]:
    """Every exported byte, the base's path in the adapter's config put aside."""
    files = [p for part in ("model", "adapter") for p in sorted((out / part).rglob("*")) if p.is_file()]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes().replace(str(out.resolve()).encode(), b"")).hexdigest() for p in files}


def test_the_run_folder_is_complete(finished):
    names = {p.name for p in finished.out.iterdir()}
    assert names == {"model", "adapter", "report.json", "report.html", "layers.csv", "README.md", RUN_FILE, ".cloq"}
    assert read_report(finished.out).layers == finished.layers
    assert len(finished.layers) == 3 * 7


def test_factors_never_make_a_layer_worse_and_heldout_is_measured(finished):
    for name, (_, metrics) in finished.layers.items():
        assert metrics.error_corrected <= metrics.error_quantized * (1 + 1e-6), name
        assert metrics.heldout_quantized is not None and metrics.n_tokens == 6 * 48
        assert metrics.rank == 8


def test_exported_files_hold_what_was_fitted(finished):
    base, factors = QuantizedFolder(finished.base), AdapterFolder(finished.adapter)
    results = {name: r for i in range(3) for name, r in Store(finished.out).read(i).items()}
    assert base.names == factors.names == set(results)
    for name, result in results.items():
        assert torch.equal(base.weight(name).dequantize(), result.weight.dequantize())
        assert torch.equal(factors.delta(name), result.factors.delta())


def test_the_same_run_again_computes_nothing_and_changes_nothing(finished):
    before, stored = digest(finished.out), {p: p.stat().st_mtime_ns for p in (finished.out / ".cloq/blocks").iterdir()}
    events = []
    run(finished.spec, finished.out, emit=lambda event, values: events.append(event))
    assert "start" in events and not {"layer", "replay", "block"} & set(events)
    assert digest(finished.out) == before
    assert {p: p.stat().st_mtime_ns for p in (finished.out / ".cloq/blocks").iterdir()} == stored


@pytest.mark.parametrize("blocks_kept", [0, 1, 2])
def test_a_continued_run_ends_with_the_same_bytes(finished, blocks_kept, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished.out / ".cloq", out / ".cloq")
    for index in range(blocks_kept, 3):
        (out / f".cloq/blocks/{index:05d}.safetensors").unlink()
    run(finished.spec, out)
    assert digest(out) == digest(finished.out)


def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(finished, tmp_path):
    """SIGKILL once the first block is stored, then the same command again."""
    out = tmp_path / "out"
    settings = [f"--{k.replace('_', '-')}={v}" for k, v in SETTINGS.items()]
    command = [
        sys.executable,
        "-m",
        "cloq",
        "quantize",
        finished.spec.model,
        "--calib",
        finished.spec.calib.source,
        *settings,
        "--out",
        str(out),
    ]
    process = subprocess.Popen([*command, "--quiet"], env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    while process.poll() is None and not (out / ".cloq/blocks/00000.safetensors").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(finished.spec, out)
    assert digest(out) == digest(finished.out)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_block_is_solved_again_and_the_bytes_are_the_same(damage, finished, tmp_path):
    out, events = tmp_path / "out", []
    shutil.copytree(finished.out, out)
    path = out / ".cloq/blocks/00001.safetensors"
    content = path.read_bytes()
    path.write_bytes({"flip": content[:-1] + bytes([content[-1] ^ 1]), "truncate": content[:1000], "remove": b""}[damage])
    if damage == "remove":
        path.unlink()
    else:
        with pytest.raises(RunError, match=r"00001\.safetensors is damaged .* run the same cloq quantize command"):
            export(out, "dense")
        assert not (out / "model-dense").exists()
    run(finished.spec, out, emit=lambda event, values: events.append((event, values)))
    assert "00001.safetensors is damaged or missing" in events[0][1]["note"] and events[0][0] == "damaged"
    assert [v["block"] for event, v in events if event == "replay"] == [0]
    assert digest(out) == digest(finished.out)


def test_the_run_file_repeats_the_run(finished, tmp_path):
    spec = read_run_file(finished.out / RUN_FILE)
    assert spec == finished.spec.replace(model=str(Path(finished.spec.model).resolve()))
    run(spec, tmp_path / "again")
    assert digest(tmp_path / "again") == digest(finished.out)


def test_a_changed_setting_is_refused_and_restart_starts_over(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    with pytest.raises(RunError, match=r"settings\.quant\.bits was 2, is 3"):
        run(run_spec(finished.spec, bits=3), out)
    assert digest(out).keys() == digest(finished.out).keys()
    assert {s.layout.bits for s in run(run_spec(finished.spec, bits=3), out, restart=True).layers.values()} == {3}


def test_how_a_run_is_executed_may_change(finished):
    run(run_spec(finished.spec, batch_tokens=100), finished.out)


def test_propagation_decides_what_later_blocks_see(finished, tmp_path):
    """Equal statistics in the first layers, and another error later: each mode is really another one."""
    errors = {}
    for mode in ("adapter", "quantized", "dense"):
        layers = run(run_spec(finished.spec, propagate=mode), tmp_path / mode).layers
        errors[mode] = [layers[f"model.layers.{i}.self_attn.q_proj"].metrics.error_quantized for i in (0, 2)]
    assert errors["adapter"][0] == errors["quantized"][0] == errors["dense"][0]
    assert len({errors[mode][1] for mode in errors}) == 3


def test_sequential_order_changes_only_later_layers_of_a_block(finished, tmp_path):
    together = run(run_spec(finished.spec, sequential=False), tmp_path / "out").layers
    first, later = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    assert together[first].metrics.error_quantized == finished.layers[first].metrics.error_quantized
    assert together[later].metrics.error_quantized != finished.layers[later].metrics.error_quantized


def test_rules_reach_the_layers_that_they_name(finished, tmp_path):
    rules = (Rule("mlp.*", bits=4, rank=4), Rule("v_proj", dense=True), Rule("*.layers.1.mlp.down_proj", bits=8))
    result = run(finished.spec.replace(rules=rules), tmp_path / "out", form="compressed-tensors")
    of = result.layers
    assert of["model.layers.0.mlp.up_proj"].layout.bits == 4 and of["model.layers.0.mlp.up_proj"].metrics.rank == 4
    assert of["model.layers.1.mlp.down_proj"].layout.bits == 8
    assert of["model.layers.0.self_attn.q_proj"].layout.bits == 2
    assert not any("v_proj" in name for name in of)


def test_a_format_that_cannot_hold_the_result_is_refused_before_the_work(finished, tmp_path):
    with pytest.raises(ExportError, match="a container has one group size"):
        run(finished.spec.replace(rules=(Rule("up_proj", group_size=64),)), tmp_path / "out", form="container")
    assert not (tmp_path / "out").exists()


def test_a_rank_too_large_is_clipped_and_reported(finished, tmp_path):
    result = run(run_spec(finished.spec, rank=4096, only="k_proj"), tmp_path / "out")
    for _, metrics in result.layers.values():
        assert metrics.rank == 32 and any("clipped to 32" in note for note in metrics.notes)
        assert metrics.error_corrected < 1e-8


def test_factors_for_a_base_that_exists(finished, tmp_path):
    """`cloq init`: the base is taken as its files decode, and the factors are those that the run itself had found on that base."""
    spec = run_spec(finished.spec, quantized=str(finished.base), propagate="adapter")
    result = run(spec, tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()
    assert json.loads((result.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(finished.base)
    for name in finished.layers:
        torch.testing.assert_close(AdapterFolder(result.adapter).delta(name), AdapterFolder(finished.adapter).delta(name))


@pytest.mark.parametrize("init", ["zero", "svd", "qera", "eora", "cloq"])
def test_every_initializer_that_leaves_the_base_alone_takes_a_given_one(init, finished, tmp_path):
    result = run(run_spec(finished.spec, quantized=str(finished.base), init=init), tmp_path / "out")
    for summary in result.layers.values():
        assert init == "zero" or summary.metrics.error_corrected < summary.metrics.error_quantized


def test_a_given_base_with_no_layer_to_fit_is_refused(finished, text, tmp_path):
    half = cloq.quantize(finished.spec.model, out=tmp_path / "half", calib=str(text), **SETTINGS, only="q_proj")
    with pytest.raises(SpecError, match=r"none of the layers .* is quantized in the given base"):
        run(run_spec(finished.spec, quantized=str(half.base), only="mlp.*"), tmp_path / "out")


def test_nothing_runs_behind_the_last_layer_that_is_wanted(finished, text, tmp_path):
    events = []
    settings = SETTINGS | {"calib": str(text), "only": "*.layers.0.*"}
    first = cloq.quantize(finished.spec.model, out=tmp_path / "out", emit=lambda *event: events.append(event), **settings)
    assert [values["phase"] for name, values in events if name == "phase"].count("propagate") == 0
    for name, summary in first.layers.items():
        assert summary.metrics.error_corrected == finished.layers[name].metrics.error_corrected


def test_initializers_that_change_the_base_are_refused_for_a_given_one(finished):
    with pytest.raises(SpecError, match="loftq"):
        run_spec(finished.spec, quantized=str(finished.base), init="loftq")


def test_evaluation_reads_the_exported_files_and_adds_to_the_report(finished):
    torch.manual_seed(0)
    tokens = torch.randint(1, 200, (3, 40))
    found = evaluate_tokens(finished.out, tokens, "random tokens", device="cpu")
    assert [q.model for q in found] == ["16-bit", "base", "base + adapter"]
    assert {q.protocol for q in found} == {"chunks-40"}
    assert set(found) <= set(read_report(finished.out).quality)
    assert "random tokens" in (finished.out / "README.md").read_text()


def test_exports_from_a_finished_run(finished):
    folder = export(finished.out, "dense")
    assert folder == finished.out / "model-dense" and (folder / "config.json").exists()
    shutil.rmtree(folder)
    with pytest.raises(SpecError, match="unknown format 'gguf'"):
        export(finished.out, "gguf")


@pytest.mark.parametrize("family", ["phi3", "qwen2", "opt", "gpt_neox", "gemma3"])
def test_other_families_go_through_whole(family, text, tmp_path):
    model = save_tiny(family, tmp_path / "model")
    result = cloq.quantize(str(model), out=tmp_path / "out", calib=str(text), **SETTINGS)
    assert all(m.error_corrected < m.error_quantized for _, m in result.layers.values())
    assert QuantizedFolder(result.base).names == set(result.layers)


def test_gpt2_is_refused_in_the_format_that_cannot_load_it_and_goes_through_in_another(text, tmp_path):
    model = str(save_tiny("gpt2", tmp_path / "model"))
    with pytest.raises(ExportError, match=r"GPT2Attention.*dense"):
        cloq.quantize(model, out=tmp_path / "out", calib=str(text), **SETTINGS)
    result = cloq.quantize(model, out=tmp_path / "out", calib=str(text), format="dense", **SETTINGS)
    assert all(m.error_corrected < m.error_quantized for _, m in result.layers.values())


def test_experts_that_cannot_be_taken_apart_are_refused_unless_the_dense_part_is_asked_for(text, tmp_path):
    model = str(save_tiny("jetmoe", tmp_path / "model"))
    with pytest.raises(ModelError, match=r"experts.*--only"):
        cloq.quantize(model, out=tmp_path / "out", calib=str(text), **SETTINGS)
    assert not (tmp_path / "out" / "model").exists()
    result = cloq.quantize(model, out=tmp_path / "out", calib=str(text), only="kv_proj", **SETTINGS)
    assert len(result.layers) == 3


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"model": "./nowhere"}, ModelError, "not a folder"),
        ({"calib": "nonesuch"}, CalibrationError, "unknown calibration source"),
        ({"seq_len": 4096}, CalibrationError, "128"),
        ({"calib_samples": 100_000}, CalibrationError, "--calib-samples"),
        ({"only": "no_such_layer"}, SpecError, "matches no linear layer"),
        ({"skip": "*"}, SpecError, "no layer to quantize"),
        ({"device": "cuda:9" if not torch.cuda.is_available() else "tpu"}, SpecError, "not available"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(changes, error, match, finished, tmp_path):
    with pytest.raises(error, match=match):
        run(run_spec(finished.spec, **changes), tmp_path / "out")
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != "lock"] if (tmp_path / "out").exists() else []
    assert written == []


def test_a_damaged_weight_stops_the_run_and_names_the_tensor(text, tmp_path):
    from safetensors.torch import load_file, save_file

    model = save_tiny("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        cloq.quantize(str(model), out=tmp_path / "out", calib=str(text), **SETTINGS)


def test_a_read_only_folder_is_one_clear_line(finished, tmp_path):
    if os.geteuid() == 0:
        target = Path("/proc/cloq-cannot-write-here")
    else:
        tmp_path.chmod(0o500)
        target = tmp_path / "out"
    with pytest.raises(RunError, match="cannot write to"):
        run(finished.spec, target)


def test_default_settings_are_a_valid_run():
    assert RunSpec().to_dict() == RunSpec.from_dict(RunSpec().to_dict()).to_dict()


@pytest.mark.parametrize("device", ["cpu:x", "gpu", "cuda:-3", "", "cuda:99", "meta"])
def test_devices_that_are_none(device):
    with pytest.raises(SpecError, match=r"device .*(allowed: auto, cpu|is not available here)"):
        resolve_device(device)


YAML_TRAPS = {
    "nested": "settings: " + "[" * 5000,
    "number": "settings: {calib: {seed: " + "9" * 5000 + "}}",
    "date": "settings: {model: 2001-99-99}",
    "zero": "\0",
    "python": "settings: !!python/name:os.system",
}


@pytest.mark.parametrize("text", YAML_TRAPS.values(), ids=YAML_TRAPS)
def test_yaml_that_cannot_be_read_is_one_line(text, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SpecError, match=r"run\.yaml cannot be read as a run file") as caught:
        read_run_file(tmp_path / "run.yaml")
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_where_its_model_has_moved(finished, tmp_path):
    out, events = tmp_path / "out", []
    shutil.copytree(finished.out / ".cloq", out / ".cloq")
    moved = shutil.copytree(finished.spec.model, tmp_path / "moved")
    run(finished.spec.replace(model=str(moved)), out, emit=lambda event, values: events.append(event))
    assert "layer" not in events and digest(out) == digest(finished.out)
