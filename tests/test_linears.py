"""What a linear layer is, decided by what the module computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from cloq.linears import fused_experts, routers
from cloq.models import is_conv1d, is_linear, linear_shape, set_weight


class Spelled(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Chooser(nn.Linear):
    def forward(self, x):
        return super().forward(x).topk(1)


class Configured(nn.Linear):
    def forward(self, x):
        return super().forward(x) * self.scale


class Inherited(nn.Linear):
    pass


@pytest.mark.parametrize("kind", [nn.Linear, Spelled, Inherited])
def test_linear(kind):
    assert is_linear(kind(3, 5)) and not is_conv1d(kind(3, 5))
    assert linear_shape(kind(3, 5)) == (5, 3)


@pytest.mark.parametrize("kind", [Doubled, Chooser, Configured])
def test_not_linear(kind):
    assert not is_linear(kind(3, 5))


def test_conv1d_is_linear_the_other_way_round():
    layer = Conv1D(5, 3)  # out, in
    assert is_linear(layer) and is_conv1d(layer)
    assert layer.weight.shape == (3, 5) and linear_shape(layer) == (5, 3)
    assert not is_linear(nn.Conv1d(3, 5, 1)) and not is_linear(nn.Embedding(3, 5)) and not is_linear(nn.Bilinear(3, 4, 5))


def test_looking_draws_no_random_numbers():
    class Fresh(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    module = Fresh(3, 5)
    before = torch.random.get_rng_state()
    assert is_linear(module)
    assert torch.equal(torch.random.get_rng_state(), before)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 7), columns=st.integers(1, 7), conv=st.booleans(), half=st.booleans())
def test_set_weight_is_what_the_layer_then_computes(rows, columns, conv, half):
    layer = Conv1D(rows, columns) if conv else nn.Linear(columns, rows)
    layer = layer.to(torch.bfloat16) if half else layer
    weight = torch.randn(rows, columns)
    set_weight(layer, weight)
    assert layer.weight.dtype == (torch.bfloat16 if half else torch.float32) and layer.weight.is_contiguous()
    x = torch.randn(3, columns)
    tolerance = {"rtol": 0.05, "atol": 0.1} if half else {}
    torch.testing.assert_close(layer(x.to(layer.weight.dtype)).float(), x @ weight.T + layer.bias.float(), **tolerance)


def test_set_weight_refuses_another_shape():
    with pytest.raises(ValueError, match=r"\(3, 5\) does not fit .*\(5, 3\)"):
        set_weight(nn.Linear(3, 5), torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"\(3, 5\) does not fit .*\(5, 3\)"):
        set_weight(Conv1D(5, 3), torch.zeros(3, 5))


class Experts(nn.Module):
    def __init__(self, count: int, width: int, inner: int):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(count, inner, width))
        self.down = nn.Parameter(torch.zeros(count, width, inner))


def block(experts: nn.Module, gate: nn.Module, **more: nn.Module) -> nn.Module:
    attention = nn.ModuleDict({"q_proj": nn.Linear(32, 48), "kv_proj": nn.Linear(32, 4)})  # four outputs, but no router
    mixture = nn.ModuleDict({"gate": gate, "experts": experts, "shared": nn.Linear(32, 40)} | more)
    return nn.ModuleDict({"attention": attention, "mixture": mixture})


def test_routers_of_fused_experts():
    found = block(Experts(4, 32, 24), nn.Linear(32, 4), shared_gate=nn.Linear(32, 1))
    assert fused_experts(found) == ["mixture.experts.up", "mixture.experts.down"]
    assert routers(found) == ["mixture.gate", "mixture.shared_gate"]


def test_routers_of_experts_in_a_list():
    found = block(nn.ModuleList(nn.Linear(32, 4) for _ in range(4)), nn.ModuleDict({"choice": nn.Linear(32, 4)}))
    assert fused_experts(found) == []
    assert routers(found) == ["mixture.gate.choice"]  # the experts themselves have four outputs too


def test_no_experts_no_routers():
    dense = nn.ModuleDict({"gate": nn.Linear(32, 4), "router": nn.Linear(32, 1), "up": nn.Linear(32, 48)})
    assert fused_experts(dense) == [] and routers(dense) == []


def test_small_loose_weights_are_no_experts():
    recurrent = nn.ModuleDict({"in": nn.Linear(64, 256), "out": nn.Linear(256, 64), "conv": nn.Conv1d(256, 256, 4)})
    recurrent.register_parameter("decay", nn.Parameter(torch.zeros(64, 16)))
    recurrent.register_parameter("mix", nn.Parameter(torch.zeros(1, 1, 20000)))
    assert fused_experts(recurrent) == []
    recurrent.register_parameter("experts", nn.Parameter(torch.zeros(4, 64, 300)))
    assert fused_experts(recurrent) == ["experts"]
