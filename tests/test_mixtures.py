"""Mixtures of experts through a whole run: every expert is quantized and fitted, and the libraries load and train what is written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cloq
from cloq.api import evaluate_tokens, export, open_decoder
from cloq.errors import ExportError
from cloq.export.dense import Dense
from cloq.export.folder import write_model
from cloq.models import Decoder, Forwards, Room
from cloq.models import decoder as decoding
from cloq.plan import plan
from cloq.specs import layer_spec, run_spec
from cloq.streaming import capture
from cloq.streaming.capture import statistics, top_up_experts
from cloq.streaming.solve import solve_layer
from cloq.streaming.store import Store
from cloq.types import LayerStats
from cloq.use.check import check
from tests.finished import TOKENS, Finished, finish, logits, needs
from tests.tiny import load_plain, save_tiny

FAMILIES: dict[str, dict[str, Any]] = {"mixtral": {}, "qwen3_moe": {"mlp_only_layers": []}, "olmoe": {"num_experts": 16}}

SETTINGS = {"bits": 3, "group_size": 32, "rank": 4, "calib_samples": 4, "seq_len": 32, "heldout": 0.25, "device": "cpu"}
gptq = needs("gptqmodel", "optimum")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(str(o.__doc__) for o in (str, list, dict, int, float, bytes) if o.__doc__) * 2)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text):
    """A finished run of each family, made once for all that ask for the same settings."""

    @cache
    def run(family: str, **settings: Any):
        root = tmp_path_factory.mktemp(family)
        model = save_tiny(family, root / "model", num_hidden_layers=2, **FAMILIES[family])
        return cloq.quantize(str(model), out=root / "out", calib=str(text), **SETTINGS | settings)

    return run


def of_store(result) -> Finished:
    decoder, store = Decoder(Path(result.spec.model)), Store(result.out)
    return Finished(decoder, store, {name: r for i in range(2) for name, r in store.read(i).items()})


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_quantized_and_its_factors_help(family, runs):
    result, count = runs(family), FAMILIES[family].get("num_experts", 4)
    for block in range(2):
        for expert in range(count):
            for layer in ("gate_proj", "up_proj", "down_proj"):
                metrics = result.layers[f"model.layers.{block}.mlp.experts.{expert}.{layer}"].metrics
                assert metrics.rank == 4 and metrics.error_corrected < metrics.error_quantized
    assert len(result.layers) == 2 * (4 + 3 * count) and not any(name.endswith("gate") for name in result.layers)
    assert all(finding.ok for finding in check(result.out))


def test_experts_with_few_tokens_are_topped_up_and_say_so(runs):
    """128 tokens, each to two of sixteen experts of 64 and 96 inputs."""
    layers = {name: s for name, s in runs("olmoe").layers.items() if ".experts." in name}
    starved = {name for name, s in layers.items() if s.metrics.n_tokens < 2 * s.layout.shape[1]}
    noted = {name for name, s in layers.items() if any("calibration tokens reached this expert: topped up" in n for n in s.metrics.notes)}
    assert starved == noted and len(starved) > 0
    for name, (_, metrics) in layers.items():
        assert (metrics.heldout_corrected is None) == (metrics.heldout_quantized is None)
        assert 0 < metrics.error_quantized < 1, name  # also where no token came: no plain-weight fallback
    assert not any("no calibration token" in note for s in layers.values() for note in s.metrics.notes)


def test_a_killed_run_goes_on_to_the_same_bytes_and_splitting_a_round_changes_none(runs, text, tmp_path, monkeypatch):
    result = runs("olmoe")
    shutil.copytree(result.out, tmp_path / "again")
    (tmp_path / "again/.cloq/blocks/00001.safetensors").unlink()
    monkeypatch.setattr(decoding, "GRAM_BYTES", 5 * 4 * 96**2)
    rounds = []
    gram_matrices = capture.gram_matrices
    monkeypatch.setattr(capture, "gram_matrices", lambda runs, linears, names: rounds.append(names) or gram_matrices(runs, linears, names))
    cloq.quantize(result.spec.model, out=tmp_path / "again", calib=str(text), **SETTINGS)
    assert max(len(names) for names in rounds) <= 12  # of 16 experts
    for part in ("model", "adapter"):
        for path in (result.out / part).glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / "again" / part / path.name).read_bytes()


def test_the_plan_counts_experts_by_their_share_of_the_tokens(runs):
    spec = runs("olmoe").spec
    made = plan(spec, open_decoder(spec))
    assert made.layers == 2 * (4 + 3 * 16) and not made.notes
    fewer = plan(spec.replace(only=("self_attn.*", "experts.0.*")), open_decoder(spec))
    assert 0 < fewer.work["solve"].products < made.work["solve"].products
    assert fewer.memory["Gram matrices"] < made.memory["Gram matrices"] == 2 * 4 * 16 * 96**2
    doubled = plan(run_spec(spec, seq_len=64), open_decoder(spec))
    assert doubled.work["capture"].products > 1.9 * made.work["capture"].products


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_export_and_the_merged_model_are_what_plain_transformers_loads(family, runs, tmp_path):
    result = runs(family)
    run = of_store(result)
    dense = write_model(run.decoder, run.store, Dense("float32"), tmp_path / "dense")
    assert close(logits(load_plain(dense)), logits(run.reference()))
    assert Decoder(dense).checkpoint.names and set(Decoder(dense).checkpoint.names) == set(run.decoder.checkpoint.names)
    merged = cloq.merge(result.out, tmp_path / "merged", dtype="float32").target
    assert close(logits(load_plain(merged)), logits(run.reference(adapter=True)))


@gptq
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_experts_load_and_train_through_gptqmodel_and_peft(family, runs):
    result = runs(family)
    run = of_store(result)
    model = cloq.load(result.out, trainable=True, dtype=torch.float32)
    packed = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "qweight")}
    assert {name.removesuffix(".base_layer") for name in packed} == set(run.results)
    expected = logits(run.reference(adapter=True, precision=torch.float16))
    assert close(logits(model), expected, 1e-3)
    with model.disable_adapter():
        assert close(logits(model), logits(run.reference(precision=torch.float16)), 1e-3)
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(factors) == 2 * len(run.results) and sum(".experts." in name for name in factors) > len(factors) / 2
    reached = {name for name, p in factors.items() if p.grad is not None and bool(p.grad.any())}
    assert {name for name in factors if ".experts." not in name} <= reached and any(".experts." in name for name in reached)
    again = save_and_load(model, result)
    assert torch.equal(logits(again), logits(model.eval()))


def save_and_load(model, result):
    target = result.out.parent / "trained"
    model.save_pretrained(target)
    return cloq.load(result.out, adapter=target, dtype=torch.float32)


GPTQMODEL = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
model = GPTQModel.load(sys.argv[1], backend=BACKEND.TORCH, device="cpu", dtype=torch.bfloat16).model
assert hasattr(model.get_submodule("model.layers.1.mlp.experts.3.down_proj"), "qweight")
torch.save(model(input_ids=torch.load(sys.argv[2])).logits.float(), sys.argv[3])
"""


@gptq
def test_gptqmodel_itself_reads_packed_experts(runs, tmp_path):
    """In bfloat16, which is what its loader computes in on a CPU, so the tolerance is of that precision. In a process of its own, because
    it takes the experts of transformers' classes apart for good. Three rounds: with eight a token's second and third expert are 0.002 apart
    in the router's softmax, and bfloat16 takes the other one, in transformers' own forward of the decoded weights too."""
    result = runs("mixtral", rounds=3)
    torch.save(TOKENS, tmp_path / "tokens")
    arguments = [result.out / "model", tmp_path / "tokens", tmp_path / "logits"]
    subprocess.run([sys.executable, "-c", GPTQMODEL, *map(str, arguments)], check=True, capture_output=True)
    assert close(torch.load(tmp_path / "logits"), logits(of_store(result).reference()), 0.1)


def test_a_dense_base_gets_its_experts_factors_too(tmp_path):
    run = finish("qwen2_moe", tmp_path, lambda name, weight: quantized(weight))
    run.adapter(run.export("dense", dtype="float32"))
    model = cloq.load(run.store.out, trainable=True)
    assert close(logits(model), logits(run.reference(adapter=True)))
    assert sum(p.requires_grad for p in model.parameters()) == 2 * len(run.results)


def quantized(weight: Tensor):
    from cloq.quantizers import Rtn

    return Rtn(3, 32).quantize(weight)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_plain_peft_fuses_the_factors_of_families_that_it_knows(family, tmp_path):
    from peft import PeftModel

    run = finish(family, tmp_path, lambda name, weight: quantized(weight), **({"mlp_only_layers": []} if family == "qwen3_moe" else {}))
    base = run.export("dense", dtype="float32")
    model = PeftModel.from_pretrained(load_plain(base), run.adapter(base))
    assert close(logits(model), logits(run.reference(adapter=True)))


@gptq
@pytest.mark.parametrize("form", ["gptq", "dense"])
def test_part_of_the_experts_can_be_quantized(form, tmp_path):
    """The others stay as they are, in the same form of storage, and the rest of the block too."""
    run = finish("mixtral", tmp_path, lambda name, weight: quantized(weight) if ".experts.1." in name or "q_proj" in name else None)
    out = run.export(form, **({"dtype": "float32"} if form == "dense" else {}))
    run.adapter(out)
    assert all(finding.ok for finding in check(run.store.out))
    expected = logits(run.reference(adapter=True))
    assert close(logits(cloq.load(run.store.out, dtype=torch.float32)), expected, 1e-3)
    assert close(logits(load_plain(cloq.merge(run.store.out, tmp_path / "merged", dtype="float32").target)), expected)


@gptq
def test_experts_with_biases_stored_in_one_parameter(tmp_path):
    """GPT-OSS: interleaved, transposed, a gate of its own kind."""
    run = finish("gpt_oss", tmp_path, lambda name, weight: quantized(weight))
    assert close(logits(load_plain(run.export("dense", dtype="float32"))), logits(run.reference()))
    run.adapter(run.export("gptq"))
    shutil.rmtree(run.store.out / "model")
    (run.store.out / "model-gptq").rename(run.store.out / "model")
    expected = logits(run.reference(adapter=True))
    assert close(logits(cloq.load(run.store.out, dtype=torch.float32)), expected, 1e-3)
    assert close(logits(load_plain(cloq.merge(run.store.out, tmp_path / "merged", dtype="float32").target)), expected)


def test_perplexity_is_that_of_the_stored_run(runs):
    result = runs("qwen3_moe")
    run = of_store(result)
    measured = {quality.model: quality.perplexity for quality in evaluate_tokens(result.out, TOKENS, "text", device="cpu")}
    for name, adapter in (("base", False), ("base + adapter", True)):
        with torch.no_grad():
            loss = run.reference(adapter=adapter)(input_ids=TOKENS, labels=TOKENS).loss
        assert measured[name] == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.parametrize(("form", "settings"), [("compressed-tensors", {}), ("nf4", {"quantizer": "nf4", "bits": 4, "group_size": 64})])
def test_formats_that_packed_experts_are_not_loaded_from_are_refused_before_the_run(form, settings, runs, text, tmp_path):
    model = runs("mixtral").spec.model
    with pytest.raises(ExportError, match=r"experts\.0\.gate_proj is one of .*packed experts are not loaded from.*--format.*--skip"):
        cloq.quantize(model, out=tmp_path / "out", calib=str(text), format=form, **SETTINGS | settings)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ExportError, match="packed experts are not loaded"):
        export(runs("mixtral").out, form, tmp_path / "export")


@torch.no_grad()
def test_topping_up_halves_the_error_of_experts_that_saw_few_tokens(tmp_path):
    """Measured on tokens of the same kind that the solve never saw, where the router really sends them to the expert."""
    decoder = Decoder(save_tiny("mixtral", tmp_path, num_hidden_layers=1, num_local_experts=16))
    generator = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(1, 250).float()
    calibration, heldout = (
        decoder.enter(1 + torch.multinomial(frequency, n * 32, True, generator=generator).reshape(n, 32), 1 << 20) for n in (12, 200)
    )
    decoder.load_block(0)
    linears, spec = decoder.linears(0), run_spec(model="m", bits=2, group_size=32, rank=4)
    names = [name for name in decoder.expert_layers if not name.endswith("gate_proj")]
    groups = [[name] for name in names]
    shown, unshown = (Forwards(decoder, 0, batches, {}, Room(0)) for batches in (calibration, heldout))
    (own, _), (unseen, _) = (statistics(decoder, linears, groups, forwards) for forwards in (shown, unshown))
    topped = top_up_experts(decoder, linears, shown, own)
    assert len(topped) == len(names)

    def error(name: str, stats: LayerStats) -> float:
        weight = decoder.weight(name, linears[name])
        return solve_layer(weight, stats, unseen[name], layer_spec(spec, name), spec.lora).metrics.heldout_corrected

    measured = [name for name in names if unseen[name].n_tokens > 50]
    assert len(measured) > 20
    assert sum(error(name, topped[name]) for name in measured) < 0.5 * sum(error(name, own[name]) for name in measured)
