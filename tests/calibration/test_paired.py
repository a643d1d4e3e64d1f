"""Two forwards side by side: drift against the naive twin, and where the outputs of layers are added."""

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from cloq.calibration import Seen, gram_matrices, junctions, paired_statistics
from cloq.errors import ModelError
from cloq.models import Decoder
from tests.tiny import save_tiny

WIDTH, HIDDEN = 6, 10


class Block(nn.Module):
    """A pre-norm block; `scaled` is added with a factor, `before_norm` is normalized before it is added."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.second, self.after = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.q, self.k, self.o, self.scaled, self.before_norm = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.dropout = nn.Dropout(0.5)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.finished = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        x = x + self.dropout(self.o(self.q(n) * self.k(n)))
        n = self.second(x)
        x = x + 0.5 * self.scaled(n) + self.after(self.before_norm(n))
        x = x + self.down(nn.functional.silu(self.up(x)))
        self.finished += 1
        return x


LAYERS = ("q", "k", "o", "scaled", "before_norm", "up", "down")
GROUPS = [["q", "k"], ["o"], ["up"], ["down"]]


def linears(block):
    return {name: block.get_submodule(name) for name in LAYERS}


def batches(seed, *sizes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 5, WIDTH, generator=generator) for n in sizes]


def joined(block):
    found = junctions(lambda: block(batches(1, 2)[0]), block, LAYERS)
    return {name: block.get_submodule(to) if to else None for name, to in found.items()}


def by_hand(block, x):
    """Rows of each layer's input and of the streams, in float64."""
    import copy

    b, x = copy.deepcopy(block).double(), x.double()
    n = b.norm(x)
    mixed = b.q(n) * b.k(n)
    first = x + b.o(mixed)
    m = b.second(first)
    second = first + 0.5 * b.scaled(m) + b.after(b.before_norm(m))
    inner = nn.functional.silu(b.up(second))
    rows = {"q": n, "o": mixed, "up": second, "down": inner, "o's stream": x, "down's stream": second}
    return {name: value.detach().flatten(0, -2) for name, value in rows.items()}


def test_sums_are_found_by_moving_outputs():
    block = Block()
    assert junctions(lambda: block(batches(1, 2)[0]), block, LAYERS) == {"o": "second", "down": None}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize(
    ("family", "expected"),
    (
        ("llama", {"self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": None}),
        ("gpt2", {"attn.c_proj": "ln_2", "mlp.c_proj": None}),
        ("gpt_neox", {"attention.dense": None, "mlp.dense_4h_to_h": None}),  # attention and MLP side by side
        ("opt", {"self_attn.out_proj": "final_layer_norm", "fc2": None}),  # in rows of tokens without sequences
        ("gemma2", {}),  # normalizes what it adds
        ("granite", {}),  # scales what it adds
        ("mixtral", {"self_attn.o_proj": "post_attention_layernorm"}),
    ),
)
def test_sums_of_real_families(family, expected, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path))
    batch = decoder.enter(torch.arange(32).reshape(2, 16), 4096)[0]
    decoder.load_block(0)
    names = [n.removeprefix(decoder.block_name(0) + ".") for n in decoder.linears(0) if n not in decoder.expert_layers]
    assert junctions(lambda: decoder.run_block(0, batch), decoder.blocks[0], names) == expected


def test_drift_is_that_of_the_naive_twin():
    block, original = Block(0), Block(1)
    for name in ("o", "down"):  # which are looked at before their weight is replaced
        original.get_submodule(name).load_state_dict(block.get_submodule(name).state_dict())
    pairs = list(zip(batches(2, 2, 3), batches(3, 2, 3), strict=True))
    runs = [(lambda x=x: block(x), lambda y=y: original(y)) for x, y in pairs]
    # the original's sums are looked for in the same modules, as in a model whose weights are exchanged
    outer = {"o": "second", "down": None}
    with torch.no_grad():
        found = [_one(block, original, outer, run) for run in runs]
        wanted = [(by_hand(block, x), by_hand(original, y)) for x, y in pairs]
    for name, first in (("q", "q"), ("k", "q"), ("o", "o"), ("up", "up"), ("down", "down")):
        inputs = sum((true[first] - its[first]).T @ its[first] for its, true in wanted)
        gram = sum(stats[first].gram for stats, _ in found).double()
        if name not in outer:
            torch.testing.assert_close(gram, sum(its[first].T @ its[first] for its, _ in wanted), rtol=1e-4, atol=1e-4)
            assert all(d[name].sums is None for _, d in found)
            torch.testing.assert_close(sum(d[name].inputs for _, d in found).double(), inputs, rtol=1e-4, atol=1e-4)
            continue
        weight, bias = (original.get_parameter(f"{name}.{leaf}").detach().double() for leaf in ("weight", "bias"))
        sums, grams = 0, 0
        for its, true in wanted:
            theirs = true[f"{name}'s stream"] + true[first] @ weight.T + bias
            counts = 1 / theirs.square().mean(1, keepdim=True)  # what reads the stream divides by the root of this
            off = true[f"{name}'s stream"] - its[f"{name}'s stream"] + (true[first] - its[first]) @ weight.T
            sums, grams = sums + (counts * off).T @ its[first], grams + (counts * its[first]).T @ its[first]
        assert all(d[name].inputs is None for _, d in found)
        torch.testing.assert_close(sum(d[name].sums for _, d in found).double(), sums, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gram, grams, rtol=1e-4, atol=1e-4)


def _one(block, original, outer, run):
    """Both forwards run on one module whose weights are exchanged in between, as a `Reference` does."""
    weights = {name: p.data.clone() for name, p in block.named_parameters()}

    def exchanged(y=run[1]):
        x = y.__defaults__[0]
        for name, p in original.named_parameters():
            block.get_parameter(name).data = p.data
        try:
            return block(x)
        finally:
            for name, value in weights.items():
                block.get_parameter(name).data = value

    to = {name: block.get_submodule(path) if path else None for name, path in outer.items()}
    return paired_statistics([(run[0], seeing(block, exchanged))], linears(block), GROUPS, to)


def seeing(block, run):
    """What is seen in a forward, of whatever is asked for."""
    return lambda names, adding: Seen(run, linears(block), names, adding)


@pytest.mark.parametrize("to_streams", (False, True))
def test_gram_matrices_are_those_of_one_forward(to_streams):
    """Bit for bit; but for layers that are added to a stream, whose tokens do not count alike."""
    block, xs = Block(), batches(2, 2, 3)
    runs = [(lambda x=x: block(x), seeing(block, lambda x=x: block(x))) for x in xs]
    together, _ = paired_statistics(runs, linears(block), GROUPS, joined(block) if to_streams else {})
    alone = gram_matrices([lambda x=x: block(x) for x in xs], linears(block), [group[0] for group in GROUPS])
    for name, stats in alone.items():
        alike = not (to_streams and name in ("o", "down"))
        assert torch.equal(together[name].gram, stats.gram) is alike and together[name].n_tokens == stats.n_tokens


def test_a_token_counts_as_little_as_its_stream_is_large():
    """A massive activation moves what a layer is fitted to no more than any other token does."""
    block, x = Block(), batches(2, 2)[0]
    seen = {}
    for factor in (1.0, 100.0, 1e4):
        large = x.clone()
        large[0, 0] *= factor
        runs = [(lambda large=large: block(large), seeing(block, lambda large=large: block(large)))]
        seen[factor] = paired_statistics(runs, linears(block), [["o"]], joined(block))[0]["o"].gram.trace()
    assert seen[1e4] == pytest.approx(float(seen[100.0]), rel=1e-2) and seen[1e4] < 1.5 * seen[1.0]


def test_a_stream_of_zeros_counts_no_more_than_norms_would_have_it():
    block, x = Block(), batches(2, 2)[0]
    with torch.no_grad():
        for p in block.o.parameters():
            p.zero_()
    runs = [(lambda: block(0 * x), seeing(block, lambda: block(0 * x)))]
    stats, drifts = paired_statistics(runs, linears(block), [["o"]], joined(block))
    assert bool(torch.isfinite(stats["o"].gram).all()) and bool(torch.isfinite(drifts["o"].sums).all())


def test_equal_forwards_have_no_drift_and_layers_apart_none_at_all():
    block, xs = Block(), batches(2, 2)
    runs = [(lambda x=x: block(x), seeing(block, lambda x=x: block(x))) for x in xs]
    stats, drifts = paired_statistics(runs, linears(block), GROUPS, joined(block), apart=["up", "down"])
    assert set(stats) == {"q", "o", "up", "down"} and set(drifts) == {"q", "k", "o"}
    assert all(float(drift.total.abs().max()) == 0 for drift in drifts.values()) and drifts["o"].sums is not None


@pytest.mark.parametrize(("name", "stream"), (("o", "second"), ("down", None)))
def test_a_layer_alone_is_not_run_for_its_stream(name, stream):
    """Its share of the sums is known from its weight and its Gram matrix."""
    block, xs, ys = Block(), batches(2, 2, 3), batches(3, 2, 3)
    to, ran = {name: block.get_submodule(stream) if stream else None}, []

    def found(groups):
        runs = [(lambda x=x: block(x), seeing(block, lambda y=y: block(y))) for x, y in zip(xs, ys, strict=True)]
        return paired_statistics(runs, linears(block), groups, to)

    stats, drifts = found([["q", "k"], [name]])  # which needs the layer's output for what comes behind it
    layer = block.get_submodule(name)
    with mock.patch.object(
        type(layer), "forward", lambda self, x: ran.append(self is layer) or nn.functional.linear(x, self.weight, self.bias)
    ):
        alone, off = found([[name]])
    assert sum(ran) == len(xs)  # of the original's
    assert torch.equal(alone[name].gram, stats[name].gram)
    torch.testing.assert_close(off[name].sums, drifts[name].sums, rtol=1e-4, atol=1e-4)


def test_forwards_stop_where_all_is_seen():
    block, xs = Block(), batches(2, 2)
    runs = [(lambda x=x: block(x), seeing(block, lambda x=x: block(x))) for x in xs]
    paired_statistics(runs, linears(block), [["q", "k"], ["o"]], joined(block))
    finished = block.finished
    paired_statistics(runs, linears(block), [["q", "k"], ["o"]], joined(block))
    assert block.finished == finished + 2  # of `joined`: one to look, and one for the layer whose sum is the output
    paired_statistics(runs, linears(block), [["down"]], joined(block))
    assert block.finished > finished + 4  # the block's output itself is waited for


def test_activations_that_are_not_finite_are_refused():
    block, x = Block(), batches(2, 1)[0]
    with pytest.raises(ModelError, match="overflows"):
        paired_statistics([(lambda: block(x / 0), seeing(block, lambda: block(x)))], linears(block), GROUPS, {})
