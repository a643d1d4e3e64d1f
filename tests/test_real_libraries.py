"""What a run writes, opened by the libraries that people will use: transformers, gptqmodel, bitsandbytes, compressed-tensors, PEFT.

The reference is a dense model whose weights are the stored layers' `dequantize()`. The real kernels round `scale · (code − zero)` to the
scale's float16 before they compute, a relative 2^-11 per weight, which is what the tolerance allows.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch

import cloq
from cloq.api import export
from cloq.models import set_weight
from cloq.streaming.store import Store
from tests.tiny import load_plain, save_tiny

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the 2, 3 and 8-bit kernels would compile with a C++ compiler
TOKENS = torch.randint(1, 250, (2, 24), generator=torch.Generator().manual_seed(0))
FLAGS = {"group_size": 32, "rank": 8, "calib_samples": 4, "seq_len": 48, "heldout": 0.25, "device": "cpu"}


def needs(*libraries: str):
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


gptq = needs("gptqmodel", "optimum")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    """A run with the given settings; equal settings run once."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60)
    known = {}

    def run(**settings):
        key = repr(sorted(settings.items()))
        if key not in known:
            known[key] = cloq.quantize(str(model), out=tmp_path_factory.mktemp("run") / "out", calib=str(text), **FLAGS | settings)
        return known[key]

    return run


def reference(result, adapter: bool) -> torch.nn.Module:
    dense = load_plain(Path(result.spec.model))
    for index in range(2):
        for name, layer in Store(result.out).read(index).items():
            set_weight(dense.get_submodule(name), layer.effective_weight(adapter=adapter))
    return dense


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits.float()


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-3) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm()


@gptq
@pytest.mark.parametrize("settings", [{"bits": b, "symmetric": s} for b in (2, 3, 4, 8) for s in (False, True)], ids=str)
def test_gptq_base_and_adapter_are_the_dense_reference(quantized, settings):
    result = quantized(**settings)
    model = cloq.load(result.out, dtype=torch.float32)
    assert_same(logits(model), logits(reference(result, adapter=True)))
    with model.disable_adapter():
        assert_same(logits(model), logits(reference(result, adapter=False)))


@gptq
@pytest.mark.parametrize(
    "settings",
    [
        {"act_order": True}, {"act_order": True, "static_groups": True}, {"group_size": None}, {"group_size": 64},
        {"skip": "v_proj"}, {"only": "*.layers.1.*"},
    ],
    ids=str,
)  # fmt: skip
def test_gptq_in_every_layout(quantized, settings):
    """Permuted groups, one group per channel, a shorter last group (64 does not divide 96), layers left dense."""
    result = quantized(bits=2, **settings)
    assert_same(logits(cloq.load(result.out, dtype=torch.float32)), logits(reference(result, adapter=True)))


@gptq
@pytest.mark.parametrize("bits", [2, 3])
def test_the_container_recodes_exactly(quantized, bits):
    result = quantized(bits=bits)
    folder = export(result.out, "container")
    assert_same(logits(cloq.load(result.out, base=folder, dtype=torch.float32)), logits(reference(result, adapter=True)))


@needs("compressed_tensors")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors_is_the_dense_reference(quantized, bits):
    result = quantized(bits=bits)
    folder = export(result.out, "compressed-tensors")
    assert_same(logits(cloq.load(result.out, base=folder, dtype=torch.float32)), logits(reference(result, adapter=True)))


@needs("bitsandbytes")
def test_nf4_is_the_dense_reference(tmp_path):
    """128 inside: on a CPU, bitsandbytes needs rows of whole blocks of 64. There it also computes in bfloat16, hence the tolerance."""
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=2, intermediate_size=128)
    flags = FLAGS | {"bits": 4, "quantizer": "nf4", "group_size": 64, "calib_samples": 2}
    result = cloq.quantize(str(model), out=tmp_path / "out", calib="demo", **flags)
    assert_same(logits(cloq.load(result.out, dtype=torch.float32)), logits(reference(result, adapter=True)), tolerance=3e-2)


def test_dense_is_the_dense_reference_rounded(quantized):
    result = quantized(bits=3)
    folder = export(result.out, "dense")
    assert_same(logits(cloq.load(result.out, base=folder, dtype=torch.float32)), logits(reference(result, adapter=True)), tolerance=2e-2)


@gptq
def test_cloq_load_is_the_plain_way(quantized):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = quantized(bits=2, symmetric=False)
    ours = cloq.load(result.out, trainable=True, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(result.base, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, result.adapter, is_trainable=True)
    assert torch.equal(logits(ours), logits(plain))
    trainable = [[name for name, p in m.named_parameters() if p.requires_grad] for m in (ours, plain)]
    assert trainable[0] == trainable[1] and len(trainable[0]) == 2 * 7 * 2 and all("lora_" in name for name in trainable[0])
    assert not any(p.requires_grad for p in cloq.load(result.out, dtype=torch.float32).parameters())


@gptq
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_short_training_lowers_the_loss_and_survives_saving(quantized, bits, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    result = quantized(bits=bits, symmetric=False)
    model = cloq.load(result.out, trainable=True, dtype=torch.float32)
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = TrainingArguments(
        tmp_path / "trainer", max_steps=12, per_device_train_batch_size=2, learning_rate=5e-3, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "trained")
    base = AutoModelForCausalLM.from_pretrained(result.base, dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "trained")), logits(model))


@gptq
def test_a_missing_tensor_is_said_before_transformers_would_abort(quantized, tmp_path):
    from safetensors.torch import load_file, save_file

    out = tmp_path / "out"
    shutil.copytree(quantized(bits=2, symmetric=False).out, out)
    weights = load_file(out / "model/model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.scales")
    save_file(weights, out / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(cloq.CloqError, match=r"up_proj"):
        cloq.load(out, dtype=torch.float32)
