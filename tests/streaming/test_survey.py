"""What widths and ranks cost the loss, and runs that spend a mean of them: against brute force, interrupted, and with rules beside it."""

import json
import math

import pytest
import torch

from cloq.api import open_decoder, run
from cloq.errors import ExportError, SpecError
from cloq.specs import RunSpec, run_spec
from cloq.streaming import survey
from cloq.streaming.distributed import ALONE
from cloq.streaming.fisher import squared_gradients_of
from cloq.streaming.layers import plan_layers
from cloq.streaming.store import SURVEY_FILE, Store
from cloq.types import LayerStats
from cloq.use.check import check
from tests.problems import optimum, output_error, problem
from tests.test_api import digest
from tests.tiny import load_plain, tiny_spec

ASKED = {"mean_bits": 2.5, "adaptive_rank": True}


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> RunSpec:
    return tiny_spec(tmp_path_factory.mktemp("survey"), **ASKED)


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory):
    return run(spec, tmp_path_factory.mktemp("whole") / "out")


# -- one layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["power law", "rank deficient", "outlier channel"])
def test_what_factors_leave_is_the_optimum_of_the_weighted_problem(kind):
    shape, ranks = (24, 40), [0, 1, 3, 8, 24]
    weight, gram = problem(kind, shape).weight, problem(kind, shape).gram
    squared = torch.rand(24, generator=torch.Generator().manual_seed(3)) ** 4
    left = survey.left_behind(weight, LayerStats(gram, 100), squared, ranks)
    weighted = squared.double().sqrt()[:, None] * weight.double()
    for rank, loss in zip(ranks, left.tolist(), strict=True):
        assert loss * 2 * 100 == pytest.approx(optimum(weighted, gram, rank) if rank < 24 else 0.0, rel=1e-3, abs=1e-9)
    assert left[-1] == 0 and (left.diff() <= 0).all()


def test_without_tokens_nothing_is_lost():
    assert survey.left_behind(torch.ones(3, 4), LayerStats(torch.zeros(4, 4), 0), torch.ones(3), [1, 2]).tolist() == [0, 0]


def test_small_errors_cost_the_loss_what_the_survey_says(tmp_path):
    """The second order of the loss itself: weights moved at random by little, the divergence of the predictions measured. Labels are drawn
    from the model, so that what is measured is the Fisher information; inputs and outputs are taken to be independent, so nearly."""
    spec = tiny_spec(tmp_path)
    decoder = open_decoder(spec)
    tokens = torch.randint(1, 257, (64, 32), generator=torch.Generator().manual_seed(1))
    layers, store = plan_layers(spec, decoder), Store(tmp_path / "out")
    store.begin({})
    squared = squared_gradients_of(spec, decoder, layers, tokens, store, ALONE)
    model = load_plain(decoder.folder)
    grams: dict[str, torch.Tensor] = {}
    for name in layers:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda module, args, name=name: grams.__setitem__(name, args[0].flatten(0, 1).T @ args[0].flatten(0, 1))
        )
    with torch.no_grad():
        before = model(input_ids=tokens).logits.log_softmax(-1)
    ratios, draw = [], torch.Generator().manual_seed(0)
    for name in list(grams):
        weight = model.get_submodule(name).weight.data
        error = torch.randn(weight.shape, generator=draw) * 1e-2 * weight.std()
        predicted = float(survey.left_behind(error, LayerStats(grams[name], tokens.numel()), squared[name], [1])[0])
        full = 0.5 * output_error(squared[name].sqrt()[:, None] * error, grams[name]) / tokens.numel()
        weight += error
        with torch.no_grad():
            after = model(input_ids=tokens).logits.log_softmax(-1)
        weight -= error
        measured = float((before.exp() * (before - after)).sum(-1).mean())
        assert predicted <= full
        ratios.append(measured / full)
    assert 0.7 < math.exp(sum(map(math.log, ratios)) / len(ratios)) < 1.4
    assert all(0.3 < ratio < 3 for ratio in ratios)


# -- a run -------------------------------------------------------------------------------------------------------------


def means(result) -> tuple[float, float]:
    """Bits per weight, and the rank in parameters."""
    layers = result.layers.values()
    weights = sum(math.prod(s.layout.shape) for s in layers)
    return (
        sum(s.layout.bits * math.prod(s.layout.shape) for s in layers) / weights,
        sum(s.metrics.rank * sum(s.layout.shape) for s in layers) / sum(sum(s.layout.shape) for s in layers),
    )


def test_means_are_kept_to_and_used_up(whole):
    bits, rank = means(whole)
    assert 2.4 < bits <= 2.5 and 3.7 < rank <= 4
    assert {s.layout.bits for s in whole.layers.values()} == {2, 3, 4}
    assert len({s.metrics.rank for s in whole.layers.values()}) > 2
    for block in range(3):
        for together in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({whole.layers[f"model.layers.{block}.{name}"].layout.bits for name in together}) == 1


def test_the_choice_costs_the_loss_less_than_the_same_for_all(spec, whole):
    losses, _ = Store(whole.out).kept_survey()
    decoder = open_decoder(spec)
    layers = plan_layers(spec, decoder)

    def cost(name: str, bits: int, rank: int) -> float:
        widths, ranks = survey.possible(spec, name, layers[name], whole.layers[name].layout.shape)
        return float(losses[name][widths.index(bits), ranks.index(rank)])

    chosen = sum(cost(name, s.layout.bits, s.metrics.rank) for name, s in whole.layers.items())
    assert chosen < sum(0.5 * (cost(name, 2, 4) + cost(name, 3, 4)) for name in layers)


def test_a_continued_run_chooses_alike_from_what_was_found(spec, whole, tmp_path, monkeypatch):
    calls = []
    find = survey.survey
    monkeypatch.setattr(survey, "survey", lambda *args: calls.append(1) or find(*args))

    class Killed(BaseException):
        pass

    def kill(event, values):
        if event == "block":
            raise Killed

    with pytest.raises(Killed):
        run(spec, tmp_path / "out", emit=kill)
    run(spec, tmp_path / "out")
    assert len(calls) == 1 and digest(tmp_path / "out") == digest(whole.out)
    path = tmp_path / "out/.cloq" / SURVEY_FILE
    path.write_bytes(path.read_bytes()[:-2])
    (tmp_path / "out/.cloq/blocks/00002.safetensors").unlink()
    run(spec, tmp_path / "out")
    assert len(calls) == 2 and digest(tmp_path / "out") == digest(whole.out)


def test_what_rules_say_is_no_part_of_a_mean(spec, tmp_path):
    rules = [{"match": "*.0.self_attn.v_proj", "bits": 8}, {"match": "down_proj", "rank": 2}]
    result = run(run_spec(spec, rules=rules, skip=("*.layers.1.mlp.*",)), tmp_path / "out")
    assert result.layers["model.layers.0.self_attn.v_proj"].layout.bits == 8
    assert {s.metrics.rank for name, s in result.layers.items() if name.endswith("down_proj")} == {2}
    assert not any(".1.mlp" in name for name in result.layers)
    free = [s.layout for name, s in result.layers.items() if name != "model.layers.0.self_attn.v_proj"]
    assert sum(x.bits * math.prod(x.shape) for x in free) / sum(math.prod(x.shape) for x in free) <= 2.5


def test_ranks_alone_and_on_a_given_base(spec, whole, tmp_path):
    ranks = run(spec.replace(mean_bits=None), tmp_path / "ranks")
    assert {s.layout.bits for s in ranks.layers.values()} == {2} and len({s.metrics.rank for s in ranks.layers.values()}) > 2
    assert 3.7 < means(ranks)[1] <= 4
    given = run(spec.replace(mean_bits=None, quantized=str(whole.base)), tmp_path / "given")
    assert {name: s.layout.bits for name, s in given.layers.items()} == {name: s.layout.bits for name, s in whole.layers.items()}
    assert len({s.metrics.rank for s in given.layers.values()}) > 2


def test_factors_that_undo_nothing_are_not_reckoned_with(spec, whole, tmp_path):
    zero = run(run_spec(spec, init="zero", adaptive_rank=False), tmp_path / "out")
    assert 2.4 < means(zero)[0] <= 2.5
    ours, theirs = (Store(made.out).kept_survey()[0] for made in (zero, whole))
    for name, losses in ours.items():
        assert losses.shape == (3, 1) and (losses[:, 0] > theirs[name][:, 0]).all()


def test_several_widths_are_refused_before_the_work_where_a_format_has_one(spec, tmp_path):
    with pytest.raises(ExportError, match="4 bits, asymmetric"):
        run(spec, tmp_path / "out", form="container")
    assert not (tmp_path / "out").exists()
    made = run(run_spec(spec, symmetric=True, adaptive_rank=False), tmp_path / "out", form="container")
    config = json.loads((made.base / "config.json").read_text())["quantization_config"]
    assert config["bits"] == 4 and "dynamic" not in config


def test_what_is_asked_for():
    assert run_spec(bits=2.5).mean_bits == 2.5 and run_spec(bits=3.0).quant.bits == 3
    assert run_spec(run_spec(bits=2.5), bits=3).mean_bits is None and run_spec(bits=2, mean_bits=3.0).mean_bits == 3.0
    for settings, said in [
        ({"bits": 4.5}, "the mean width is 4.5 bits"),
        ({"bits": math.nan}, "the mean width is nan bits"),
        ({"bits": 2.5, "quantizer": "rtn", "quantized": "base"}, "the base is given and has its own"),
        ({"mean_bits": 4.0, "bits": 4, "quantizer": "nf4"}, "nf4 has 4 bits and no others"),
        ({"adaptive_rank": True, "init": "eora"}, "adaptive_rank is True, which init 'eora' makes no use of"),
    ]:
        with pytest.raises(SpecError, match=said):
            run_spec(**settings)


def test_the_folder_says_how_it_is_loaded(whole):
    card = (whole.out / "README.md").read_text()
    assert "2.5 bits with cloq factors" in card and "Layers have several widths" in card and "cloq.load(" in card
    assert "AutoModelForCausalLM" not in card
    assert any(f.ok and "several widths, which cloq.load and GPTQModel load" in f.what for f in check(whole.out))
    assert whole.report.describe_base() == "GPTQ, 2 bits in groups of 32, 3 bits in groups of 32, 4 bits in groups of 32, asymmetric"
    assert whole.report.describe_adapter().startswith("CLoQ factors of ranks 1 to ")
