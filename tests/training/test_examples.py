"""Rows → examples: what the model sees, what the loss counts, and what becomes of rows that do not fit."""

import json

import numpy as np
import pytest

from cloq.errors import CalibrationError, CloqError, TrainingError
from cloq.training import TrainSpec
from cloq.training.batches import IGNORED, collate, predicted
from cloq.training.encode import tokenize_parts
from cloq.training.examples import held_out, read_examples
from tests.calibration.conftest import make_tokenizer
from tests.training.tiny_run import write_rows

CHAT = make_tokenizer()
PLAIN = make_tokenizer(chat=False)
BEGINS = make_tokenizer(chat=False, begin=True)
ASKS = make_tokenizer()
ASKS.chat_template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TURN = {"question": "Why?", "answer": " Because. "}
TALK = {
    "messages": [
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "Really?"}, {"role": "assistant", "content": "Yes."},
    ]
}  # fmt: skip


def read(tmp_path, rows, tokenizer=PLAIN, **settings):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return read_examples(TrainSpec(**{"seq_len": 64, "packing": "none"} | settings), str(path), tokenizer)


def shown(example, tokenizer) -> tuple[str, str]:
    """All of it, and what the loss counts."""
    return tokenizer.decode(example.input_ids), tokenizer.decode(example.input_ids[example.completion_mask])


def test_a_prompt_and_its_answer(tmp_path):
    found = read(tmp_path, [TURN])
    assert found.kind == "turns"
    assert shown(found.examples[0], PLAIN) == ("Why?\n\nBecause.<|end|>", "Because.<|end|>")


def test_begin_of_text_stands_first_and_is_not_counted(tmp_path):
    assert shown(read(tmp_path, [TURN], BEGINS).examples[0], BEGINS) == ("<|begin|>Why?\n\nBecause.<|end|>", "Because.<|end|>")


def test_a_template_writes_the_prompt(tmp_path):
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Say {x}.", "input": None, "output": "x"}]
    found = read(tmp_path, rows, CHAT, template="{instruction}\n{input}\n### Answer: ")
    assert [shown(e, CHAT) for e in found.examples] == [
        ("Add.\n1 2\n### Answer: 3<|end|>", "3<|end|>"), ("Say {x}.\n\n### Answer: x<|end|>", "x<|end|>"),
    ]  # fmt: skip


def test_named_columns_win(tmp_path):
    row = {"question": "not this", "p": "Why?", "c": "Sky.", "a": "So.", "answer": "nor this"}
    found = read(tmp_path, [row], prompt_column="p", context_column="c", answer_column="a")
    assert shown(found.examples[0], PLAIN) == ("Why?\n\nSky.\n\nSo.<|end|>", "So.<|end|>")


def test_conversations_count_the_assistants_turns_alone(tmp_path):
    whole = "<|user|>Why?<|end|>\n<|assistant|>Because.<|end|>\n<|user|>Really?<|end|>\n<|assistant|>Yes.<|end|>\n"
    found = read(tmp_path, [TALK], ASKS, seq_len=128)
    assert found.kind == "chats" and shown(found.examples[0], ASKS) == (whole, "Because.<|end|>\nYes.<|end|>\n")
    assert shown(read(tmp_path, [TALK], ASKS, completion_only=False, seq_len=128).examples[0], ASKS) == (whole, whole)
    turn = read(tmp_path, [TURN], ASKS)
    assert shown(turn.examples[0], ASKS) == ("<|user|>Why?<|end|>\n<|assistant|>Because.<|end|>\n", "Because.<|end|>\n")


def test_a_template_that_rewrites_earlier_turns_gets_its_last_answer(tmp_path):
    forgets = make_tokenizer()
    forgets.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{{ '…' if m.role == 'assistant' and not loop.last else m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert shown(read(tmp_path, [TALK], forgets, seq_len=128).examples[0], forgets)[1] == "Yes.<|end|>"


def test_a_template_whose_answer_cannot_be_told_is_refused(tmp_path):
    counts = make_tokenizer()
    counts.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(CalibrationError, match=r"cannot be told from the rest\. Use --no-completion-only"):
        read(tmp_path, [TALK], counts)
    assert read(tmp_path, [TALK], counts, completion_only=False, seq_len=128).examples


def test_parts_that_merge_are_tokenized_apart():
    whole = CHAT("over the lazy", add_special_tokens=False).input_ids
    assert tokenize_parts([("over", False), (" the lazy", True)], CHAT)[0] == whole
    ids, mask = tokenize_parts([("over t", False), ("he lazy", True)], CHAT)
    prompt = CHAT("over t", add_special_tokens=False).input_ids
    assert ids[: len(prompt)] == prompt != whole[: len(prompt)] and mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def test_plain_text_is_a_stream_by_itself(tmp_path):
    texts = [{"text": "The quick brown fox jumps over the lazy dog. " * 4}, {"text": ""}, {"text": "It was a bright cold day. " * 4}]
    found = read(tmp_path, texts, packing="auto", seq_len=16)
    assert found.kind == "text" and {len(e.input_ids) for e in found.examples} == {16}
    joined = PLAIN.decode(np.concatenate([e.input_ids for e in found.examples]))
    assert (texts[0]["text"] + "<|end|>" + texts[2]["text"]).startswith(joined)
    assert found.counts.predicted == 15 * found.counts.examples and 0 <= found.counts.leftover < 16
    each = read(tmp_path, texts, packing="none", seq_len=512)
    assert each.counts.rows == 3 and each.counts.empty == 1 and len(each.examples) == 2


@pytest.mark.parametrize(("long", "examples", "dropped"), [("truncate", 2, 0), ("drop", 1, 1), ("split", 4, 0)])
def test_long_rows(tmp_path, long, examples, dropped):
    rows = [TURN, {"question": "Why?", "answer": "xq" * 20}]
    found = read(tmp_path, rows, long=long, seq_len=16)
    assert (len(found.examples), found.counts.long, found.counts.dropped) == (examples, 1, dropped)
    assert max(len(e.input_ids) for e in found.examples) <= 16
    if long == "split":
        assert shown(found.examples[-1], PLAIN)[1].endswith("<|end|>")


def test_a_row_without_an_answer_within_the_length_is_left_out_and_counted(tmp_path):
    found = read(tmp_path, [TURN, {"question": "xq" * 30, "answer": "Because."}, {"question": "Why?", "answer": None}], seq_len=16)
    assert len(found.examples) == 1 and found.counts.dropped == 1 and found.counts.empty == 1 and found.counts.rows == 3


def test_a_conversation_without_an_answer_is_counted_as_one(tmp_path):
    asked = {"messages": TALK["messages"][:1]}
    found = read(tmp_path, [TALK, asked], ASKS, seq_len=128)
    assert (len(found.examples), found.counts.empty, found.counts.dropped) == (1, 1, 0)
    assert len(read(tmp_path, [TALK, asked], ASKS, completion_only=False, seq_len=128).examples) == 2


def test_packing_keeps_every_row_whole(tmp_path):
    rows = [{"question": "q" * n, "answer": "a" * n} for n in (1, 9, 4, 12, 2, 7, 3)]
    apart, packed = read(tmp_path, rows), read(tmp_path, rows, packing="rows", seq_len=32)
    assert packed.counts.predicted == apart.counts.predicted and packed.counts.tokens == apart.counts.tokens
    assert len(packed.examples) < len(rows) and all(len(e.input_ids) <= 32 for e in packed.examples)
    pieces = [bytes(piece) for e in packed.examples for piece in np.split(e.input_ids, np.cumsum(e.lengths)[:-1])]
    assert sorted(pieces) == sorted(bytes(e.input_ids) for e in apart.examples)


def test_batches_hide_padding_and_the_first_token_of_each_row(tmp_path):
    rows = [{"question": "q" * n, "answer": "a" * n} for n in (1, 9, 4)]
    apart = collate(read(tmp_path, rows).examples)
    assert apart["attention_mask"].sum(1).tolist() == [len(e.input_ids) for e in read(tmp_path, rows).examples]
    assert bool((apart["labels"][apart["attention_mask"] == 0] == IGNORED).all())
    packed = read(tmp_path, rows, packing="rows", completion_only=False)
    batch = collate(packed.examples)
    assert "attention_mask" not in batch and (batch["position_ids"] == 0).sum() == 3
    assert bool((batch["labels"][batch["position_ids"] == 0] == IGNORED).all())
    assert int(predicted(batch)) == packed.counts.predicted


def test_held_out_rows_are_a_share_and_disjoint(tmp_path):
    found = read(tmp_path, [{"question": f"{i}?", "answer": f"{i}!"} for i in range(20)])
    kept, held = held_out(found, 0.2, seed=1)
    assert (len(kept.examples), len(held.examples)) == (16, 4)
    assert {bytes(e.input_ids) for e in kept.examples}.isdisjoint(bytes(e.input_ids) for e in held.examples)
    assert kept.counts.tokens + held.counts.tokens == found.counts.tokens
    assert (kept.counts.rows, kept.counts.examples, held.counts.rows, held.counts.examples) == (20, 16, 0, 4)
    assert held_out(found, 0.2, seed=1)[1].fingerprint() == held.fingerprint() != held_out(found, 0.2, seed=2)[1].fingerprint()


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([{"a": "x", "b": "y"}], {}, "none of its columns is known to hold text.*--prompt-column.*there are: a .text., b .text."),
        ([TURN], {"answer_column": "reply"}, "no column 'reply'.*question .text., answer"),
        ([TURN], {"template": "{instruction}"}, "no column 'instruction', which the template names; there are: question, answer"),
        ([{"q": "x", "z": "y"}], {"template": "{q}"}, "known to hold the answer. Name the column with --answer-column"),
        ([TURN], {"packing": "stream"}, "holds turns, and --packing stream is for plain text"),
        ([{"question": "Why?", "answer": ""}], {}, "holds no row with text in it"),
        ([{"question": "xq" * 30, "answer": "y"}], {"seq_len": 8}, "none of the 1 rows .* can be used.*raise --seq-len"),
        ([], {}, "holds no row with text in it"),
        ([{"messages": TALK["messages"][:1]}], {}, r"none of the 1 rows .* can be used: 1 have no answer; give other data$"),
        ([{"text": "short"}], {"packing": "auto"}, "fewer than one sequence of 64.*--seq-len"),
        ([{"messages": TALK["messages"]}], {}, "no chat template"),
        ([TURN, 7], {}, "line 2 is a number"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, rows, settings, said):
    with pytest.raises(CloqError, match=said):
        read(tmp_path, rows, **settings)


@pytest.mark.parametrize("packing", ["auto", "none"])
def test_a_later_row_without_text_names_options_that_there_are(tmp_path, packing):
    rows = [{"text": "The quick brown fox jumps over the lazy dog. " * 4}, {"body": "x"}]
    with pytest.raises(CalibrationError, match=r"line 2 has no column 'text'\. Name the column with --column, --prompt-column or"):
        read(tmp_path, rows, packing=packing)


def test_a_source_without_text_names_its_own_option(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    (tmp_path / "empty.jsonl").write_text("")
    spec = TrainSpec(seq_len=64)
    with pytest.raises(TrainingError, match=r"give other data to --eval-data$"):
        read_examples(spec, str(tmp_path / "empty.jsonl"), PLAIN, "--eval-data")
    with pytest.raises(CalibrationError, match=r"Without the hub: --data demo \(always there\), or a local file such as --data text.txt"):
        read_examples(spec, "wikitext2", PLAIN)
    with pytest.raises(CalibrationError, match=r"unknown source of text 'wikitextt'.*Known: demo, c4, .*\.parquet\)$"):
        read_examples(spec, "wikitextt", PLAIN)


def test_a_share_that_leaves_nothing_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="leaves no example of 1"):
        held_out(read(tmp_path, [TURN]), 0.5, 0)


def test_other_files_are_read_as_calibration_reads_them(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([TURN, TURN]))
    assert read_examples(TrainSpec(seq_len=64), str(path), PLAIN).counts.rows == 2
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    assert read_examples(TrainSpec(seq_len=64), str(text), PLAIN).kind == "text"
    assert read_examples(TrainSpec(seq_len=64, packing="none"), str(text), PLAIN).counts.long == 1
