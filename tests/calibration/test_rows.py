"""Rows → texts: which column is taken, how conversations are written, and what is refused with its place."""

import pytest

from cloq.calibration.rows import CHAT_COLUMNS, ROLES, TEXT_COLUMNS, row_texts
from cloq.errors import CalibrationError

OPENAI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
]
SHAREGPT = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
WRITTEN = "<|system|>Be brief.<|end|>\n<|user|>Why?<|end|>\n<|assistant|>Because.<|end|>\n"


def texts(*rows, column=None, tokenizer=None):
    return list(row_texts(((f"rows.jsonl, line {n}", row) for n, row in enumerate(rows, 1)), column, tokenizer))


@pytest.mark.parametrize("name", TEXT_COLUMNS)
def test_text_columns_are_found_by_name(name):
    assert texts({"id": "7", name: "one", "score": 1}, {"id": "8", name: "two", "score": 2}) == ["one", "two"]


def test_a_named_column_wins_over_one_that_would_be_found():
    assert texts({"text": "not this", "notes": "this"}, column="notes") == ["this"]


def test_null_and_blank_texts_are_passed_over():
    assert texts({"text": None}, {"text": "a"}, {"text": ""}, {"text": " \n"}, {"text": "b"}) == ["a", "b"]


def test_plain_strings_are_rows_too():
    assert texts("a", "b") == ["a", "b"]


@pytest.mark.parametrize("name", CHAT_COLUMNS)
@pytest.mark.parametrize("messages", [OPENAI, SHAREGPT])
def test_both_forms_of_conversation_go_through_the_template(name, messages, tokenizer):
    assert texts({name: messages}, tokenizer=tokenizer) == [WRITTEN]
    assert texts({"other": messages}, column="other", tokenizer=tokenizer) == [WRITTEN]


def test_messages_win_over_a_text_column_beside_them(tokenizer):
    assert texts({"text": "pre-rendered", "messages": OPENAI}, tokenizer=tokenizer) == [WRITTEN]
    assert texts({"text": "pre-rendered", "messages": OPENAI}, column="text", tokenizer=tokenizer) == ["pre-rendered"]


def test_content_in_parts_and_empty_content(tokenizer):
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
    ]
    assert texts({"messages": parts}, tokenizer=tokenizer) == ["<|user|>ab<|end|>\n<|assistant|><|end|>\n"]


@pytest.mark.parametrize("role", [r for r in ROLES if ROLES[r] != "tool"])
def test_every_known_speaker_has_a_role(role, tokenizer):
    assert texts({"conversations": [{"from": role, "value": "x"}]}, tokenizer=tokenizer) == [f"<|{ROLES[role]}|>x<|end|>\n"]


def test_further_keys_of_a_message_reach_the_template(tokenizer):
    class Recorder:
        chat_template = "yes"

        def apply_chat_template(self, messages, tokenize):
            return repr(messages)

    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert texts({"messages": [call]}, tokenizer=Recorder()) == [
        repr([{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}])
    ]


TURNS = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Add.", "context": "1 2", "response": "3", "category": "x"},
    {"instruction": "Add.\n\n1 2", "input": "", "output": "3"},
    {"prompt": "Add.\n\n1 2 ", "completion": " 3"},
    {"question": "Add.\n\n1 2", "answer": "3"},
    {"problem": "Add.\n\n1 2", "solution": "3"},
]


@pytest.mark.parametrize("row", TURNS)
def test_instruction_rows_are_one_exchange(row, tokenizer, base_tokenizer):
    assert texts(row, tokenizer=tokenizer) == ["<|user|>Add.\n\n1 2<|end|>\n<|assistant|>3<|end|>\n"]
    assert texts(row, tokenizer=base_tokenizer) == texts(row) == ["Add.\n\n1 2\n\n3"]


def test_prompt_and_completion_may_be_messages(tokenizer):
    assert texts({"prompt": OPENAI[:2], "completion": OPENAI[2:]}, tokenizer=tokenizer) == [WRITTEN]


def test_an_exchange_without_an_answer_is_passed_over():
    assert texts({"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}, {"prompt": "c", "response": "d"}) == [
        "a\n\nb",
        "c\n\nd",
    ]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tokenizer):
    (text,) = texts({"text": "a\ud800b\U0001f600"})
    assert text == "a�b\U0001f600"
    tokenizer(text)


REFUSED = [
    (
        [{"id": "x", "n": 1, "tags": ["a"]}],
        None,
        r"line 1: none of its columns .*--calib-column; there are: id \(text\), n \(a number\), tags \(a list\)",
    ),
    ([{"text": "a"}, {"body": "b"}], None, r"line 2 has no column 'text'.*--calib-column; there is: body \(text\)"),
    ([{"text": "a"}], "story", r"line 1 has no column 'story'.*there is: text"),
    ([{"text": "a"}, {"text": ["b"]}], None, r"line 2: the column 'text' holds a list, not text"),
    ([{"a": "x"}, ["y"]], "a", r"line 2 is a list; a row is an object"),
    ([{"prompt": "x", "answer": "y"}, {"prompt": "x", "answer": 3}], None, r"line 2: the column 'answer' holds a number"),
    ([{"messages": [{"role": "wizard", "content": "x"}]}], None, r"line 1: a message has the role 'wizard'; known: system, user"),
    ([{"messages": ["hello"]}], None, r"line 1: a conversation is a list of messages"),
    (
        [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
        None,
        r"line 1: a message's content is a list; only text",
    ),
    (
        [{"messages": [{"role": "tool", "content": "x"}]}],
        None,
        r"line 1: the tokenizer's chat template refuses the roles tool .*no tools here",
    ),
]


@pytest.mark.parametrize(("rows", "column", "message"), REFUSED)
def test_refusals_name_place_and_remedy(rows, column, message, tokenizer):
    with pytest.raises(CalibrationError, match=message):
        texts(*rows, column=column, tokenizer=tokenizer)


def test_conversations_need_a_chat_template(base_tokenizer):
    for missing in (base_tokenizer, None):
        with pytest.raises(CalibrationError, match=r"line 1 is a conversation, but .* no chat template.*--calib-column"):
            texts({"messages": OPENAI}, tokenizer=missing)
