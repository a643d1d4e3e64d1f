"""What other libraries make, as they make it, and what is said where they do not."""

from __future__ import annotations

import sys

import pytest
import torch
from quality import rivals
from quality.protocol import Protocol
from quality.rivals import Refused, peft_loftq, run_limited
from quality.starts import Pair, trainable_model

from cloq.models import Checkpoint, Decoder
from cloq.quantizers import Nf4
from cloq.types import LayerStats
from tests.finished import needs
from tests.tiny import save_tiny


@pytest.fixture
def protocol(tmp_path) -> Protocol:
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=1, intermediate_size=128)
    return Protocol(str(model), "a.txt", "b.txt", "c.txt", rank=4)


@needs("bitsandbytes")
def test_peft_s_loftq_leaves_nf4_values_and_factors_of_what_they_lack(protocol, tmp_path):
    """The base is NF4: quantized once more it is itself. The factors are PEFT's, and come back as they were."""
    out = peft_loftq(protocol, tmp_path / "4-peft-loftq")
    original, base = Decoder(protocol.model), Checkpoint(out / "model")
    model = trainable_model(protocol, Pair(out / "model", out / "adapter"))
    for name in original.all_linears():
        weight = original.read(f"{name}.weight").float()
        quantized = base.read(f"{name}.weight")
        stats = LayerStats(torch.eye(weight.shape[1]), 1)
        assert torch.equal(Nf4().quantize(quantized, stats).dequantize(), quantized) and not torch.equal(quantized, weight)
        layer = model.get_base_model().get_submodule(name)
        assert torch.equal(layer.base_layer.weight, quantized) and layer.scaling["default"] == 1.0
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        u, s, vt = torch.linalg.svd(weight - quantized, full_matrices=False)
        torch.testing.assert_close(product, u[:, :4] * s[:4] @ vt[:4], atol=1e-4, rtol=1e-3)
    assert {p.requires_grad for n, p in model.named_parameters() if "lora_" in n} == {True}


@needs("bitsandbytes")
def test_peft_s_loftq_is_made_once_and_for_its_settings_only(protocol, tmp_path, monkeypatch):
    out = peft_loftq(protocol, tmp_path / "4-peft-loftq")
    monkeypatch.setattr(rivals, "_loftq", lambda *_: pytest.fail("made again"))
    assert peft_loftq(protocol, out) == out
    with pytest.raises(SystemExit, match="was made with other settings"):
        peft_loftq(protocol.changed((("rank", 8),)), out)


@needs("bitsandbytes")
def test_a_rank_that_peft_s_loftq_does_not_have(protocol, tmp_path):
    with pytest.raises(Refused, match="no factors of rank 64 for layers of 32"):
        peft_loftq(protocol.changed((("rank", 64),)), tmp_path / "4-peft-loftq")
    assert not (tmp_path / "4-peft-loftq").exists()


def test_a_library_that_fails_is_quoted(tmp_path):
    with pytest.raises(Refused, match=r"ended with status 3: no luck$"):
        run_limited([sys.executable, "-c", "print('no luck\\n'); raise SystemExit(3)"], tmp_path / "log", 1)


def test_a_library_that_does_not_end_is_ended(tmp_path):
    with pytest.raises(Refused, match=r"not done within 0\.01 minutes"):
        run_limited([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], tmp_path / "log", 0.01)
