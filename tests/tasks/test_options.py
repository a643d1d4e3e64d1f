"""Rows as they are asked: byte for byte what lm-eval asks, where it has the task."""

import json

import pytest

from cloq.tasks.table import ALIASES, TASKS, nearest, own_task
from tests.finished import needs
from tests.tasks.data import ROWS

CHOICE = [name for name in ROWS if name in TASKS and not TASKS[name].generative]
GENERATIVE = ["gsm8k", "triviaqa", "nq_open"]
_FROM_BOOLQ = {"answer": "label"}


@pytest.fixture(scope="module")
def manager():
    from cloq.tasks.harness import task_manager

    return task_manager()


def lm_eval_task(manager, name: str, tmp_path, rows):
    """lm-eval's own configuration of a task, on local rows in the place of the hub's."""
    rows = [{_FROM_BOOLQ.get(key, key) if name == "boolq" else key: value for key, value in row.items()} for row in rows]
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(file) for split in ("train", "validation", "test")}
    own = {"include": str(manager.task_index[name].yaml_path), "task": name, "dataset_path": "json", "dataset_name": None}
    yaml = tmp_path / f"{name}.yaml"
    yaml.write_text(json.dumps(own | {"dataset_kwargs": {"data_files": files}}))
    return manager.load([str(yaml)])["tasks"][name]


@needs("lm_eval")
@pytest.mark.parametrize("name", CHOICE)
def test_a_choice_is_asked_as_lm_eval_asks(name, manager, tmp_path):
    task = lm_eval_task(manager, name, tmp_path, ROWS[name])
    for doc, row in zip(task.eval_docs, ROWS[name], strict=True):
        context = task.fewshot_context(doc, 0)
        asked = task.construct_requests(doc, context)
        theirs = [one.args for one in (asked if isinstance(asked, list) else [asked])]
        item = TASKS[name].read(row)
        assert list(item.pairs) == theirs
        if len(theirs) > 1:
            gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            choices = task.doc_to_choice(doc)
            assert item.gold == (choices.index(gold) if isinstance(gold, str) else gold)
            assert list(item.lengths) == [len(choice) for choice in choices] or TASKS[name].metrics == ("acc",)


@needs("lm_eval")
@pytest.mark.parametrize("name", GENERATIVE)
def test_a_question_is_asked_and_judged_as_lm_eval_does(name, manager, tmp_path):
    task, own = lm_eval_task(manager, name, tmp_path, ROWS[name]), TASKS[name]
    answers = [" It is 1,000.\n#### 1,000", " $2,000.", " the beatles!", " Band", "Number 1", " 3000 or 4", " #### 4000.", ""]
    for doc, row in zip(task.eval_docs, ROWS[name], strict=True):
        question = own.read(row)
        assert own.description + question.prompt == task.fewshot_context(doc, 0)
        assert list(own.stop) == task.config.generation_kwargs["until"]
        for text in answers:
            assert own.judge(text, question) == pytest.approx(judged_by_lm_eval(task, doc, text)), (text, question.golds)


def judged_by_lm_eval(task, doc, text: str) -> dict[str, float]:
    from lm_eval.api.instance import Instance

    instance = Instance("generate_until", doc, ("", {}), 0, resps=[text])
    task._instances = [instance]
    task.apply_filters()
    found = {}
    for name, filtered in instance.filtered_resps.items():
        metric = {"strict-match": "strict_match", "flexible-extract": "flexible_extract"}.get(name, "exact_match")
        found[metric] = float(task.process_results(doc, [filtered])["exact_match"])
    return found


def test_the_last_word_may_stand_in_a_column_of_its_own():
    read = TASKS["lambada_openai"].read
    assert read({"context": "opened the", "target": " door"}) == read({"text": "opened the door"})


def test_a_closed_book_question_has_no_passage():
    assert "Water" not in TASKS["sciq_closed"].read(ROWS["sciq"][0]).pairs[0][0]


def test_every_task_has_a_name_of_its_own_and_says_its_prompt():
    assert all(name == task.name and task.prompt and task.metrics and task.files for name, task in TASKS.items())
    assert all(own_task(short) is TASKS[name] for short, name in ALIASES.items())
    assert own_task("nonesuch") is None and nearest("arc_esy") == "arc_easy"


@pytest.mark.parametrize(
    ("pattern_of", "text", "gold", "right"),
    [
        ("arc_easy_instruct", "the correct answer is answer3", "answer3", 1),
        ("arc_easy_instruct", "Answer2, or answer3", "answer3", 0),
        ("boolq_instruct", "That is True.", "true", 1),
        ("boolq_instruct", "untrue", "true", 0),
        ("piqa_instruct", "solution2", "solution2", 1),
        ("winogrande_instruct", "neither", "option1", 0),
        ("aqua", "The answer is (D).", "D", 1),
        ("aqua", "A: the answer", "A", 1),
        ("aqua", "Adding Cats gives E", "E", 1),
        ("svamp", "3 and 4 make 7.", "7.0", 1),
        ("svamp", "it is 1,250 dollars", "1250", 1),
        ("svamp", "-0.6666", "-0.66666666", 1),
        ("svamp", "0.66", "0.6666", 0),
        ("svamp", "no number", "0", 0),
    ],
)
def test_answers_to_instructions(pattern_of, text, gold, right):
    task = TASKS[pattern_of]
    question = task.read({"instruction": "Do.", "answer": gold})
    assert task.judge(text, question) == {"exact_match": right}
    assert question.prompt.endswith("### Instruction:\nDo.\n\n### Response:\n")
