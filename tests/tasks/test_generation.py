"""Generated text is that of plain greedy decoding, one prompt at a time, whatever it is padded with."""

import pytest
import torch

from cloq.errors import TaskError
from cloq.tasks.generation import chat_prompt, cut, encode_prompt, generate_texts
from cloq.tasks.model import TaskModel, opened
from tests.tasks.data import wide_model

PROMPTS = ["The sky is", "x", "Question: what barks at night, and at what?\nAnswer:", "The sky", "12345"]
NEW = 12


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2", "bloom", "falcon-alibi"])
def model(request, tmp_path_factory):
    with opened(wide_model(tmp_path_factory.mktemp("model"), request.param), None, "cpu", True) as one:
        yield one


@torch.no_grad()
def brute_force(model: TaskModel, prompt: str) -> str:
    """The likeliest token again and again, every time by a forward of its own without any cache."""
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    while ids.shape[1] < start + NEW:
        best = model.model(ids, use_cache=False).logits[0, -1].argmax()
        if int(best) in model.end:
            break
        ids = torch.cat([ids, best[None, None]], 1)
    return model.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_every_text_is_plain_greedy_decoding(model, batch_tokens):
    prompts = [encode_prompt(model, prompt, NEW) for prompt in PROMPTS]
    assert generate_texts(model, prompts, (), NEW, batch_tokens) == [brute_force(model, prompt) for prompt in PROMPTS]


def test_a_stop_string_ends_a_text_before_it(model):
    prompts = [encode_prompt(model, prompt, NEW) for prompt in PROMPTS]
    whole = generate_texts(model, prompts, (), NEW)
    stop = whole[0][3:5]
    assert generate_texts(model, prompts, (stop,), NEW) == [cut(text, (stop,)) for text in whole]
    assert len(cut(whole[0], (stop,))) <= 3


def test_the_models_own_generation_settings_are_put_aside_and_come_back(model):
    own = model.model.generation_config
    prompts = [encode_prompt(model, prompt, NEW) for prompt in PROMPTS]
    plain = generate_texts(model, prompts, (), NEW)
    own.repetition_penalty, own.do_sample, own.temperature = 100.0, True, 5.0
    try:
        assert generate_texts(model, prompts, (), NEW) == plain
        assert model.model.generation_config is own
    finally:
        own.repetition_penalty, own.do_sample, own.temperature = None, None, None


def test_text_is_cut_at_the_first_of_several_stop_strings():
    assert cut("one. two, three", (",", ".")) == "one" and cut("one", (".",)) == "one" and cut(".", (".",)) == ""


def test_a_prompt_that_leaves_no_room_loses_its_beginning(tmp_path):
    with opened(wide_model(tmp_path, max_position_embeddings=24), None, "cpu", True) as model:
        prompt = encode_prompt(model, "abcdefghijklmnop", 16)
        assert prompt.truncated and model.tokenizer.decode(prompt.ids) == "ijklmnop"
        assert not encode_prompt(model, "ijklmnop", 16).truncated
        with pytest.raises(TaskError, match="24 new tokens do not fit a context of 24; lower --max-new-tokens"):
            encode_prompt(model, "a", 24)


def test_a_chat_template_writes_the_prompt_where_there_is_one(model):
    with pytest.raises(TaskError, match="no chat template; leave --chat out"):
        chat_prompt(model, "Do.")
    model.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    try:
        assert chat_prompt(model, "Do.") == "<user>Do.<a>"
        model.tokenizer.chat_template = "{{ raise_exception('a system turn comes first') }}"
        with pytest.raises(TaskError, match=r"template refuses a row \(a system turn comes first\); leave --chat out"):
            chat_prompt(model, "Do.")
    finally:
        model.tokenizer.chat_template = None
