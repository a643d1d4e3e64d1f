"""Rows of generative tasks → prompts, and generated text → right or wrong.

GSM8K, TriviaQA and NQ-Open ask and judge as lm-eval's tasks do. The others are instructions as in LLM-Adapters' data (`instruction`,
`answer`), in Alpaca's prompt: arithmetic is judged by the last number of the answer, multiple choice by the first option that it names.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping
from typing import Any

from cloq.tasks.spec import Judge, Question

Row = Mapping[str, Any]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def gsm8k(row: Row) -> Question:
    prompt = f"Question: {row['question']}\nAnswer:"
    return Question(prompt, (row["answer"],), f" {row['answer']}", row["question"])


def trivia(row: Row) -> Question:
    aliases = tuple(row["answer"]["aliases"])
    return Question(f"Question: {row['question']}?\nAnswer:", aliases, f" {aliases[0]}", row["question"])


def natural_question(row: Row) -> Question:
    answers = (row["answer"],) if isinstance(row["answer"], str) else tuple(row["answer"])
    return Question(f"Q: {row['question']}?\nA:", answers, f" {answers[0]}", row["question"])


def instruction(row: Row) -> Question:
    asked = row["instruction"].strip() + (f"\n\n{row['input'].strip()}" if (row.get("input") or "").strip() else "")
    solution = (row.get("output") or "").strip() or str(row["answer"])
    return Question(ALPACA.format(instruction=asked), (str(row["answer"]),), solution, asked)


def arithmetic(row: Row) -> Question:
    """An instruction whose answer is a number."""
    float(str(row["answer"]).replace(",", ""))
    return instruction(row)


# -- judges ------------------------------------------------------------------------------------------------------------

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def judge_gsm8k(text: str, question: Question) -> dict[str, float]:
    """`strict_match`: the first number after `####`. `flexible_extract`: the last number of the text."""
    strict = _STRICT.search(text)
    flexible = [next(filter(None, groups), "") for groups in _FLEXIBLE.findall(text)]
    gold = _bare(question.golds[0])
    found = {"strict_match": strict.group(1) if strict else "", "flexible_extract": flexible[-1] if flexible else ""}
    return {metric: float(_bare(answer.strip()) == gold) for metric, answer in found.items()}


def _bare(text: str) -> str:
    for pattern in _IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()


def judge_short_answer(articles: bool) -> Judge:
    """`exact_match` with any of the answers, letter case and punctuation aside; articles too where they do not count."""
    table = str.maketrans("", "", string.punctuation)

    def normal(text: str) -> str:
        text = text if articles else re.sub(r"\b(?:The |the |An |A |The |a |an )", "", text)
        return text.lower().translate(table)

    def judge(text: str, question: Question) -> dict[str, float]:
        return {"exact_match": float(normal(text.strip()) in map(normal, question.golds))}

    return judge


def judge_number(text: str, question: Question) -> dict[str, float]:
    """`exact_match`: the last number of the text is the answer, within 0.001 as in LLM-Adapters."""
    numbers = _NUMBER.findall(text)
    found = float(numbers[-1].replace(",", "")) if numbers else math.inf
    return {"exact_match": float(abs(found - float(question.golds[0].replace(",", ""))) <= 1e-3)}


def judge_option(pattern: str) -> Judge:
    """`exact_match`: the first option that the text names, by a pattern, is the answer. Letter case counts for single letters only."""
    option = re.compile(pattern, 0 if pattern == LETTER else re.IGNORECASE)

    def judge(text: str, question: Question) -> dict[str, float]:
        found = option.search(text)
        return {"exact_match": float(found is not None and found.group(0).lower() == question.golds[0].lower())}

    return judge


LETTER = r"(?<![A-Za-z])[A-E](?![A-Za-z'])"
