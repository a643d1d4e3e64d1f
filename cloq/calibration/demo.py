"""The calibration text that is always there: the reference topics behind Python's own `help()`.

Some 80,000 tokens of English prose about a programming language, with short examples (`docs/calibration.md` has the counts).
Nothing is downloaded and nothing is committed. The text is the same wherever the Python version is the same, and differs a little
between versions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_UNDERLINE = re.compile(r"([*=\-~^\"'])\1{2,}\s*")
_EMPHASIS = re.compile(r"(?<![\w*/])(\*{1,2})(\w[\w .:-]*)\1(?![\w*])")
_LINE_END_HYPHEN = re.compile(r"(?<=\w)-\n *(?=\w)")
_PROSE_START = re.compile(r" *[*0-9.]* *[A-Z“‘\"]")


def demo_documents() -> Iterator[str]:
    """One document per topic, in the order of their names, as plain paragraphs."""
    from pydoc_data.topics import topics

    yield from plain_documents(text for _, text in sorted(topics.items()))


def plain_documents(texts: Iterable[str]) -> Iterator[str]:
    """reStructuredText as Sphinx renders it → plain paragraphs.

    Underlines, emphasis marks and grammar productions go; the lines of a paragraph of prose are joined, examples keep theirs. A
    paragraph that came before, in this text or another, is left out: the topics quote each other at length, and what is held out
    for measuring must not also be in the calibration text.
    """
    seen: set[str] = set()
    for text in texts:
        kept = []
        for block in re.split(r"\n\s*\n", text):
            paragraph = _paragraph(block)
            if paragraph.strip() and paragraph.strip() not in seen:
                seen.add(paragraph.strip())
                kept.append(paragraph)
        if kept:
            yield "\n\n".join(kept)


def _paragraph(block: str) -> str:
    lines = [line.rstrip() for line in block.strip("\n").split("\n") if not _UNDERLINE.fullmatch(line.strip())]
    text = _EMPHASIS.sub(r"\2", "\n".join(lines))
    if "::=" in text:
        return ""
    if _PROSE_START.match(text) and text[-1] in '.:;?!)”"':
        return re.sub(r"\s*\n\s*", " ", _LINE_END_HYPHEN.sub("-", text)).strip()
    return text
