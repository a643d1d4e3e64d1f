"""Rows of log-likelihood tasks → their options. Prompts are those of lm-eval's tasks of the same names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cloq.tasks.spec import Options

Row = Mapping[str, Any]


def options(context: str, texts: Sequence[str], gold: int, joint: str = " ") -> Options:
    """Every text after the same context, with `joint` between. Raises `ValueError` if `gold` is no number of one of them."""
    if not 0 <= gold < len(texts):
        raise ValueError(f"the answer is option {gold}, of {len(texts)}")
    return Options(tuple((context, joint + text) for text in texts), gold, tuple(map(len, texts)))


def labelled(prompt: Callable[[Row], str]) -> Callable[[Row], Options]:
    """A reader of rows whose `choices` hold texts and labels, and whose `answerKey` is one of the labels."""

    def read(row: Row) -> Options:
        choices = row["choices"]
        return options(prompt(row), choices["text"], list(choices["label"]).index(row["answerKey"].strip()))

    return read


question_answer = labelled(lambda row: f"Question: {row['question']}\nAnswer:")
open_book = labelled(lambda row: row["question_stem"])


def boolq(row: Row) -> Options:
    answer = row["label"] if "label" in row else row["answer"]
    return options(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), int(answer))


def hellaswag(row: Row) -> Options:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return options(_plain(context), [_plain(ending) for ending in row["endings"]], int(row["label"]))


def _plain(text: str) -> str:
    """Without the bracketed marks that WikiHow's articles left behind."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def lambada(row: Row) -> Options:
    """The last word of a passage: from a `text` whole, or from `context` and `target`."""
    if "text" in row:
        context, _, word = row["text"].rpartition(" ")
    else:
        context, word = row["context"], row["target"].lstrip(" ")
    if not word:
        raise ValueError("the passage has no last word")
    return options(context, (word,), 0)


def piqa(row: Row) -> Options:
    return options(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), int(row["label"]))


def sciq(row: Row) -> Options:
    return options(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", _sciq_answers(row), 3)


def sciq_closed(row: Row) -> Options:
    return options(f"Question: {row['question']}\nAnswer:", _sciq_answers(row), 3)


def _sciq_answers(row: Row) -> list[str]:
    return [row[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]


def social_iqa(row: Row) -> Options:
    answers = [row[f"answer{letter}"] for letter in "ABC"]
    return options(f"Q: {row['context']} {row['question']}\nA:", answers, int(row["label"]) - 1)


def winogrande(row: Row) -> Options:
    """The blank is filled with either option; what is compared is the likelihood of what follows it."""
    before, blank, after = row["sentence"].partition("_")
    if not blank:
        raise ValueError("the sentence has no blank, which is written as _")
    filled = (before + row["option1"], before + row["option2"])
    gold = ("1", "2").index(str(row["answer"]))
    return Options(tuple((context, f" {after.strip()}") for context in filled), gold, tuple(map(len, filled)))


def copa(row: Row) -> Options:
    """Two spaces stand before an option, as in lm-eval."""
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    texts = [f" {choice[0].lower()}{choice[1:]}" for choice in (row["choice1"], row["choice2"])]
    return options(f"{row['premise'].strip()[:-1]} {connector}", texts, int(row["label"]))


def cb(row: Row) -> Options:
    context = f"{row['premise']}\nQuestion: {row['hypothesis']}. True, False, or Neither?\nAnswer:"
    return options(context, ("True", "False", "Neither"), int(row["label"]))


def commonsense_qa(row: Row) -> Options:
    """The options stand in the prompt, and their letters are compared."""
    letters, texts = "ABCDE", row["choices"]["text"]
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))
    return options(f"Question: {row['question'].strip()}\n{listed}\nAnswer:", letters, letters.index(row["answerKey"]))
