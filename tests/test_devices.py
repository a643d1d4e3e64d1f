"""Everything of a run is where it belongs: a GPU that is not there gives the bytes of the CPU, and would stop where two devices meet."""

import contextlib

import pytest
import torch

import cloq
from cloq.api import evaluate_tokens
from cloq.models import Decoder
from cloq.plan import plan
from cloq.specs import LoraSpec, run_spec
from cloq.streaming.device import place_to_wait, waiting_in
from tests.plan.test_plan import MACHINE
from tests.pretended import pretended_gpu
from tests.test_api import digest
from tests.tiny import save_tiny

SETTINGS = {"bits": 2, "group_size": 32, "rank": 4, "calib_samples": 4, "seq_len": 32, "batch_tokens": 64, "rounds": 1}
FEW = ("k_proj", "o_proj", "gate_proj", "down_proj")
"""Layers of a block: one of each shape and place. Every operation passes through Python here, which takes its time."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {n} says that {n * n} is the square of {n}, and nothing else. " for n in range(200)))
    return path


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"only": FEW, "activations": "host"}),
        ("llama", {"only": FEW, "bits": 2.5, "fisher": 0.9, "adaptive_rank": True}),
        ("llama", {"only": FEW, "init": "loftq", "rounds": LoraSpec().rounds, "magr": True, "act_order": True, "correction": 0.5}),
        ("mixtral", {"only": "experts.*.down_proj", "effort": "fast"}),
    ],
)
def test_a_run_on_a_gpu_has_all_of_it_there(family, settings, text, tmp_path):
    model = save_tiny(family, tmp_path / "model", num_hidden_layers=2)
    asked = SETTINGS | {"calib": str(text)} | settings
    with pretended_gpu():
        there = cloq.quantize(str(model), out=tmp_path / "there", device="cuda:0", **asked)
    here = cloq.quantize(str(model), out=tmp_path / "here", device="cpu", **asked)
    assert digest(there.out) == digest(here.out)
    assert {name: layer.metrics.error_corrected for name, layer in there.layers.items()} == {
        name: layer.metrics.error_corrected for name, layer in here.layers.items()
    }
    assert any("loops over columns ran as single operations on the GPU" in note for note in there.report.notes)


@pytest.mark.parametrize(("free", "waits"), [(1 << 30, "cuda"), (1 << 15, "cpu")])
def test_activations_wait_where_there_is_room(free, waits, tmp_path):
    model = save_tiny("llama", tmp_path, num_hidden_layers=2)
    spec, tokens = run_spec(model=str(model)), torch.arange(64).reshape(2, 32)
    outputs = []
    for context in (pretended_gpu(free), contextlib.nullcontext()):
        with context:
            decoder = Decoder(model, "cpu" if outputs else "cuda:0")
            place = place_to_wait(spec, decoder.device, 2 * 64 * decoder.bytes_of_a_token)
            (batch,) = decoder.enter(tokens, 64, waiting=waiting_in(place, tmp_path))
            where = [batch.hidden.device.type]
            for index in range(2):
                decoder.load_block(index)
                returned = decoder.run_block(index, batch)
                assert returned.device == decoder.device
                batch = batch.onwards(returned)
                where.append(batch.hidden.device.type)
            assert where == ["cpu" if outputs else waits] * 3
            with decoder.outer():
                outputs.append(decoder.leave(batch.hidden, tokens).cpu())
    assert torch.equal(*outputs)
    for asked in ("host", "device", "disk"):
        with pretended_gpu(free):
            assert place_to_wait(run_spec(activations=asked), torch.device("cuda:0"), 1) == asked


def test_a_plan_says_what_lies_on_the_gpu(text, tmp_path):
    model = save_tiny("llama", tmp_path, num_hidden_layers=2)
    spec = run_spec(model=str(model), calib=str(text), calib_samples=64, seq_len=32, rank=4, fisher=0.0)
    host = plan(spec, Decoder(model), MACHINE)
    with pretended_gpu():
        there = plan(spec, Decoder(model, "cuda:0"), MACHINE)
        aside = plan(spec.replace(activations="host"), Decoder(model, "cuda:0"), MACHINE)
        followed = plan(spec.replace(fisher=0.9, activations="host"), Decoder(model, "cuda:0"), MACHINE)
    assert not host.device_memory and "activations" in host.memory
    assert "activations" in there.device_memory and "activations" not in there.memory and "a block" in there.device_memory
    assert "activations" in aside.memory and "activations" not in aside.device_memory
    assert {"a backward pass", "gradients"} <= set(followed.device_memory)  # the fullest moment of a model as small as this
    assert any("on cuda:0" in line for line in there.lines()) and not any("on cpu" in line and "memory" in line for line in host.lines())


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
