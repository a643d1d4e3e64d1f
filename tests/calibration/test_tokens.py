"""Tokens: nothing lost, nothing padded, nothing twice; seeds, shares, separators, and how much text is enough."""

import itertools
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloq.calibration import calibration_tokens, draw_sequences, sequence_start, tokens
from cloq.calibration.passages import Unfinished
from cloq.errors import CalibrationError
from cloq.specs import CalibSpec

from .conftest import TEXT, make_tokenizer

TOKENIZER = make_tokenizer()
END = TOKENIZER.eos_token_id


def numbered(count):
    """Text in which no two stretches are the same."""
    return " ".join(f"number {n}" for n in range(count))


def ids(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def drawn(documents, tokenizer=TOKENIZER, **settings):
    return draw_sequences(documents, tokenizer, CalibSpec("text", **{"samples": 4, "seq_len": 8, "heldout": 0.5, **settings}))


def rows(part):
    return [tuple(row.tolist()) for row in part]


def pooled(documents, seq_len, tokenizer=TOKENIZER):
    """Every sequence of a text, in the order of the text."""
    return tokens.cut_sequences(documents, tokenizer, seq_len, 10**9)[0]


# -- the stream --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=6), st.integers(8, 20), st.integers(4, 40))
def test_sequences_are_the_token_stream_cut(texts, seq_len, piece):
    """Naive twin: all ids in one list, one end-of-text token between documents that have tokens, cut from the front."""
    parts = [ids(text) for text in texts if ids(text)]
    stream = list(itertools.chain(*([END, *part] for part in parts)))[1:]
    with pytest.MonkeyPatch.context() as patch:
        pool = pooled(texts, seq_len)
        patch.setattr(tokens, "_PIECE", 1 << 20)
        assert pool.flatten().tolist() == stream[: len(stream) // seq_len * seq_len]
        patch.setattr(tokens, "_PIECE", piece)  # whatever the pieces, no character is lost or doubled
        cut = pooled(texts, 8).flatten().tolist()
    apart = TOKENIZER.decode(cut).split("<|end|>")
    for text, seen in zip([text for text in texts if text], apart[:-1], strict=False):
        assert seen == text


@settings(max_examples=30, deadline=None)
@given(st.integers(30, 200), st.integers(1, 60))
def test_pieces_between_words_leave_no_trace(piece, words):
    text = " ".join(itertools.islice(itertools.cycle(TEXT.split()), words * 10)) + ".\n\n" + numbered(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_PIECE", piece)
        pieces = [piece for piece, _ in tokens._pieces([text])]
    assert "".join(pieces) == text and max(map(len, pieces)) <= piece
    assert list(itertools.chain(*map(ids, pieces))) == ids(text)


def test_text_without_spaces_is_cut_anyway(monkeypatch):
    monkeypatch.setattr(tokens, "_PIECE", 10)
    assert [p for p, _ in tokens._pieces(["x" * 25])] == ["x" * 10, "x" * 10, "x" * 5]
    assert [p for p, _ in tokens._pieces(["....\n\n......."])] == ["....", "\n\n......."]


def test_one_document_in_pieces_has_no_separator():
    text = numbered(60)
    pieces = [Unfinished(text[:101]), Unfinished(text[101:102]), Unfinished(""), text[102:]]
    assert torch.equal(pooled(pieces, 8), pooled([text], 8))
    assert END not in pooled(pieces, 8)
    endless = [Unfinished(text[:101]), Unfinished(text[101:])]  # as wikitext comes: nothing says that it ends
    assert torch.equal(pooled(endless, 8), pooled([text], 8))


def test_documents_are_separated_once():
    together = pooled(["one two", "", "three four", "five six seven eight nine ten"], 8).flatten().tolist()
    assert TOKENIZER.decode(together).startswith("one two<|end|>three four<|end|>five")


def test_a_closed_conversation_gets_no_second_end():
    chats = [f"<|user|>{n}<|end|>\n" for n in range(20)]
    text = TOKENIZER.decode(pooled(chats, 8).flatten())
    assert "<|end|><|end|>" not in text and "\n<|end|>" not in text and text.startswith("".join(chats)[: len(text)])


def test_a_tokenizer_without_end_of_text():
    text = pooled(["one two three", "four five six seven"], 8, make_tokenizer(end=False)).flatten()
    assert TOKENIZER.decode(text).startswith("one two threefour")


def test_begin_of_text_heads_every_sequence():
    begins = make_tokenizer(begin=True)
    assert sequence_start(begins) == [begins.bos_token_id] and sequence_start(TOKENIZER) == []
    pool = pooled([numbered(80)], 9, begins)
    assert (pool[:, 0] == begins.bos_token_id).all()
    assert torch.equal(pool[:, 1:], pooled([numbered(80)], 8))
    assert (pool[:, 1:] != begins.bos_token_id).all()


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_drawn_sequences_are_disjoint_and_from_the_text():
    text = [numbered(3000)]
    result = drawn(text, samples=64, heldout=0.25)
    everything = rows(result.calibration) + rows(result.heldout)
    assert len(everything) == 80 == len(set(everything))
    assert set(everything) <= set(rows(pooled(text, 8)))
    assert result.calibration.dtype == result.heldout.dtype == torch.int64


def test_seeds():
    text = [numbered(3000)]
    results = [drawn(text, samples=32, seed=seed) for seed in (0, 0, 1, 2)]
    prints = [result.fingerprint() for result in results]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_fingerprint_knows_order_shape_and_what_is_held_out():
    a = tokens.CalibrationTokens(torch.arange(32).reshape(4, 8), torch.arange(8).reshape(1, 8))
    others = [
        a._replace(calibration=a.calibration.flip(0)),
        a._replace(calibration=a.calibration.reshape(2, 16)),
        tokens.CalibrationTokens(torch.cat([a.calibration, a.heldout]), a.heldout[:0]),
        a._replace(calibration=a.calibration.T.contiguous().T + 1),
    ]
    assert len({a.fingerprint(), *(other.fingerprint() for other in others)}) == 5
    assert a.fingerprint() == a._replace(calibration=a.calibration.T.contiguous().T).fingerprint()


def test_no_heldout_share():
    result = drawn([numbered(100)], heldout=0.0)
    assert result.calibration.shape == (4, 8) and result.heldout.shape == (0, 8)


def test_a_large_source_is_not_read_to_its_end():
    read = itertools.count()

    def endless():
        for n in read:
            assert n < 200
            yield f"document {n} of a source that never ends"

    drawn(endless(), samples=8, heldout=0.0)
    assert next(read) < 60  # 8 · 4 sequences of 8 tokens; a document has more than 8

    def one_endless_document():
        for n in itertools.count():
            assert n < 200
            yield Unfinished(f"piece {n} " * 50)

    drawn(one_endless_document(), samples=8)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 400), st.integers(1, 40), st.integers(8, 64), st.sampled_from([0.0, 0.125, 0.5, 1.0]))
def test_too_little_text_names_numbers_that_fit(words, samples, seq_len, heldout):
    """Every number that the message offers works, and one sample more does not."""
    text = [numbered(words)]
    spec = CalibSpec("novel.txt", samples=samples, seq_len=seq_len, heldout=heldout)
    try:
        draw_sequences(text, TOKENIZER, spec)
    except CalibrationError as error:
        message = str(error)
    else:
        return
    if words == 0:
        assert "'novel.txt' is empty; give other text" in message
        return
    assert f"'novel.txt' has {len(ids(text[0]))} tokens, which make {len(ids(text[0])) // seq_len} sequences of {seq_len}, but" in message
    assert f"({samples} samples and {spec.heldout_samples} held out)" in message
    fewer, shorter = re.search(r"--calib-samples (\d+)", message), re.search(r"--seq-len (\d+)", message)
    assert "ive more text" in message and bool(fewer or shorter) == ("What it allows" in message)
    if shorter:
        draw_sequences(text, TOKENIZER, spec.replace(seq_len=int(shorter[1])))
    most = int(fewer[1]) if fewer else 0
    if most:
        draw_sequences(text, TOKENIZER, spec.replace(samples=most))
    with pytest.raises(CalibrationError):
        draw_sequences(text, TOKENIZER, spec.replace(samples=most + 1))


# -- a spec's source ---------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two texts whose sequences can be told apart: one counts, the other has no digits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "count.txt").write_text(" ".join(map(str, range(5000))))
    (tmp_path / "prose.txt").write_text("\n".join(TEXT.split("1984")[0] * (n % 3 + 1) for n in range(100)))
    (tmp_path / "chat.jsonl").write_text(
        "\n".join(json.dumps({"messages": [{"role": "user", "content": f"{n} apples"}]}) for n in range(500))
    )
    return tmp_path


def made(source, sample_text=None, max_positions=None, tokenizer=TOKENIZER, **settings):
    spec = CalibSpec(source, **{"samples": 16, "seq_len": 8, "heldout": 0.25, **settings})
    return calibration_tokens(spec, tokenizer, sample_text, max_positions)


def digits(part):
    return sum(any(c.isdigit() for c in TOKENIZER.decode(row)) for row in part)


def test_one_source_is_what_draw_sequences_makes_of_it(here):
    expected = draw_sequences([(here / "count.txt").read_text()], TOKENIZER, CalibSpec("x", samples=16, seq_len=8, heldout=0.25))
    assert made("count.txt").fingerprint() == expected.fingerprint()
    assert made("count.txt:0.3").fingerprint() == expected.fingerprint()  # a mixture of one is that one


@pytest.mark.parametrize(("weights", "shares"), [("0.5 0.5", (8, 2)), ("3 1", (12, 3)), ("1 3", (4, 1)), ("0.0625 0.9375", (1, 0))])
def test_mixtures_have_their_shares(here, weights, shares):
    first, second = weights.split()
    result = made(f"count.txt:{first},prose.txt:{second}")
    assert (len(result.calibration), len(result.heldout)) == (16, 4)
    assert (digits(result.calibration), digits(result.heldout)) == shares
    assert not set(rows(result.calibration)) & set(rows(result.heldout))


def test_a_mixture_is_mixed_and_seeded(here):
    results = [made("count.txt,prose.txt", samples=64, seed=seed) for seed in (0, 0, 1)]
    assert results[0].fingerprint() == results[1].fingerprint() != results[2].fingerprint()
    assert 0 < digits(results[0].calibration[:32]) < 32  # not one source after the other


def test_conversations(here):
    text = TOKENIZER.decode(made("chat.jsonl", samples=100, heldout=0).calibration.flatten())
    assert "<|user|>" in text and "<|end|>" in text
    with pytest.raises(CalibrationError, match=r"chat\.jsonl, line 1 is a conversation, but .* no chat template"):
        made("chat.jsonl", tokenizer=make_tokenizer(chat=False))


def sample_text(sequences, length, seed):
    return torch.randint(0, 320, (sequences, length), generator=torch.Generator().manual_seed(seed))


def test_self_is_what_the_model_samples(here):
    result = made("self", sample_text, seed=5)
    assert torch.equal(torch.cat(list(result)), sample_text(20, 8, 5)) and len(result.heldout) == 4
    mixed = made("self:0.25,prose.txt:0.75", sample_text, seed=5)
    own = set(rows(sample_text(5, 8, 5)))
    assert len(own & set(rows(mixed.calibration))) == 4 and len(own & set(rows(mixed.heldout))) == 1


def test_self_refuses_a_sampler_that_gives_something_else():
    with pytest.raises(CalibrationError, match="nothing here can sample it"):
        made("self")
    with pytest.raises(ValueError, match=r"sample_text gave \(20, 7\) torch.int64, wanted \(20, 8\)"):
        made("self", lambda n, length, seed: sample_text(n, length - 1, seed))


REFUSED = [
    (
        {"source": "count.txt:0.97,prose.txt:0.03"},
        r"the share of prose\.txt in the mixture, 0\.03 of 16 samples, is less than one sequence; raise",
    ),
    ({"source": "count.txt,nothing.txt"}, r"there is no file or folder nothing\.txt"),
    ({"source": "count.txt,wikitext3"}, r"unknown calibration source 'wikitext3' \(did you mean wikitext2\?\)"),
    ({"source": "count.txt", "seq_len": 65}, r"seq_len is 65, but the model takes at most 64 tokens; use --seq-len 64"),
    (
        {"source": "count.txt", "samples": 50_000},
        r"'count\.txt' has \d+ tokens, which make \d+ sequences of 8, but 62500 are needed",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_refusals_come_before_any_text_is_drawn(here, settings, message):
    def never(*args):
        raise AssertionError("nothing should be sampled")

    with pytest.raises(CalibrationError, match=message):
        made(**settings, sample_text=never, max_positions=64)


def test_too_little_text_in_a_mixture_offers_samples_that_fit(here):
    (here / "short.txt").write_text(numbered(40))
    with pytest.raises(
        CalibrationError, match=r"'short\.txt' has .* \(50 samples and 12 held out\)\. What it allows: --calib-samples"
    ) as caught:
        made("prose.txt:1,short.txt:1", samples=100)
    most = int(re.search(r"--calib-samples (\d+)", str(caught.value))[1])
    made("prose.txt:1,short.txt:1", samples=most)
    with pytest.raises(CalibrationError):
        made("prose.txt:1,short.txt:1", samples=most + 2)


def test_the_longest_sequence_is_allowed(here):
    assert made("count.txt", seq_len=64, max_positions=64).calibration.shape == (16, 64)


def test_real_pieces_leave_no_trace(real_tokenizer):
    from cloq.calibration import documents

    text = "\n\n".join(documents("demo"))
    assert len(text) > 4 * tokens._PIECE
    pieces = [ids(piece, real_tokenizer) for piece, _ in tokens._pieces([text])]
    assert list(itertools.chain(*pieces)) == ids(text, real_tokenizer)
