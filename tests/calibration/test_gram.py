"""Gram sums and shared inputs, against a block small enough to do by hand."""

import pytest
import torch
from torch import Tensor, nn

from cloq.calibration import gram as sums
from cloq.calibration import gram_matrices, shared_inputs, summed
from cloq.errors import ModelError
from cloq.types import LayerStats

WIDTH, HIDDEN = 6, 10


class Block(nn.Module):
    """A block like a decoder's: q, k, v share an input, so do gate and up. `spare` is never reached. The order of definition is
    not that of execution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.spare = nn.Linear(3, 5)
        self.up, self.gate = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.o = nn.Linear(WIDTH, WIDTH - 1)
        self.back = nn.Linear(WIDTH - 1, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.finished = 0

    def forward(self, x: Tensor) -> Tensor:
        n = nn.functional.layer_norm(x, (WIDTH,))
        mixed = self.q(n) * self.k(input=n) + self.v(n)
        x = x + self.back(self.o(mixed))
        n = nn.functional.layer_norm(x, (WIDTH,))
        x = x + self.down(nn.functional.silu(self.gate(n)) * self.up(n))
        self.finished += 1
        return x

    @torch.no_grad()
    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        """By hand, in float64."""
        block = Block().double()
        x = x.double()
        n = nn.functional.layer_norm(x, (WIDTH,))
        mixed = block.q(n) * block.k(n) + block.v(n)
        o = block.o(mixed)
        x = x + block.back(o)
        m = nn.functional.layer_norm(x, (WIDTH,))
        return {
            "q": n,
            "k": n,
            "v": n,
            "o": mixed,
            "back": o,
            "gate": m,
            "up": m,
            "down": nn.functional.silu(block.gate(m)) * block.up(m),
        }


def linears(block):
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 5, WIDTH, generator=generator) for n in sizes]


def grams(block, xs, names):
    return gram_matrices([lambda x=x: block(x) for x in xs], linears(block), names)


def test_groups_are_in_the_order_of_execution():
    block = Block()
    groups = shared_inputs(lambda: block(batches(2)[0]), linears(block))
    assert groups == [["q", "k", "v"], ["o"], ["back"], ["gate", "up"], ["down"], ["spare"]]


def test_grams_are_those_of_the_naive_twin():
    block, xs = Block(), batches(2, 3, 1)
    stats = grams(block, xs, ["q", "k", "o", "back", "gate", "down"])
    for name, (gram, count) in {name: (s.gram, s.n_tokens) for name, s in stats.items()}.items():
        tokens = torch.cat([block.inputs(x)[name].flatten(0, 1) for x in xs])
        naive = sum(torch.outer(token, token) for token in tokens)
        torch.testing.assert_close(gram.double(), naive, rtol=1e-5, atol=1e-5 * float(naive.abs().max()))
        assert count == len(tokens) == 30 and gram.dtype == torch.float32


@pytest.mark.parametrize("panel", (1, 4, 256))
def test_a_triangle_by_panels_is_the_whole(panel, monkeypatch):
    monkeypatch.setattr(sums, "PANEL", panel)
    block, xs = Block(), batches(2, 3)
    found = grams(block, xs, ["down"])["down"].gram
    tokens = torch.cat([block.inputs(x)["down"].flatten(0, 1) for x in xs])
    torch.testing.assert_close(found.double(), tokens.T @ tokens, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.T)


def test_layers_of_one_group_have_one_gram():
    block, xs = Block(), batches(2, 2)
    for group in shared_inputs(lambda: block(xs[0]), linears(block))[:-1]:
        stats = grams(block, xs, group)
        assert all(torch.equal(stats[name].gram, stats[group[0]].gram) for name in group)


def test_sums_over_two_halves_are_the_whole():
    block, xs = Block(), batches(2, 3, 1, 2)
    names = ["q", "down"]
    whole, first, second = grams(block, xs, names), grams(block, xs[:2], names), grams(block, xs[2:], names)
    for name in names:
        merged = first[name] + second[name]
        torch.testing.assert_close(merged.gram, whole[name].gram, rtol=1e-6, atol=1e-5)
        assert merged.n_tokens == whole[name].n_tokens == 40
        assert torch.equal((second[name] + first[name]).gram, merged.gram)


def test_batching_does_not_matter():
    block, (x,) = Block(), batches(6)
    one, many = grams(block, [x], ["down"])["down"], grams(block, x.split(1), ["down"])["down"]
    torch.testing.assert_close(one.gram, many.gram, rtol=1e-6, atol=1e-5)
    assert one.n_tokens == many.n_tokens


def test_the_forward_stops_when_all_is_seen():
    block, xs = Block(), batches(1, 1, 1)
    stats = grams(block, xs, ["o", "q"])
    assert block.finished == 0 and stats["q"].n_tokens == stats["o"].n_tokens == 15
    reached = []
    block.down.register_forward_pre_hook(lambda module, args: reached.append(1))
    grams(block, xs, ["gate"])
    assert not reached
    grams(block, xs, ["down", "spare"])  # one is never seen: every forward runs to its end
    assert block.finished == 3 and len(reached) == 3


def test_a_layer_that_saw_nothing_has_a_zero_gram():
    block = Block()
    stats = grams(block, batches(1), ["spare", "q"])["spare"]
    assert stats.n_tokens == 0 and stats.gram.shape == (3, 3) and not stats.gram.any()
    assert grams(block, [], ["q"])["q"].n_tokens == 0


def test_conv1d_that_saw_nothing():
    from transformers.pytorch_utils import Conv1D

    stats = gram_matrices([], {"c": Conv1D(7, 4)}, ["c"])["c"]  # (out, in): its weight is (in, out)
    assert stats.gram.shape == (4, 4)


def test_hooks_are_gone_whatever_happened():
    block = Block()

    def fails():
        block.q(torch.zeros(1, WIDTH))
        raise RuntimeError("out of memory")

    for use in (shared_inputs, lambda run, modules: gram_matrices([run], modules, list(modules))):
        with pytest.raises(RuntimeError, match="out of memory"):
            use(fails, linears(block))
        assert not any(module._forward_pre_hooks for module in block.modules())


class Small(nn.Module):
    """Two layers and a forward to choose."""

    def __init__(self, run):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        self.run = run

    def groups(self, x):
        return shared_inputs(lambda: self.run(self, x), {"a": self.a, "b": self.b})


APART = {
    "equal values in other memory": lambda m, x: (m.a(x), m.b(x.clone())),
    "written to in between": lambda m, x: (m.a(x), m.b(x.mul_(2))),
    "another shape": lambda m, x: (m.a(x), m.b(x.flatten(0, 1))),
    "other strides": lambda m, x: (m.a(x), m.b(x.transpose(0, 1))),
    "a part of it": lambda m, x: (m.a(x), m.b(x[:1])),
    "another part of it": lambda m, x: (m.a(x[:1]), m.b(x[1:])),
    "nothing, twice": lambda m, x: (m.a(torch.zeros(0, 4)), m.b(torch.zeros(0, 4))),
    "a buffer that was freed and used again": lambda m, x: (m.a(torch.ones(2, 2, 4)), m.b(torch.zeros(2, 2, 4))),
}


@pytest.mark.parametrize("run", APART.values(), ids=APART)
def test_what_is_not_the_same_input(run):
    assert Small(run).groups(torch.randn(2, 2, 4)) == [["a"], ["b"]]


TOGETHER = {
    "the tensor itself": lambda m, x: (m.a(x), m.b(x)),
    "a view of all of it": lambda m, x: (m.a(x), m.b(x.view(2, 2, 4))),
    "by keyword": lambda m, x: (m.a(input=x), m.b(x)),
    "detached": lambda m, x: (m.a(x), m.b(x.detach())),
}


@pytest.mark.parametrize("run", TOGETHER.values(), ids=TOGETHER)
def test_what_is_the_same_input(run):
    assert Small(run).groups(torch.randn(2, 2, 4)) == [["a", "b"]]
    with torch.inference_mode():
        assert Small(run).groups(torch.randn(2, 2, 4)) == [["a", "b"]]


def test_a_layer_that_runs_twice_is_refused():
    twice = Small(lambda m, x: (m.a(x), m.a(x), m.b(x)))
    x = torch.randn(2, 2, 4)
    message = "a runs more than once in one forward of its block.*--skip a"
    with pytest.raises(ModelError, match=message):
        twice.groups(x)
    with pytest.raises(ModelError, match=message):
        gram_matrices([lambda: twice.run(twice, x)], {"a": twice.a, "b": twice.b}, ["a", "b"])
    one_module = {"a": twice.a, "also a": twice.a}  # one module under two names is two hooks on one forward
    assert shared_inputs(lambda: twice.a(x), one_module) == [["a", "also a"]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_float32_whatever_the_activations(dtype):
    """4096 tokens of all ones: in half precision a running sum stops at 2048 (float16) or 256 (bfloat16)."""
    layer = nn.Linear(3, 2).to(dtype)
    x = torch.ones(1, 3, dtype=dtype)
    stats = gram_matrices([lambda: layer(x)] * 4096, {"l": layer}, ["l"])["l"]
    assert stats.gram.dtype == torch.float32 and (stats.gram == 4096).all() and stats.n_tokens == 4096


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e20])
def test_activations_that_overflow_are_refused(value):
    layer = nn.Linear(4, 3)
    bad = torch.randn(5, 4)
    bad[3, 2] = value
    with pytest.raises(ModelError, match="the inputs of l hold NaN, Inf or values beyond float32"):
        gram_matrices([lambda: layer(torch.randn(5, 4)), lambda: layer(bad)], {"l": layer}, ["l"])


def test_inputs_are_left_alone():
    block, (x,) = Block(), batches(2)
    before = x.clone()
    grams(block, [x], ["q"])
    assert torch.equal(x, before)


MATMULS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def precisions():
    return [matmul.fp32_precision for matmul in MATMULS]


def choose(*values):
    for matmul, value in zip(MATMULS, values, strict=True):
        matmul.fp32_precision = value


CHOICES = {
    "nothing": lambda: None,
    "the old way": lambda: torch.set_float32_matmul_precision("high"),
    "the new way": lambda: choose("tf32", "tf32"),
}


class Watched(Tensor):
    """Notes the precision in which it is multiplied."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is Tensor.addmm_:
            cls.seen.append(precisions())
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.fixture
def put_back():
    """The precision as it was; first in the old way, for torch refuses the old setting where it differs from the new one."""
    before = precisions()
    yield
    torch.set_float32_matmul_precision("highest")
    choose(*before)
    Watched.seen.clear()


@pytest.mark.skipif(not hasattr(MATMULS[0], "fp32_precision"), reason="torch before 2.9 has one way of choosing only")
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_the_callers_matmul_precision_is_set_aside_for_the_sums_alone(choice, put_back):
    layer, x, in_forward = nn.Linear(4, 3), torch.randn(5, 4).as_subclass(Watched), []
    choice()
    chosen = precisions()
    gram_matrices([lambda: (in_forward.append(precisions()), layer(x))], {"l": layer}, ["l"])
    assert Watched.seen == [["ieee", "ieee"]]
    assert in_forward == [chosen] and precisions() == chosen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sums_on_a_gpu_are_float32_even_where_tf32_was_chosen(monkeypatch):
    """TF32 keeps 10 bits of each factor: a relative error near 1e-3 where float32 has 1e-6."""
    layer = nn.Linear(96, 3, device="cuda")
    x = torch.randn(512, 96, device="cuda")
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    gram = gram_matrices([lambda: layer(x)], {"l": layer}, ["l"])["l"].gram
    naive = x.double().T @ x.double()
    assert float((gram.double() - naive).norm() / naive.norm()) < 1e-5


@pytest.mark.parametrize("width", [5, sums.PANEL, 2 * sums.PANEL + 3])
def test_sums_over_processes_are_exactly_symmetric_and_move_one_triangle(width):
    """As if another process had the same numbers of tokens, and a Gram matrix with noise that is not symmetric below the diagonal."""
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(7, width, generator=generator)
    own = {"a": LayerStats(rows.T @ rows, 7), "unseen": LayerStats(torch.zeros(3, 3), 0)}
    other, before, moved = torch.randn(width, width, generator=generator), own["a"].gram.clone(), []

    def add(panels):
        for panel in panels:
            start = width - panel.shape[1]
            moved.append(panel.numel())
            panel += other[start : start + sums.PANEL, start:]

    found = summed(own, lambda counts: {name: 2 * n for name, n in counts.items()}, add)
    assert {name: stats.n_tokens for name, stats in found.items()} == {"a": 14, "unseen": 0}
    assert torch.equal(found["a"].gram, found["a"].gram.T) and torch.equal(found["a"].gram.triu(), (before + other).triu())
    assert not found["unseen"].gram.any()
    assert sum(moved) <= width * (width + sums.PANEL) / 2 + sums.PANEL**2


def test_sums_beyond_float32_are_refused():
    own = {"a": LayerStats(torch.full((2, 2), 3e38), 1)}

    def add(panels):
        for panel in panels:
            panel *= 2

    with pytest.raises(ModelError, match="the inputs of a hold"):
        summed(own, dict, add)
