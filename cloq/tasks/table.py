"""The table of tasks: one entry per task. A new one is a reader in `options` or `questions` and an entry here."""

from __future__ import annotations

import difflib
from dataclasses import replace

from cloq.tasks import options, questions
from cloq.tasks.spec import Judge, Task

_NORM = ("acc", "acc_norm")
_ACC = ("acc",)
_QA = "Question: …\\nAnswer:"
_CHOICES = ("question", "choices", "answerKey")
_INSTRUCTION = ("instruction", "answer")
_TEST = ("test", "validation")
_SHORT = {"stop": ("\n", ".", ","), "max_new_tokens": 32, "metrics": ("exact_match",)}


def _instructed(name: str, judge: Judge, files: tuple[str, ...], max_new_tokens: int) -> Task:
    read = questions.arithmetic if judge is questions.judge_number else questions.instruction
    return Task(
        name, _INSTRUCTION, read, ("exact_match",), "Alpaca's, with the row's instruction", files, splits=_TEST,
        stop=("\n###", "\nBelow is an instruction"), max_new_tokens=max_new_tokens, judge=judge,
    )  # fmt: skip


_ARITHMETIC = {
    name: _instructed(name, questions.judge_number, (name,), 256) for name in ("svamp", "mawps", "multiarith", "addsub", "singleeq")
}
_OPTION_PATTERNS = {
    "arc_easy": (r"answer[1-5]", ("arc_easy",)),
    "arc_challenge": (r"answer[1-5]", ("arc_challenge",)),
    "boolq": (r"\b(?:true|false)\b", ("boolq",)),
    "openbookqa": (r"answer[1-5]", ("openbookqa",)),
    "piqa": (r"solution[12]", ("piqa",)),
    "social_iqa": (r"answer[1-5]", ("social_i_qa", "social_iqa", "siqa")),
    "winogrande": (r"option[12]", ("winogrande",)),
}

_ALL = (
    Task(
        "arc_easy", _CHOICES, options.question_answer, _NORM, _QA, ("arc_easy", "ai2_arc_arc_easy"), "allenai/ai2_arc:ARC-Easy:test",
        _TEST,
    ),
    Task(
        "arc_challenge", _CHOICES, options.question_answer, _NORM, _QA, ("arc_challenge", "ai2_arc_arc_challenge"),
        "allenai/ai2_arc:ARC-Challenge:test", _TEST,
    ),
    Task(
        "basic_arithmetic", _CHOICES, options.question_answer, _ACC, _QA, ("basic_arithmetic", "allenai_basic_arithmetic"),
    ),
    Task(
        "boolq", ("passage", "question", "label|answer"), options.boolq, _ACC, "passage\\n" + "Question: …?\\nAnswer:",
        ("boolq", "super_glue_boolq"), "aps/super_glue:boolq:validation",
    ),
    Task(
        "cb", ("premise", "hypothesis", "label"), options.cb, _ACC, "premise\\nQuestion: …. True, False, or Neither?\\nAnswer:",
        ("cb", "super_glue_cb"), "aps/super_glue:cb:validation",
    ),
    Task(
        "commonsense_qa", _CHOICES, options.commonsense_qa, _ACC, "Question: …\\nA. …\\nB. …\\n…\\nAnswer:, letters compared",
        ("commonsense_qa", "commonsenseqa", "tau_commonsense_qa"), "tau/commonsense_qa::validation",
    ),
    Task(
        "copa", ("premise", "choice1", "choice2", "question", "label"), options.copa, _ACC, "premise because/therefore",
        ("copa", "super_glue_copa"), "aps/super_glue:copa:validation",
    ),
    Task(
        "hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label"), options.hellaswag, _NORM, "activity: context",
        ("hellaswag",), "Rowan/hellaswag::validation",
    ),
    Task(
        "lambada_openai", ("text|context", "text|target"), options.lambada, ("acc", "perplexity"), "the passage without its last word",
        ("lambada", "lambada_openai"), "EleutherAI/lambada_openai:default:test", _TEST,
    ),
    Task(
        "openbookqa", ("question_stem", "choices", "answerKey"), options.open_book, _NORM, "the question's stem",
        ("openbookqa",), "allenai/openbookqa:main:test", _TEST,
    ),
    Task("piqa", ("goal", "sol1", "sol2", "label"), options.piqa, _NORM, _QA, ("piqa",), "baber/piqa::validation"),
    Task(
        "sciq", ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"), options.sciq, _NORM,
        "support\\n" + _QA, ("sciq",), "allenai/sciq::test", _TEST, "without a passage the task is sciq_closed",
    ),
    Task(
        "sciq_closed", ("question", "distractor1", "distractor2", "distractor3", "correct_answer"), options.sciq_closed, _NORM, _QA,
        ("sciq", "sciq_closed"), "allenai/sciq::test", _TEST,
    ),
    Task(
        "social_iqa", ("context", "question", "answerA", "answerB", "answerC", "label"), options.social_iqa, _ACC,
        "Q: context question\\nA:", ("social_iqa", "social_i_qa", "siqa"), "lighteval/siqa::validation",
    ),
    Task(
        "winogrande", ("sentence", "option1", "option2", "answer"), options.winogrande, _ACC, "the sentence with its blank filled",
        ("winogrande", "winogrande_xl", "winogrande_winogrande_xl"), "allenai/winogrande:winogrande_xl:validation",
    ),
    Task(
        "gsm8k", ("question", "answer"), questions.gsm8k, ("flexible_extract", "strict_match"), _QA, ("gsm8k",), "openai/gsm8k:main:test",
        _TEST, shots=5, stop=("Question:", "</s>", "<|im_end|>"), max_new_tokens=256, judge=questions.judge_gsm8k,
    ),
    Task(
        "nq_open", ("question", "answer"), questions.natural_question, prompt="Q: …?\\nA:", files=("nq_open",),
        hub="google-research-datasets/nq_open::validation", description="Answer these questions:\n\n", separator="\n",
        judge=questions.judge_short_answer(articles=False), **_SHORT,
    ),
    Task(
        "triviaqa", ("question", "answer"), questions.trivia, prompt="Question: …?\\nAnswer:",
        files=("triviaqa", "trivia_qa", "trivia_qa_rc_wikipedia_nocontext"), hub="mandarjoshi/trivia_qa:rc.nocontext:validation",
        judge=questions.judge_short_answer(articles=True), **_SHORT,
    ),
    *_ARITHMETIC.values(),
    _instructed("aqua", questions.judge_option(questions.LETTER), ("aqua",), 256),
    _instructed("gsm8k_instruct", questions.judge_number, ("gsm8k",), 256),
    *(_instructed(f"{name}_instruct", questions.judge_option(p), files, 32) for name, (p, files) in _OPTION_PATTERNS.items()),
)  # fmt: skip


def _advised(task: Task) -> Task:
    """A task that exists in two forms says which name the other form has."""
    names = {task.name for task in _ALL}
    if f"{task.name}_instruct" in names:
        return replace(task, advice=f"rows with instruction and answer are the task {task.name}_instruct")
    other = task.name.removesuffix("_instruct")
    return replace(task, advice=f"rows without an instruction are the task {other}") if other != task.name else task


TASKS: dict[str, Task] = {task.name: _advised(task) for task in _ALL}

ALIASES = {"lambada": "lambada_openai", "siqa": "social_iqa", "csqa": "commonsense_qa", "obqa": "openbookqa"}
"""Shorter names that people use."""


def own_task(name: str) -> Task | None:
    """The task of this name in the table, or `None`."""
    return TASKS.get(ALIASES.get(name, name))


def nearest(name: str, further: tuple[str, ...] = ()) -> str | None:
    """The known name that is most like this one, of the table's and further ones."""
    found = difflib.get_close_matches(name.lower(), [*TASKS, *ALIASES, *further], 1, cutoff=0.6)
    return found[0] if found else None
