"""Experts taken apart: the same numbers as transformers' fused ones, expert by expert and token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cloq.calibration import gram_matrices, topped_up
from cloq.errors import ModelError, SpecError
from cloq.models import Decoder, is_linear
from cloq.models import decoder as decoding
from cloq.models.experts import ExpertLayer, Experts, experts_of, fuse, rounds, unfuse
from cloq.models.origins import Slice
from cloq.specs import Rule, run_spec
from cloq.streaming.layers import plan_layers
from cloq.types import LayerStats
from tests.tiny import load_plain, save_tiny, tiny_model

APART = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss", "deepseek_v3")
TOGETHER = ("jetmoe", "dbrx")
"""Classes that do not say how their experts lie."""

TOKENS = torch.randint(1, 250, (3, 20), generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def last_batch(decoder: Decoder, batch_tokens: int = 1 << 20):
    """The last block's inputs, with that block loaded."""
    batches = decoder.enter(TOKENS, batch_tokens)
    for index in range(len(decoder.blocks) - 1):
        decoder.load_block(index)
        batches = [batch.onwards(decoder.run_block(index, batch)) for batch in batches]
        decoder.drop_block(index)
    decoder.load_block(len(decoder.blocks) - 1)
    return batches


# -- where they lie ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", APART)
def test_every_expert_is_a_part_of_the_fused_parameters_and_they_of_all_experts(family, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path))
    fused, last = load_plain(tmp_path), len(decoder.blocks) - 1
    ((path, experts),) = decoder.experts(last).items()
    again = fuse(experts, lambda layer, kind: decoder.read(f"{path}.{layer}.{kind}"))
    stated = {name: p for name, p in fused.get_submodule(path).named_parameters()}
    assert again.keys() == stated.keys() and all(torch.equal(again[leaf], stated[leaf]) for leaf in stated)
    expert, width = experts[1], decoder.config.hidden_size
    assert expert.up_proj.weight.shape[1] == expert.down_proj.weight.shape[0] == width
    gate_up = stated["gate_up_proj"][1].T if family == "gpt_oss" else stated["gate_up_proj"][1]
    gate, up = (gate_up[::2], gate_up[1::2]) if family == "gpt_oss" else gate_up.chunk(2)
    assert torch.equal(decoder.read(f"{path}.1.gate_proj.weight"), gate) and torch.equal(decoder.read(f"{path}.1.up_proj.weight"), up)


@pytest.mark.parametrize("family", APART)
def test_one_expert_is_one_tensor_where_the_files_hold_it_so(family, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path))
    origins = [decoder.source_names[f"{name}.weight"] for name in decoder.expert_layers]
    assert origins and all(isinstance(origin, Slice) == (family in ("granitemoe", "gpt_oss")) for origin in origins)
    if family == "mixtral":
        sources = decoder.source_names["model.layers.1.mlp.experts.2.up_proj.weight"].sources
        assert sources == (("", "model.layers.1.block_sparse_moe.experts.2.w3.weight"),)


@pytest.mark.parametrize("family", APART)
def test_a_model_that_holds_weights_computes_the_same_when_taken_apart(family):
    model = tiny_model(family)
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
        count = sum(parameter.numel() for parameter in model.parameters())
        found = unfuse(model)(input_ids=TOKENS).logits
    assert experts_of(model) and close(found, expected)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("family", TOGETHER)
def test_what_does_not_say_how_it_lies_stays_and_is_refused_unless_the_dense_part_is_named(family, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path))
    assert not decoder.expert_layers and decoder.fused_experts(0)
    with pytest.raises(ModelError, match=r"fuses its experts.*does not say how.*--only"):
        plan_layers(run_spec(model="m"), decoder)
    pattern = decoder.all_linears()[-1].rpartition(".")[2]
    assert any(not layer.dense for layer in plan_layers(run_spec(model="m", only=(pattern,)), decoder).values())


@pytest.mark.parametrize("change", [{"has_post_expert_norm": True}, {"further": nn.Parameter(torch.zeros(2, 2))}, {"has_bias": True}])
def test_experts_that_hold_something_else_too_stay(change):
    model = tiny_model("mixtral", num_hidden_layers=1)
    for name, value in change.items():
        setattr(model.model.layers[0].mlp.experts, name, value)
    assert not experts_of(unfuse(model))


# -- names -------------------------------------------------------------------------------------------------------------


def chosen(decoder: Decoder, **settings) -> list[str]:
    return [name for name, layer in plan_layers(run_spec(model="m", **settings), decoder).items() if not layer.dense]


def test_patterns_and_rules_reach_experts_by_name_and_routers_stay_dense(tmp_path):
    decoder = Decoder(save_tiny("qwen3_moe", tmp_path))
    assert not any(name.endswith("gate") for name in chosen(decoder))
    third = [f"model.layers.{i}.mlp.experts.3.{layer}_proj" for i in (1, 2) for layer in ("gate", "up", "down")]
    assert chosen(decoder, only=("experts.3.*",)) == third
    assert chosen(decoder, only=("experts.*",), skip=("up_proj", "gate_proj", "experts.[012].*")) == [third[2], third[5]]
    layers = plan_layers(run_spec(model="m", rules=(Rule("experts.*.down_proj", bits=4),)), decoder)
    assert {layer.quant.bits for name, layer in layers.items() if ".experts." in name and name.endswith("down_proj")} == {4}
    assert {layer.quant.bits for name, layer in layers.items() if not name.endswith("down_proj") or ".experts." not in name} == {2}
    with pytest.raises(SpecError, match="matches no linear layer"):
        chosen(decoder, only=("experts.4.*",))


def test_experts_side_by_side_are_two_rounds_whichever_were_reached():
    def place(name: str) -> ExpertLayer | None:
        parts = name.split(".")
        return ExpertLayer("moe", int(parts[1]), parts[2] == "down") if parts[0] == "moe" else None

    groups = [["q", "k"], ["o"], ["moe.1.gate", "moe.1.up"], ["moe.1.down"], ["shared"], ["moe.0.gate"], ["moe.0.up"], ["moe.0.down"]]
    assert rounds(groups, place) == [
        [["q", "k"]],
        [["o"]],
        [["moe.1.gate", "moe.1.up"], ["moe.0.gate", "moe.0.up"]],
        [["moe.1.down"], ["moe.0.down"]],
        [["shared"]],
    ]


def test_a_round_is_no_larger_than_its_gram_matrices_may_be(tmp_path, monkeypatch):
    decoder = Decoder(save_tiny("olmoe", tmp_path))
    names = [f"model.layers.0.mlp.experts.{i}.down_proj" for i in range(4)]
    groups = [[name] for name in names]
    assert decoder.rounds(groups, one_by_one=True) == decoder.rounds(groups, one_by_one=False) == [groups]
    monkeypatch.setattr(decoding, "GRAM_BYTES", 4 * 96 * 96 * 2)
    assert decoder.rounds(groups, one_by_one=True) == [groups[:2], groups[2:]]
    monkeypatch.setattr(decoding, "GRAM_BYTES", 1)
    assert decoder.rounds(groups, one_by_one=True) == [[group] for group in groups] and decoder.rounds([], one_by_one=False) == []


# -- statistics --------------------------------------------------------------------------------------------------------


def by_hand(folder, path: str) -> dict[str, tuple[Tensor, int]]:
    """Gram matrices and token counts of the experts at `path`, one expert and one token at a time, from plain transformers' module."""
    model, seen = load_plain(folder), []
    fused = model.get_submodule(path)
    fused.register_forward_pre_hook(lambda module, args: seen.append([a.double() for a in args[:2]]))
    with torch.no_grad():
        model(input_ids=TOKENS)
    ((hidden, chosen),) = seen
    found = {}
    for expert in range(fused.gate_up_proj.shape[0]):
        gate_up, width = fused.gate_up_proj[expert].double(), hidden.shape[1]
        gate, up = gate_up.chunk(2)
        outer, inner, count = torch.zeros(width, width).double(), torch.zeros(len(gate), len(gate)).double(), 0
        for token, choices in zip(hidden, chosen, strict=True):
            if expert in choices.tolist():
                made = nn.functional.silu(gate @ token) * (up @ token)
                outer, inner, count = outer + torch.outer(token, token), inner + torch.outer(made, made), count + 1
        found |= {f"{path}.{expert}.up_proj": (outer, count), f"{path}.{expert}.down_proj": (inner, count)}
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
@pytest.mark.parametrize("batch_tokens", [20, 1 << 20])
@torch.no_grad()
def test_an_experts_gram_matrices_are_of_the_tokens_that_the_router_sends_it(family, batch_tokens, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path))
    last = len(decoder.blocks) - 1
    (path,) = decoder.experts(last)
    expected = by_hand(tmp_path, path)
    runs = [lambda batch=batch: decoder.run_block(last, batch) for batch in last_batch(decoder, batch_tokens)]
    found = gram_matrices(runs, decoder.linears(last), list(expected))
    assert sum(stats.n_tokens for stats in found.values()) == 2 * 2 * TOKENS.numel()  # two layers each, two experts a token
    for name, (gram, count) in expected.items():
        assert found[name].n_tokens == count and close(found[name].gram.double(), gram), name


@torch.no_grad()
def test_an_expert_can_be_shown_tokens_that_are_not_its_own(tmp_path):
    decoder = Decoder(save_tiny("mixtral", tmp_path))
    last = len(decoder.blocks) - 1
    ((path, experts),) = decoder.experts(last).items()
    (batch,), seen = last_batch(decoder), []
    experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    decoder.run_block(last, batch)
    names = [f"{path}.2.up_proj", f"{path}.2.down_proj"]
    with decoder.showing(names, tokens=60, enough=15):
        found = gram_matrices([lambda: decoder.run_block(last, batch)], decoder.linears(last), names)
    shown = seen[0][::4]
    expert = experts[2]
    made = nn.functional.silu(expert.gate_proj(shown)) * expert.up_proj(shown)
    assert [found[name].n_tokens for name in names] == [15, 15]
    assert close(found[names[0]].gram, shown.T @ shown) and close(found[names[1]].gram, made.T @ made)
    after = gram_matrices([lambda: decoder.run_block(last, batch)], decoder.linears(last), names)
    assert after[names[0]].n_tokens < 60 and isinstance(experts, Experts)


def test_the_topped_up_mean_moves_from_the_others_to_the_own():
    own, others = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([2.0, 8.0]))

    def mean(tokens: int) -> Tensor:
        stats = topped_up(LayerStats(tokens * own, tokens), LayerStats(9 * others, 9), 8)
        assert stats.n_tokens == tokens and stats.borrowed == max(0, 8 - tokens)
        return stats.gram / (stats.n_tokens + stats.borrowed)

    assert torch.allclose(mean(0), others) and torch.allclose(mean(8), own) and torch.allclose(mean(100), own)
    assert torch.allclose(mean(2), 0.25 * own + 0.75 * others)
    few = topped_up(LayerStats(0 * own, 0), LayerStats(2 * others, 2), 8)  # of eight tokens two are there: the others' mean square is 5
    assert torch.allclose(few.gram / 8, 0.25 * others + 0.75 * 5 * torch.eye(2))
    alone = LayerStats(own, 1)
    assert topped_up(alone, LayerStats(torch.zeros(2, 2), 0), 8) is alone
    merged = topped_up(alone, LayerStats(others, 1), 8) + topped_up(alone, LayerStats(others, 1), 8)
    assert (merged.n_tokens, merged.borrowed) == (2, 14)


def test_the_layers_of_an_expert_are_linear_layers(tmp_path):
    decoder = Decoder(save_tiny("gpt_oss", tmp_path))
    experts = next(iter(decoder.experts(0).values()))
    assert all(is_linear(experts.get_submodule(name)) and experts.get_submodule(name).bias is not None for name in experts.slots)
