"""The bundled text: deterministic, plain, without repetition."""

import hashlib
import os
import subprocess
import sys

from cloq.calibration import demo, documents
from cloq.calibration.demo import plain_documents


def test_it_is_the_same_in_another_process():
    code = f"import hashlib, runpy; texts = runpy.run_path({demo.__file__!r})['demo_documents']()"
    show = "print(hashlib.sha256(repr(list(texts)).encode()).hexdigest())"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", f"{code}; {show}"], env=environment, capture_output=True, text=True)
    assert other.stdout.strip() == hashlib.sha256(repr(list(documents("demo"))).encode()).hexdigest(), other.stderr


def test_it_is_english_prose_without_marks():
    texts = list(documents("demo"))
    text = "\n\n".join(texts)
    assert len(texts) > 50 and len(text) > 300_000
    assert "::=" not in text
    assert not any(len(line) > 3 and len(set(line)) == 1 for line in map(str.strip, text.splitlines()))  # underlines
    words = text.split()
    assert words.count("the") / len(words) > 0.04  # as in any English text


def test_no_paragraph_comes_twice():
    paragraphs = [p.strip() for text in documents("demo") for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))


def test_plain_paragraphs_by_hand():
    source = (
        'The "x" state-\nment\n****************\n\nIt is **very** useful, if *args* and **kw are\ngiven.\n\n'
        '   rule ::= "a" "b"\n\n'
        "   for x in y:\n       print(x)\n\n   Indented prose is\n   joined too.\n"
    )
    assert list(plain_documents([source, "It is **very** useful, if *args* and **kw are\ngiven.\n"])) == [
        'The "x" state-\nment\n\nIt is very useful, if args and **kw are given.\n\n'
        "   for x in y:\n       print(x)\n\nIndented prose is joined too."
    ]


def test_it_is_enough_for_the_demo_run(real_tokenizer):
    """128 sequences of 512 tokens and an eighth more, held out."""
    from cloq.calibration import calibration_tokens
    from cloq.specs import CalibSpec

    tokens = calibration_tokens(CalibSpec("demo", samples=128, seq_len=512), real_tokenizer)
    assert tokens.calibration.shape == (128, 512) and tokens.heldout.shape == (16, 512)
