"""A tokenizer made on the spot: byte-level like most models', with an end-of-text token and a chat template."""

import os

import pytest

TEXT = (
    "The quick brown fox jumps over the lazy dog. It was a bright cold day in April, and the clocks were striking thirteen.\n\n"
    "All happy families are alike; every unhappy family is unhappy in its own way. 1984 is a number, and so is 3.14159.\n"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>\n"
    "{% endfor %}"
)


def make_tokenizer(begin: bool = False, chat: bool = True, end: bool = True):
    """begin: puts `<|begin|>` before every text, as Llama's and Gemma's do. chat: has a chat template. end: has an end-of-text
    token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>", "<|begin|>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([TEXT], trainer)
    if begin:
        core.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    special = {"eos_token": "<|end|>"} if end else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|begin|>", model_max_length=64, **special)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def base_tokenizer():
    """Without a chat template."""
    return make_tokenizer(chat=False)


@pytest.fixture(scope="session")
def real_tokenizer():
    folder = os.environ.get("CLOQ_TEST_MODEL")
    if not folder:
        pytest.skip("needs a real model's tokenizer: set CLOQ_TEST_MODEL to a model folder")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
