"""Scores of continuations are those of a plain forward, one sequence at a time, however they are batched, padded or shared."""

import dataclasses
from pathlib import Path

import pytest
import torch

from cloq.errors import TaskError
from cloq.tasks.likelihood import Likelihood, encode, likelihoods, option_metrics
from cloq.tasks.model import TaskModel, opened
from cloq.tasks.spec import Options
from tests.tasks.data import wide_model

GROUPS = (
    ("The sky is", (" blue", " bluish", " b", " a colour of its own")),
    ("Question: what barks?\nAnswer:", (" the dog", " the do", " rain")),
    ("A much longer beginning, so that the others have to be padded to its length, is this", (" one", " one")),
    ("x", ("y",)),
)


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2", "mistral", "openai-gpt", "mamba"])
def model(request, tmp_path_factory):
    with opened(wide_model(tmp_path_factory.mktemp("model"), request.param), None, "cpu", True) as one:
        yield one


@torch.no_grad()
def brute_force(model: TaskModel, context: str, continuation: str) -> Likelihood:
    """Plain transformers: the whole sequence by itself, every position, in float64."""
    ids = model.tokenizer(context + continuation, return_tensors="pt").input_ids
    start = len(model.tokenizer(context).input_ids)
    logits = model.model(ids, use_cache=False).logits[0, start - 1 : -1].double().log_softmax(-1)
    wanted = ids[0, start:]
    return Likelihood(float(logits.gather(-1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all()))


def assert_same(found: Likelihood, expected: Likelihood) -> None:
    assert found.value == pytest.approx(expected.value, abs=2e-4) and found.greedy == expected.greedy


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "batched"])
@pytest.mark.parametrize("batch_tokens", [1, 90, 4096])
def test_every_score_is_the_plain_models(model, shared, batch_tokens):
    model = dataclasses.replace(model, shares_prefixes=shared and model.shares_prefixes)
    encoded = [[encode(model, context, rest) for rest in rests] for context, rests in GROUPS]
    for (context, rests), found in zip(GROUPS, likelihoods(model, encoded, batch_tokens), strict=True):
        for rest, one in zip(rests, found, strict=True):
            assert_same(one, brute_force(model, context, rest))


def test_greedy_is_what_greedy_decoding_gives(model):
    ids = model.tokenizer("The sky is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = int(model.model(ids, use_cache=False).logits[0, -1].argmax())
    letter = model.tokenizer.decode([best])
    if len(model.tokenizer("The sky is" + letter).input_ids) == ids.shape[1] + 1:  # some bytes alone are no text
        assert likelihoods(model, [[encode(model, "The sky is", letter)]])[0][0].greedy
    assert not likelihoods(model, [[encode(model, "The sky is", "QZJX")]])[0][0].greedy


def test_families_without_keys_and_values_to_go_on_from_are_known(model):
    assert model.shares_prefixes == (model.model.config.model_type not in ("openai-gpt", "mamba"))


# -- encoding ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Its context is 24 tokens, which are bytes."""
    with opened(wide_model(tmp_path_factory.mktemp("short"), max_position_embeddings=24), None, "cpu", True) as one:
        yield one


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(short):
    assert encode(short, "ab ", "cd") == encode(short, "ab", " cd") and encode(short, "ab", " cd").length == 3


def test_without_context_the_first_token_follows_the_begin_of_text(short):
    encoded = encode(short, "", "cd")
    assert encoded.ids[0] == short.start and encoded.length == 2


def test_what_is_too_long_loses_its_beginning_and_says_so(short):
    fits, cut = encode(short, "a" * 21, "bcde"), encode(short, "z" + "a" * 21, "bcde")
    assert not fits.truncated and len(fits.ids) == 25  # the last one is predicted, not read
    assert cut.truncated and cut.ids == fits.ids
    assert likelihoods(short, [[fits]]) == likelihoods(short, [[cut]])
    with pytest.raises(TaskError, match=r"a continuation has 25 tokens, and the model's context is 24"):
        encode(short, "a", "b" * 25)


def test_a_continuation_needs_a_token_of_its_own(short):
    with pytest.raises(TaskError, match="has no token of its own"):
        encode(short, "ab", "")


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_of_options_are_arithmetic():
    item = Options((("", "aa"), ("", "bbbb")), 1, (2, 4))
    found = [Likelihood(-4.0, False), Likelihood(-5.0, False)]
    assert option_metrics(item, found) == {"acc": 0.0, "acc_norm": 1.0}  # -4 > -5, but -4/2 < -5/4
    assert option_metrics(Options((("", "aa"),), 0, (2,)), [Likelihood(-4.0, True)]) == {"acc": 1.0, "perplexity": -4.0}


def test_a_model_on_disk_is_named_by_how_it_computes(short):
    assert short.weights == "float32" and short.max_positions == 24 and isinstance(short.end, tuple)
    assert Path(short.tokenizer.name_or_path).is_dir()
