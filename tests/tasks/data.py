"""Tiny data files in the shape of the real ones, and tiny models that answer at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import save_tiny

_LETTERS = {"text": ["a red fox", "the dog", "rain", "my old friend"], "label": ["A", "B", "C", "D"]}

ROWS: dict[str, list[dict[str, Any]]] = {
    "arc_easy": [
        {"question": f"What barks at number {n}?", "choices": _LETTERS, "answerKey": "ABCD"[n % 4]} for n in range(8)
    ],
    "boolq": [{"passage": f"Line {n} is long.", "question": f"is line {n} long", "answer": n % 2 == 0} for n in range(4)],
    "hellaswag": [
        {
            "activity_label": "Cooking", "ctx_a": f"A man [step] cooks {n}.", "ctx_b": "he", "ctx": "", "label": str(n % 4),
            "endings": ["stirs.", "sleeps [title] deep.", "runs  away.", "eats all of it."],
        }
        for n in range(4)
    ],
    "lambada_openai": [{"text": f"She took key {n} and opened the door"} for n in range(4)],
    "openbookqa": [{"question_stem": f"Stem {n} is", "choices": _LETTERS, "answerKey": "B"} for n in range(3)],
    "piqa": [{"goal": f"Open jar {n}", "sol1": "Turn the lid.", "sol2": "Sing to it.", "label": n % 2} for n in range(6)],
    "sciq": [
        {
            "support": f" Water boils at {n}.", "question": f"What boils at {n}?", "distractor1": "oil", "distractor2": "tar",
            "distractor3": "ice", "correct_answer": "water",
        }
        for n in range(3)
    ],
    "social_iqa": [
        {"context": f"Ann left {n}.", "question": "Why?", "answerA": "to go", "answerB": "to be", "answerC": "no", "label": str(n + 1)}
        for n in range(3)
    ],
    "winogrande": [
        {"sentence": f"Ann gave Eve {n} pens since _ had many.", "option1": "Ann", "option2": "Eve", "answer": str(1 + n % 2)}
        for n in range(4)
    ],
    "copa": [
        {"premise": f"It rained {n} hours.", "choice1": "The street got wet.", "choice2": "He sang.", "question": q, "label": 0}
        for n, q in enumerate(("effect", "cause"))
    ],
    "cb": [{"premise": f"He said {n}.", "hypothesis": "he spoke", "label": n} for n in range(3)],
    "commonsense_qa": [
        {"question": f"Where is {n}? ", "choices": {"text": list("vwxyz"), "label": list("ABCDE")}, "answerKey": "ABCDE"[n]}
        for n in range(3)
    ],
    "gsm8k": [{"question": f"What is {n} and 1?", "answer": f"It is {n}+1.\n#### {n + 1},000"} for n in range(4)],
    "triviaqa": [{"question": f"Who is number {n}", "answer": {"aliases": ["The Beatles", f"Number {n}"]}} for n in range(3)],
    "nq_open": [{"question": f"who is {n}", "answer": ["The Band", f"no. {n}"]} for n in range(3)],
    "svamp": [{"instruction": f"Add {n} and 2.", "input": "", "output": f"A: {n + 2}.", "answer": f"{n + 2}.0"} for n in range(4)],
}  # fmt: skip


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]] | None = None) -> Path:
    """`folder/NAME_validation.jsonl` with the rows of a task, or with others."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_validation.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[name] if rows is None else rows)))
    return path


def write_all(folder: Path) -> Path:
    for name in ROWS:
        write_rows(folder, name)
    return folder


def wide_model(folder: Path, family: str = "llama", **settings: Any) -> Path:
    """A tiny model whose context is long enough for prompts in bytes."""
    name = "n_positions" if family.startswith("gpt2") else "max_position_embeddings"
    return save_tiny(family, folder, **({name: 2048} | settings))
