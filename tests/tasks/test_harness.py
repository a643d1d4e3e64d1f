"""lm-eval on our models: tasks of one's own from local data, and the same scores as ours where both have the task."""

import importlib.util
import json
import sys

import pytest

from cloq.errors import MissingLibrary, TaskError
from cloq.tasks import TaskSettings, answer, prepare
from cloq.tasks.model import opened
from tests.finished import needs
from tests.tasks.data import ROWS, wide_model, write_all

lm_eval = needs("lm_eval")
OWN = {
    "arc_easy": {
        "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}", "doc_to_choice": "{{choices.text}}",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    },
    "lambada_openai": {
        "output_type": "loglikelihood", "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}", "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "triviaqa": {
        "output_type": "generate_until", "doc_to_text": "Question: {{question}}?\nAnswer:", "doc_to_target": "{{answer.aliases}}",
        "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 32},
        "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True, "ignore_punctuation": True}
        ],
    },
    "winogrande": {
        "output_type": "multiple_choice", "doc_to_text": "{{0 if answer == '1' else 1}}",
        "doc_to_choice": "{{[sentence.split('_')[0] + option1, sentence.split('_')[0] + option2]}}",
        "doc_to_target": "{{sentence.split('_')[1].strip()}}", "metric_list": [{"metric": "acc"}],
    },
    "copa": {
        "output_type": "multiple_choice", "doc_to_target": "label",
        "doc_to_text": "{{premise.strip()[:-1]}} {{'because' if question == 'cause' else 'therefore'}}",
        "doc_to_choice": "{{[' ' + choice1[0].lower() + choice1[1:], ' ' + choice2[0].lower() + choice2[1:]]}}",
        "metric_list": [{"metric": "acc"}],
    },
    "cb": {
        "output_type": "multiple_choice", "doc_to_text": "{{premise}}\nQuestion: {{hypothesis}}. True, False, or Neither?\nAnswer:",
        "doc_to_target": "label", "doc_to_choice": ["True", "False", "Neither"],
        "metric_list": [{"metric": "acc"}, {"metric": "mcc"}],
    },
}  # fmt: skip
"""Tasks in lm-eval's own terms, as a user writes them, over the rows of `tests.tasks.data`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and a folder of YAML files: JSON is YAML."""
    root = tmp_path_factory.mktemp("tasks")
    write_all(root)
    for name, config in OWN.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(root / f"{name}_validation.jsonl")}}}
        yaml = {"task": f"my_{name}", "validation_split": "validation", **data, **config}
        (root / f"{name}.yaml").write_text(json.dumps(yaml))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with opened(wide_model(tmp_path_factory.mktemp("model")), None, "cpu", True) as one:
        yield one


@pytest.fixture(scope="module")
def both(folder, model):
    """The same rows by us and by lm-eval."""
    own = prepare(TaskSettings(tuple(OWN), {"": folder}))
    theirs = prepare(TaskSettings(tuple(f"my_{name}" for name in OWN), include=folder))
    return answer(model, own, "own"), answer(model, theirs, "theirs")


@lm_eval
@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("arc_easy", "acc"),
        ("arc_easy", "acc_norm"),
        ("lambada_openai", "acc"),
        ("lambada_openai", "perplexity"),
        ("triviaqa", "exact_match"),
    ],
)
def test_scores_and_rows_are_those_of_lm_eval(both, task, metric):
    own, theirs = both
    scores = [next(s for s in one.scores if s.task == name and s.metric == metric) for one, name in ((own, task), (theirs, f"my_{task}"))]
    assert scores[0].value == pytest.approx(scores[1].value, rel=1e-5) and scores[0].rows == scores[1].rows == len(ROWS[task])
    assert scores[0].low == pytest.approx(scores[1].low, rel=1e-4) and scores[1].protocol == "lm-eval, 0-shot"
    rows = [[row for row in one.rows if row.task == name] for one, name in ((own, task), (theirs, f"my_{task}"))]
    assert [row.metrics[metric] for row in rows[0]] == pytest.approx([row.metrics[metric] for row in rows[1]], rel=1e-5)


@lm_eval
def test_generated_texts_are_those_of_lm_eval(both):
    own, theirs = both
    texts = [row.detail["text"].strip() for row in own.rows if row.task == "triviaqa"]
    assert texts == [row.detail["responses"][0] for row in theirs.rows if row.task == "my_triviaqa"] and any(texts)


@lm_eval
def test_a_score_that_is_no_mean_over_rows_is_lm_evals_own_and_has_no_interval(both):
    one = next(score for score in both[1].scores if (score.task, score.metric) == ("my_cb", "mcc"))
    assert one.low != one.low and not any("mcc" in row.metrics for row in both[1].rows)


@lm_eval
def test_a_limit_draws_the_same_rows_as_ours(folder, model):
    own = prepare(TaskSettings(("arc_easy",), {"": folder}, limit=3, seed=5))
    theirs = prepare(TaskSettings(("my_arc_easy",), include=folder, limit=3, seed=5))
    a, b = answer(model, own, "own"), answer(model, theirs, "theirs")
    assert [row.row for row in a.rows] == [row.row for row in b.rows] and len(b.rows) == 3
    assert b.scores[0].total == len(ROWS["arc_easy"]) and a.scores[0].value == pytest.approx(b.scores[0].value)


@lm_eval
def test_examples_are_lm_evals(folder, model):
    one = answer(model, prepare(TaskSettings(("my_arc_easy",), include=folder, shots=2, limit=2)), "theirs")
    assert one.scores[0].protocol == "lm-eval, 2-shot (seed 0)"


@lm_eval
def test_what_the_user_changes_reaches_lm_eval_and_the_protocol(folder, model):
    asked = TaskSettings(("my_triviaqa", "my_arc_easy"), include=folder, max_new_tokens=3, limit=2)
    one = answer(model, prepare(asked), "theirs")
    assert {score.task: score.protocol for score in one.scores} == {
        "my_triviaqa": "lm-eval, 0-shot, at most 3 new tokens",
        "my_arc_easy": "lm-eval, 0-shot",
    }
    assert all(len(row.detail["responses"][0]) <= 3 for row in one.rows if row.task == "my_triviaqa")
    model.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    try:
        chat = answer(model, prepare(TaskSettings(("my_arc_easy",), include=folder, chat=True)), "theirs")
    finally:
        model.tokenizer.chat_template = None
    plain = answer(model, prepare(TaskSettings(("my_arc_easy",), include=folder)), "theirs")
    assert chat.scores[0].protocol == "lm-eval, 0-shot, chat template"
    assert [row.detail for row in chat.rows] != [row.detail for row in plain.rows]
    with pytest.raises(TaskError, match=r"lm-eval cannot run my_triviaqa on this model \(.*max"):
        answer(model, prepare(TaskSettings(("my_triviaqa",), include=folder, max_new_tokens=5000)), "theirs")


@lm_eval
@pytest.mark.parametrize("template", ["<{{ m.role }}>{{ m.content }}", "{{ bos_token }}[{{ m.role }}] {{ m.content }}\n"])
def test_a_chat_template_asks_as_lm_eval_does(folder, model, template):
    """With begin-of-text token or without, and a line break before the answer."""
    names = ("arc_easy", "winogrande", "copa", "lambada_openai")
    end = "{% if add_generation_prompt %}<a>\n{% endif %}"
    model.tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}" + end
    try:
        own = answer(model, prepare(TaskSettings(names, {"": folder}, chat=True)), "own")
        theirs = answer(model, prepare(TaskSettings(tuple(f"my_{name}" for name in names), include=folder, chat=True)), "theirs")
    finally:
        model.tokenizer.chat_template = None
    plain = answer(model, prepare(TaskSettings(names, {"": folder})), "own")
    assert {score.protocol for score in own.scores} == {"cloq, 0-shot, chat template"}
    for name in names:
        rows = [[row for row in one.rows if row.task.removeprefix("my_") == name] for one in (own, theirs, plain)]
        for own_row, their_row in zip(rows[0], rows[1], strict=True):
            logs = [float(response[0]) for response in their_row.detail["responses"]]
            assert own_row.detail["log_likelihoods"] == pytest.approx(logs, rel=1e-5), name
        assert [row.metrics["acc"] for row in rows[0]] == [row.metrics["acc"] for row in rows[1]]
        assert rows[0][0].detail != rows[2][0].detail


@lm_eval
def test_what_cannot_be_loaded_is_one_line(folder, tmp_path):
    yaml = json.loads((folder / "arc_easy.yaml").read_text()) | {
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "none.jsonl")}}
    }
    (tmp_path / "lost.yaml").write_text(json.dumps(yaml | {"task": "lost"}))
    with pytest.raises(TaskError, match=r"lm-eval cannot load the task lost .*FileNotFoundError"):
        prepare(TaskSettings(("lost",), include=tmp_path))
    with pytest.raises(TaskError, match=r"--include is .*, which is no folder"):
        prepare(TaskSettings(("lost",), include=tmp_path / "nowhere"))
    with pytest.raises(TaskError, match=r"unknown task 'wikitexxt' \(did you mean wikitext\?\)"):
        prepare(TaskSettings(("wikitexxt",)))


def test_without_lm_eval_the_command_that_installs_it_is_said(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest))
    with pytest.raises(MissingLibrary, match=r"the task arc_esy \(did you mean arc_easy\?\) needs the library lm-eval.*cloq\[tasks\]"):
        prepare(TaskSettings(("arc_esy",)))
    with pytest.raises(MissingLibrary, match="the task arc_easy needs"):
        prepare(TaskSettings(("arc_easy",), harness=True))


def test_own_tasks_never_import_lm_eval(folder, model):
    before = "lm_eval" in sys.modules
    answer(model, prepare(TaskSettings(("copa", "svamp"), {"": folder}, max_new_tokens=2)), "own")
    assert ("lm_eval" in sys.modules) == before
