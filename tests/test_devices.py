"""Everything of a run is where it belongs: a GPU that is not there gives the bytes of the CPU, and would stop where two devices meet."""

import pytest
import torch

import cloq
from cloq.api import evaluate_tokens
from tests.pretended import pretended_gpu
from tests.tiny import save_tiny

SETTINGS = {"bits": 2, "group_size": 32, "rank": 4, "calib_samples": 4, "seq_len": 32, "batch_tokens": 64, "rounds": 1}
FEW = ("k_proj", "o_proj", "gate_proj", "down_proj")
"""Layers of a block: one of each shape and place. Every operation passes through Python here, which takes its time."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {n} says that {n * n} is the square of {n}, and nothing else. " for n in range(200)))
    return path


def tensors_of(out):
    """Every file of base and adapter, by name."""
    return {path.relative_to(out): path.read_bytes() for part in ("model", "adapter") for path in (out / part).glob("*.safetensors")}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"only": FEW}),
        ("llama", {"only": FEW, "bits": 2.5, "fisher": 0.9, "adaptive_rank": True}),
        ("llama", {"only": FEW, "init": "loftq", "rounds": 4, "magr": True, "act_order": True, "correction": 0.5}),
        ("mixtral", {"only": "experts.*.down_proj", "effort": "fast"}),
    ],
)
def test_a_run_on_a_gpu_has_all_of_it_there(family, settings, text, tmp_path):
    model = save_tiny(family, tmp_path / "model", num_hidden_layers=2)
    asked = SETTINGS | {"calib": str(text)} | settings
    with pretended_gpu():
        there = cloq.quantize(str(model), out=tmp_path / "there", device="cuda:0", **asked)
    here = cloq.quantize(str(model), out=tmp_path / "here", device="cpu", **asked)
    assert tensors_of(there.out) and tensors_of(there.out) == tensors_of(here.out)
    assert {name: layer.metrics.error_corrected for name, layer in there.layers.items()} == {
        name: layer.metrics.error_corrected for name, layer in here.layers.items()
    }
    assert any("loops over columns ran as single operations on the GPU" in note for note in there.report.notes)


def test_perplexity_on_a_gpu(text, tmp_path):
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=2)
    run = cloq.quantize(str(model), out=tmp_path / "run", device="cpu", calib=str(text), **SETTINGS)
    tokens = torch.arange(2 * 32).reshape(2, 32)
    with pretended_gpu():
        there = evaluate_tokens(run.out, tokens, "some", device="cuda:0")
    assert there == evaluate_tokens(run.out, tokens, "some", device="cpu")


def test_the_pretended_gpu_mixes_as_little_as_a_real_one():
    with pretended_gpu():
        here, there = torch.ones(3, 3), torch.ones(3, 3, device="cuda:0")
        assert there.device == here.to("cuda:0").device == torch.tensor([1.0], device="cuda:0").device == torch.device("cuda:0")
        assert there.to("cpu").device == there.cpu().device == torch.device("cpu")
        assert float((there @ here.to(there)).sum()) == 27 and (2 * there).tolist() == [[2.0] * 3] * 3
        for mixed in (lambda: here @ there, lambda: there + here, lambda: torch.cat([here, there]), lambda: here.add_(there)):
            with pytest.raises(RuntimeError, match="tensors on cuda:0 and on the CPU"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        there[0] = 5
        here.copy_(there)
        assert here[0].tolist() == [5.0] * 3 and torch.equal(there[torch.tensor([0])].cpu(), here[:1])
