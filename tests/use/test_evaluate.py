"""Perplexity, streamed, is the plain model's."""

import math

import pytest
import torch

from cloq.errors import CalibrationError
from cloq.models import Decoder, load_tokenizer, set_weight
from cloq.use.evaluate import beginning, evaluation_tokens, perplexity
from tests.tiny import load_plain, save_tiny


@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "gpt2"])
def test_perplexity_is_the_plain_models(family, tmp_path):
    folder = save_tiny(family, tmp_path)
    tokens = torch.randint(1, 250, (5, 24), generator=torch.Generator().manual_seed(0))
    found = perplexity(Decoder(folder), tokens, batch_tokens=50)
    with torch.no_grad():
        logits = load_plain(folder)(tokens).logits[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    assert found.value == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert found.stderr == pytest.approx(float(losses.std()) / 5**0.5, rel=1e-3)
    assert (found.tokens, found.protocol) == (5 * 23, "chunks-24")


def test_changed_weights_change_it_and_only_for_that_pass(tmp_path):
    decoder = Decoder(save_tiny("llama", tmp_path))
    tokens = torch.randint(1, 250, (3, 24), generator=torch.Generator().manual_seed(0))

    def zeroed(index: int, linears: dict) -> None:
        for module in linears.values():
            set_weight(module, torch.zeros(module.out_features, module.in_features))

    before = perplexity(decoder, tokens).value
    assert perplexity(decoder, tokens, set_weights=zeroed).value != pytest.approx(before, rel=1e-3)
    assert perplexity(decoder, tokens).value == before


def test_text_is_cut_from_its_beginning_without_overlap(tmp_path):
    tokenizer = load_tokenizer(save_tiny("llama", tmp_path))
    tokens = evaluation_tokens("abcdefghij" * 5, tokenizer, 16)
    assert tokenizer.decode(tokens.flatten()) == ("abcdefghij" * 5)[:48]
    assert len(evaluation_tokens("abcdefghij" * 5, tokenizer, 16, max_samples=2)) == 2
    with pytest.raises(CalibrationError, match="50 tokens, fewer than one sequence of 64"):
        evaluation_tokens("abcdefghij" * 5, tokenizer, 64)


def test_an_endless_source_is_read_only_as_far_as_needed():
    import itertools

    assert len(beginning(itertools.repeat("a hundred characters" * 5), 10)) < 1000
    assert beginning(["a", "b"], None) == "a\n\nb"
