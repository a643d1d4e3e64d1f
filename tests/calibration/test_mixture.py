"""Mixtures: what is a weight and what belongs to a name, and how shares become whole numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloq.calibration.mixture import parse_mixture, shares
from cloq.errors import CalibrationError

PARSED = [
    ("c4", [("c4", 1)]),
    ("c4:0.5", [("c4", 1)]),
    ("c4:0.5,code.jsonl:0.5", [("c4", 0.5), ("code.jsonl", 0.5)]),
    ("c4:3, code.jsonl:1", [("c4", 0.75), ("code.jsonl", 0.25)]),
    ("a,b,c,d", [(name, 0.25) for name in "abcd"]),
    ("org/set:config:train", [("org/set:config:train", 1)]),
    ("org/set:config:train:.5,demo:1.5", [("org/set:config:train", 0.25), ("demo", 0.75)]),
    ("org/set:20231101.en:0.5,demo:5e-1", [("org/set:20231101.en", 0.5), ("demo", 0.5)]),
    ("org/set::validation", [("org/set::validation", 1)]),
    (r"C:\text\a.txt", [(r"C:\text\a.txt", 1)]),
    (r"C:\text\a.txt:1,D:\b.txt:3", [(r"C:\text\a.txt", 0.25), (r"D:\b.txt", 0.75)]),
]


@pytest.mark.parametrize(("source", "parts"), PARSED)
def test_parsing(source, parts):
    assert [(name, pytest.approx(weight)) for name, weight in parts] == parse_mixture(source)


def test_paths_that_exist_are_not_taken_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "part:2"):
        (tmp_path / name).write_text("x")
        assert parse_mixture(name) == [(name, 1.0)]
    assert parse_mixture("part:2,demo") == [("part:2", 0.5), ("demo", 0.5)]


REFUSED = [
    ("a:0.5,,b:0.5", "a part without a name"),
    ("a,", "a part without a name"),
    (":0.5", "a part without a name"),
    ("a:0.5,b", r"gives no weight to b; give one to every part .* or to none"),
    ("a:0,b:1", r"gives a the weight 0; weights are above 0"),
    ("a:-1,b:2", r"gives a the weight -1"),
    ("a:1e999,b:2", r"gives a the weight 1e999"),
    ("a:0.5,b:0.2,a:0.3", r"names a twice; .*the sum of the weights"),
    ("x/a.txt:1,x/../x/a.txt:1", r"names x/a.txt twice"),
]


@pytest.mark.parametrize(("source", "message"), REFUSED)
def test_refusals(source, message):
    with pytest.raises(CalibrationError, match=message):
        parse_mixture(source)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 3000))
def test_shares_are_whole_sum_to_the_total_and_are_fair(raw, total):
    weights = [w / sum(raw) for w in raw]
    counts = shares(weights, total)
    assert sum(counts) == total
    assert all(abs(count - weight * total) < 1 + 1e-6 for count, weight in zip(counts, weights, strict=True))


def test_shares_by_hand():
    assert shares([0.5, 0.5], 16) == [8, 8]
    assert shares([1 / 3, 1 / 3, 1 / 3], 128) == [43, 43, 42]  # 42.67 each: two left over, to the first ones
    assert shares([0.7, 0.3], 10) == [7, 3]  # 0.7 · 10 is 6.999… or 7.000… in binary
