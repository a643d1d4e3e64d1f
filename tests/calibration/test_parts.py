"""Parts of a block that end in one of its layers: found for what they are, and nothing else for one."""

import pytest
import torch
from torch import Tensor, nn

from cloq.calibration import parts_that_end_in
from cloq.models import Decoder
from tests.tiny import save_tiny


class Inner(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.up, self.down, self.returned = nn.Linear(4, 6), nn.Linear(6, 4), returned

    def forward(self, x: Tensor):
        return self.returned(self, self.down(self.up(x)), x)


class Block(nn.Module):
    def __init__(self, returned, then=lambda y, x: x + (y if isinstance(y, Tensor) else y[0])):
        super().__init__()
        self.outer = nn.ModuleDict({"inner": Inner(returned)})
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.outer["inner"](x), x)


def found(block: nn.Module) -> dict:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    ends = parts_that_end_in(lambda: block(x), block, ["outer.inner.up", "outer.inner.down"])
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in block.modules())
    return {part: tuple(end) for part, end in ends.items()}


@pytest.mark.parametrize(
    ("returned", "kind", "nones"),
    [
        (lambda m, y, x: y, None, 0),
        (lambda m, y, x: (y, None, None), tuple, 2),
        (lambda m, y, x: [y], list, 0),
        (lambda m, y, x: nn.functional.dropout(y, 0.5, training=False), None, 0),
    ],
)
def test_what_a_part_returns_is_its_last_layers_output(returned, kind, nones):
    assert found(Block(returned)) == {"outer.inner": ("outer.inner.down", kind, nones)}


@pytest.mark.parametrize(
    "block",
    [
        Block(lambda m, y, x: y + x),
        Block(lambda m, y, x: 2 * y),
        Block(lambda m, y, x: 0 * y),
        Block(lambda m, y, x: (x, y), lambda y, x: y[0] + y[1]),
        Block(lambda m, y, x: (y, x), lambda y, x: y[0] + y[1]),  # all of what it returns is used
        Block(lambda m, y, x: m.down(m.up(x))),  # its layers run twice
    ],
)
def test_what_does_more_is_no_such_part(block):
    assert found(block) == {}


def test_a_part_that_returns_more_than_is_used_is_one():
    assert found(Block(lambda m, y, x: (y, x), lambda y, x: y[0] + x)) == {"outer.inner": ("outer.inner.down", tuple, 1)}


def test_a_part_that_leaves_something_behind_is_tried_and_dropped():
    def returned(module: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        module.left = [x]
        return y

    block = Block(returned)
    block.then = lambda y, x: y + block.outer["inner"].left.pop()
    assert found(block) == {}


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("llama", {"self_attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}),
        ("gpt2", {"attn": "attn.c_proj", "mlp": "mlp.c_proj"}),
        ("phi3", {"self_attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}),
        ("opt", {"self_attn": "self_attn.out_proj"}),
        ("gpt_neox", {"attention": "attention.dense", "mlp": "mlp.dense_4h_to_h"}),
        ("falcon", {"self_attention": "self_attention.dense", "mlp": "mlp.dense_4h_to_h"}),
        ("mamba", {}),  # uses a weight without calling its layer
        ("bloom", {}),  # adds the residual inside
        ("gemma2", {"self_attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}),
    ],
)
def test_parts_of_real_families(family, ends, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path))
    (batch,) = decoder.enter(torch.arange(16)[None], 16)
    block, prefix = decoder.load_block(0), decoder.block_name(0) + "."
    layers = [name.removeprefix(prefix) for name in decoder.linears(0)]
    assert {part: end.layer for part, end in parts_that_end_in(lambda: decoder.run_block(0, batch), block, layers).items()} == ends
