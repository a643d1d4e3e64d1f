"""A model folder is written whole or not at all, the same bytes every time, and holds everything that the original held."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cloq.errors import ExportError, RunError
from cloq.export import FORMATS, check_format, folder, write_model
from cloq.models import Decoder
from cloq.quantizers import Rtn
from cloq.types import layout
from tests.finished import edit_json, finish, logits
from tests.tiny import load_plain


def rtn(name, weight):
    return Rtn(2, 32).quantize(weight)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finish("llama-tied", tmp_path_factory.mktemp("run"), rtn)


@pytest.mark.parametrize("form", ["gptq", "container", "compressed-tensors", "dense"])
def test_equal_runs_write_equal_bytes(run, form, tmp_path):
    once, twice = (write_model(run.decoder, run.store, FORMATS[form](), tmp_path / name) for name in ("once", "twice"))
    assert contents(once) == contents(twice)
    assert str(tmp_path) not in (once / "config.json").read_text() and str(run.decoder.folder) not in (once / "config.json").read_text()


def test_what_is_not_quantized_is_copied(run, tmp_path):
    written = write_model(run.decoder, run.store, FORMATS["gptq"](), tmp_path / "model")
    before, after = load_file(run.decoder.folder / "model.safetensors"), load_file(written / "model.safetensors")
    kept = [name for name in before if name.removesuffix(".weight") not in run.results]
    assert len(kept) > 8 and all(torch.equal(after[name], before[name]) for name in kept)
    assert not any(f"{name}.weight" in after for name in run.results) and "lm_head.weight" not in after
    old, new = (json.loads((path / "config.json").read_text()) for path in (run.decoder.folder, written))
    assert new.pop("quantization_config")["bits"] == 2 and new == old
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (written / file).read_bytes() == (run.decoder.folder / file).read_bytes()


def test_a_dense_export_is_of_one_precision(tmp_path):
    """The original is float16 here, and its head is not tied."""
    run = finish("llama", tmp_path, rtn, dtype=torch.float16)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        written = write_model(run.decoder, run.store, FORMATS["dense"](name), tmp_path / name)
        tensors = load_file(written / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype} and "lm_head.weight" in tensors
        assert json.loads((written / "config.json").read_text())["dtype"] == name
        for layer, result in run.results.items():
            assert torch.equal(tensors[f"{layer}.weight"], result.weight.dequantize().to(dtype))
    assert torch.equal(logits(load_plain(tmp_path / "float32")), logits(run.reference()))


def test_a_value_that_the_precision_cannot_hold_is_refused(tmp_path):
    import dataclasses

    def huge(name, weight):
        quantized = Rtn(8, 32).quantize(weight)
        return dataclasses.replace(quantized, scale=torch.full_like(quantized.scale, 60000.0))

    run = finish("llama", tmp_path, huge)
    with pytest.raises(ExportError, match=r"proj reaches .*, which torch.float16 cannot hold; use bfloat16 or float32"):
        run.export("dense", dtype="float16")
    assert [path.name for path in run.store.out.iterdir()] == [".cloq"]


@pytest.mark.parametrize("key", ["torch_dtype", None])
def test_the_precision_is_always_stated(tmp_path, key):
    """Old configurations call it torch_dtype, or leave it out; then transformers would take that of whatever tensor comes first."""
    run = finish("llama", tmp_path, rtn, dtype=torch.bfloat16)
    edit_json(run.decoder.folder / "config.json", lambda c: c.update({key: c.pop("dtype")}) if key else c.pop("dtype"))
    config = json.loads((run.export("gptq") / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config


def test_companions_are_copied_and_other_files_are_not(run, tmp_path, monkeypatch):
    original = run.decoder.folder
    for file in ("LICENSE", "merges.txt", "tokenizer.model", "additional_chat_templates/tools.jinja"):
        (original / file).parent.mkdir(exist_ok=True)
        (original / file).write_text(file)
    for file in (
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "adapter_config.json",
        "trainer_state.json",
        "modeling_x.py",
    ):
        (original / file).write_text("{}")
    written = write_model(run.decoder, run.store, FORMATS["gptq"](), tmp_path / "model")
    names = set(contents(written))
    assert {"LICENSE", "merges.txt", "tokenizer.model", "additional_chat_templates/tools.jinja"} <= names
    assert not any("index" in name or "adapter" in name or "trainer" in name or name.endswith(".py") for name in names)
    edit_json(original / "config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "modeling_x.X"}))
    written = write_model(run.decoder, run.store, FORMATS["gptq"](), tmp_path / "with code")
    assert "modeling_x.py" in contents(written)
    edit_json(original / "config.json", lambda c: c.pop("auto_map"))
    for file in ("model.safetensors.index.json", "adapter_config.json"):
        (original / file).unlink()


def test_shards_load_as_one_file_does(run, tmp_path, monkeypatch):
    whole = write_model(run.decoder, run.store, FORMATS["dense"]("float32"), tmp_path / "whole")
    monkeypatch.setattr(folder, "SHARD_BYTES", 60_000)
    parts = write_model(run.decoder, run.store, FORMATS["dense"]("float32"), tmp_path / "parts")
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    tensors = {name: tensor for file in files for name, tensor in load_file(parts / file).items()}
    whole_tensors = load_file(whole / "model.safetensors")
    assert tensors.keys() == whole_tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert torch.equal(logits(load_plain(parts)), logits(load_plain(whole)))


def test_experts_stay_as_the_files_had_them(tmp_path):
    """The files hold them one by one, the model fused."""
    run = finish("mixtral", tmp_path, lambda name, weight: None if "experts" in name else rtn(name, weight))
    before, after = (
        load_file(run.decoder.folder / "model.safetensors"),
        load_file(run.export("dense", dtype="float32") / "model.safetensors"),
    )
    experts = [name for name in before if "experts" in name]
    assert len(experts) == 2 * 4 * 3 and before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in experts)


def test_only_an_earlier_export_is_replaced(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_model(run.decoder, run.store, FORMATS["gptq"](), other)  # an empty folder
    with pytest.raises(ExportError, match="exists already; choose a new or empty folder"):
        write_model(run.decoder, run.store, FORMATS["gptq"](), other)
    with pytest.raises(ExportError, match="exists already"):
        write_model(run.decoder, run.store, FORMATS["gptq"](), run.store.folder)
    for name in ("model", "model-gptq"):
        for _ in range(2):
            write_model(run.decoder, run.store, FORMATS["gptq"](), run.store.out / name)


def test_an_interrupted_export_leaves_the_earlier_one(run, tmp_path, monkeypatch):
    target = write_model(run.decoder, run.store, FORMATS["gptq"](), run.store.out / "model-kept")
    before = contents(target)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "_copy_companions", lambda *_, **__: full_disk())
    with pytest.raises(RunError, match="No space left on device"):
        write_model(run.decoder, run.store, FORMATS["gptq"](), target)
    assert contents(target) == before and not list(run.store.out.glob(".model*"))


def test_an_unfinished_run_is_not_exported(tmp_path):
    run = finish("llama", tmp_path, rtn)
    run.store._path(1).unlink()
    with pytest.raises(ExportError, match="has 1 of 2 blocks finished; run cloq quantize again"):
        run.export("gptq")


def test_formats_can_be_asked_before_the_work(run):
    layouts = {name: layout(result.weight) for name, result in run.results.items()}
    check_format(run.decoder, layouts, FORMATS["gptq"]())
    with pytest.raises(ExportError, match="whose levels NF4's codebook does not have"):
        check_format(run.decoder, layouts, FORMATS["nf4"]())


def test_a_link_to_somewhere_else_is_not_copied(tmp_path):
    """A model from a stranger, with a link to a secret where its licence should be."""
    (tmp_path / "secret").write_text("private key")
    run = finish("llama", tmp_path, rtn)
    (tmp_path / "original/LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ExportError, match=r"LICENSE is a link to .*secret, outside of the model.s folder"):
        run.export("dense")
    assert not (run.store.out / "model").exists()
    layouts = {name: layout(result.weight) for name, result in run.results.items()}
    with pytest.raises(ExportError, match="is a link to"):
        check_format(run.decoder, layouts, FORMATS["dense"]())


def test_links_of_the_hubs_cache_are_copied(tmp_path):
    run = finish("llama", tmp_path, rtn)
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1f3c", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in run.decoder.folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    exported = write_model(Decoder(snapshot), run.store, FORMATS["dense"](), run.store.out / "model")
    assert (exported / "tokenizer.json").is_file() and not (exported / "tokenizer.json").is_symlink()
