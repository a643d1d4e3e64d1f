"""Whatever precision the caller has asked for: the algebra is exact, forwards on a GPU are in TF32, and what was asked for is back."""

import pytest
import torch

from cloq.algebra import drift, lowrank
from cloq.calibration import gram_matrices
from cloq.initializers import closed_form
from cloq.models import Decoder
from cloq.precision import forward_precision, full_precision
from cloq.quantizers import gptq
from cloq.specs import LayerSpec, LoraSpec, QuantSpec
from cloq.streaming.solve import solve_layer
from tests.calibration.test_gram import MATMULS, choose, precisions
from tests.pretended import pretended_gpu
from tests.problems import problem
from tests.tiny import save_tiny

pytestmark = pytest.mark.skipif(not hasattr(MATMULS[0], "fp32_precision"), reason="torch before 2.9 has one way of choosing only")


@pytest.fixture
def chosen():
    """What a training script may have asked for."""
    before = precisions()
    choose("tf32", "tf32")
    yield precisions()
    choose(*before)


def watched(monkeypatch, module, name):
    """The precisions at each call of a function."""
    seen, function = [], getattr(module, name)

    def call(*args, **kwargs):
        seen.append(precisions())
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return seen


def test_contexts_put_back_what_was_there(chosen):
    with full_precision():
        assert precisions() == ["ieee", "ieee"]
        with forward_precision(torch.device("cuda")):
            assert precisions() == ["tf32", "ieee"]
        with forward_precision(torch.device("cpu")):
            assert precisions() == ["ieee", "ieee"]
        assert precisions() == ["ieee", "ieee"]
    assert precisions() == chosen
    with pytest.raises(ZeroDivisionError), full_precision():
        _ = 1 / 0
    assert precisions() == chosen


def test_the_algebra_is_exact(chosen, monkeypatch):
    p = problem("power law", (24, 64))
    stats, gone_wrong = p.stats, drift.Drift(inputs=0.1 * p.gram)  # before anything watches: they are made by products
    sweeps = watched(monkeypatch, gptq, "round_columns")
    solves = watched(monkeypatch, lowrank, "top_eigenvectors")
    steps = watched(monkeypatch, drift, "_solved")
    products = watched(monkeypatch, torch.Tensor, "__matmul__")
    solved = solve_layer(p.weight, stats, stats, LayerSpec(QuantSpec(group_size=32), 4), LoraSpec(rounds=1))
    solved.effective_weight()
    closed_form(p.weight, stats.gram, 4)
    drift.corrected(p.weight, stats, gone_wrong, 0.5)
    drift.corrected_by_heldout(p.weight, stats, gone_wrong, stats, gone_wrong)
    for seen in (sweeps, solves, steps, products):
        assert seen and all(found == ["ieee", "ieee"] for found in seen)
    assert precisions() == chosen


def test_forwards_on_a_gpu_are_in_tf32_and_their_sums_are_not(tmp_path, monkeypatch):
    model = save_tiny("llama", tmp_path, num_hidden_layers=1)
    tokens = torch.arange(12).reshape(1, 12)
    before = precisions()
    for device, expected in (("cuda:0", "tf32"), ("cpu", before[0])):
        with pretended_gpu() if device != "cpu" else pytest.MonkeyPatch.context():
            decoder = Decoder(model, device)
            (batch,) = decoder.enter(tokens, 12)
            decoder.load_block(0)
            layer, inside = decoder.linears(0)["model.layers.0.mlp.up_proj"], []
            hook = layer.register_forward_hook(lambda *args, inside=inside: inside.append(MATMULS[0].fp32_precision))
            decoder.run_block(0, batch)
            hook.remove()
            sums = watched(monkeypatch, torch.Tensor, "addmm_")
            gram_matrices([lambda decoder=decoder, batch=batch: decoder.run_block(0, batch)], {"up": layer}, ["up"])
        assert inside == [expected]
        assert sums and all(found == ["ieee", "ieee"] for found in sums)
        assert precisions() == before
