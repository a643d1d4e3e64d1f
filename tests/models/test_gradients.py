"""The streamed backward pass against the whole model's own."""

import math

import pytest
import torch
from torch import nn

from cloq.errors import ModelError
from cloq.models import Decoder, InHostMemory, given_bytes
from cloq.models import squared_gradients as rounded_gradients
from cloq.models.experts import unfuse
from tests.tiny import load_plain, save_tiny


def squared_gradients(*args) -> dict[str, torch.Tensor]:
    """With nothing rounded on the way."""
    return rounded_gradients(*args, kept=torch.float32)


TOKENS = torch.randint(1, 250, (3, 12), generator=torch.Generator().manual_seed(0))


def by_autograd(model: nn.Module, names: set[str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Hooks on the whole model, one sequence after the other, labels drawn with the same random numbers."""
    found = {}

    def watch(name):
        def hook(module, args, output):
            if output.requires_grad:
                output.register_hook(lambda g: found.update({name: found.get(name, 0) + g.flatten(0, -2).square().sum(0)}))

        return hook

    for name, module in model.named_modules():
        if name in names:
            module.register_forward_hook(watch(name))
    model.get_input_embeddings().weight.requires_grad_(True)
    for number, row in enumerate(tokens.split(1)):
        generator = torch.Generator().manual_seed(number)
        logits = model(input_ids=row, use_cache=False).logits[0]
        with torch.no_grad():
            chances = logits.softmax(-1).cumsum(-1)
            labels = (chances < torch.rand(len(logits), 1, generator=generator) * chances[:, -1:]).sum(-1)
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    return found


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma2", "mixtral", "mamba", "bloom"])
def test_it_is_the_gradient_of_the_whole_model(family, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path))
    names = decoder.all_linears()
    found = squared_gradients(decoder, TOKENS, 24, names)
    model = load_plain(tmp_path)
    expected = by_autograd(unfuse(model) if family == "mixtral" else model, set(names), TOKENS)
    assert list(found) == names
    for name, squared in found.items():
        torch.testing.assert_close(squared, expected.get(name, torch.zeros_like(squared)), rtol=1e-4, atol=1e-9)


def test_long_sequences_are_cut_and_only_what_is_wanted_is_found(tmp_path, monkeypatch):
    decoder = Decoder(save_tiny("llama", tmp_path))
    monkeypatch.setattr("cloq.models.gradients.LENGTH", 5)
    pieces = TOKENS[:, :10].reshape(-1, 5)
    wanted = [name for name in decoder.all_linears() if ".1." in name]
    decoder.check_streamable()  # which loads a block as well
    loaded = []
    load = Decoder.load_block
    monkeypatch.setattr(Decoder, "load_block", lambda d, index: loaded.append(index) or load(d, index))
    found = squared_gradients(decoder, TOKENS, 1 << 20, wanted)
    assert loaded == [0, 1, 2, 2, 1] and list(found) == wanted  # nothing below the first layer that is wanted
    expected = by_autograd(load_plain(tmp_path), set(wanted), pieces)
    for name in wanted:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("together", (1, 5))
def test_how_many_logits_are_in_memory_does_not_matter(together, tmp_path, monkeypatch):
    decoder = Decoder(save_tiny("llama", tmp_path))
    whole = squared_gradients(decoder, TOKENS, 1 << 20, decoder.all_linears())
    widths = []
    leave = Decoder.leave
    monkeypatch.setattr("cloq.models.gradients.AT_A_TIME", together)
    monkeypatch.setattr(Decoder, "leave", lambda d, hidden, *args, **kw: widths.append(hidden.shape[1]) or leave(d, hidden, *args, **kw))
    parts = squared_gradients(decoder, TOKENS, 1 << 20, decoder.all_linears())
    assert max(widths) == together and sum(widths) == TOKENS.numel()
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-9)


def test_batches_do_not_matter(tmp_path):
    decoder = Decoder(save_tiny("llama", tmp_path))
    whole, parts = (squared_gradients(decoder, TOKENS, size, decoder.all_linears()) for size in (1 << 20, 1))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma2"])
def test_what_blocks_were_given_is_rounded_in_between_and_hardly_shows(family, tmp_path):
    decoder = Decoder(save_tiny(family, tmp_path))
    exact, rounded = (find(decoder, TOKENS, 24, decoder.all_linears()) for find in (squared_gradients, rounded_gradients))
    assert any(not torch.equal(exact[name], rounded[name]) for name in exact)
    for name, squared in rounded.items():
        assert float((squared - exact[name]).norm()) <= 0.02 * float(exact[name].norm()), name


def test_what_blocks_were_given_has_the_size_that_is_said(tmp_path):
    decoder, sizes = Decoder(save_tiny("llama", tmp_path)), []

    class Aside(InHostMemory):
        def keep(self, hidden, instead_of=None):
            sizes.append(hidden.nbytes)
            return super().keep(hidden, instead_of)

    rounded_gradients(decoder, TOKENS, 24, decoder.all_linears(), None, Aside())
    assert sum(sizes) == given_bytes(decoder, TOKENS.numel())


def test_a_model_without_gradients_is_refused(tmp_path, monkeypatch):
    decoder = Decoder(save_tiny("llama", tmp_path))
    forward = type(decoder.blocks[1]).forward
    monkeypatch.setattr(type(decoder.blocks[1]), "forward", lambda *args, **kwargs: forward(*args, **kwargs).detach())
    with pytest.raises(ModelError, match=r"cannot be followed back.*--fisher 0"):
        squared_gradients(decoder, TOKENS, 24, decoder.all_linears())


def _overflow(returned):
    return returned * math.inf


def _overflow_backwards(returned):
    if returned.requires_grad:
        returned.register_hook(lambda g: g * math.inf)
    return returned


@pytest.mark.parametrize(
    "wrong, said",
    [
        (_overflow, r"the outputs of model\.layers\.1 hold NaN, Inf or values beyond float32"),
        (_overflow_backwards, r"the loss's gradient at model\.layers\.1\.\S+ is not finite.*--fisher 0"),
    ],
)
def test_what_is_not_finite_is_named(wrong, said, tmp_path):
    decoder = Decoder(save_tiny("llama", tmp_path))
    decoder.check_streamable()
    decoder.blocks[1].register_forward_hook(lambda module, args, returned: wrong(returned))
    with pytest.raises(ModelError, match=said):
        squared_gradients(decoder, TOKENS, 24, decoder.all_linears())
