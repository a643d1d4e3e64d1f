"""Data files: found by name and columns, drawn by a seed, and refused with what is missing."""

import gzip
import json
import random
from pathlib import Path

import pytest

from cloq.errors import CalibrationError, TaskError
from cloq.tasks import rows as rows_module
from cloq.tasks.rows import read_task
from cloq.tasks.table import TASKS
from tests.tasks.data import ROWS, write_all, write_rows

INSTRUCTED = [{"instruction": "Say answer1.", "input": "", "output": "the correct answer is answer1", "answer": "answer1"}]


def read(name: str, path: Path, **settings):
    return read_task(TASKS[name], {"": path}, **settings)


@pytest.mark.parametrize("name", ROWS)
def test_a_tasks_file_is_found_by_its_name(name, tmp_path):
    found = read(name, write_all(tmp_path), shots=0)
    assert (found.total, found.source) == (len(ROWS[name]), f"{name}_validation.jsonl")
    assert [row.item for row in found.rows] == [TASKS[name].read(row).after(TASKS[name].description) for row in ROWS[name]]


@pytest.mark.parametrize(
    "file", ["ai2_arc_ARC-Easy_validation.jsonl.gz", "ARC-Easy/test.json", "arc_easy.jsonl", "sub/arc-easy_test.parquet"]
)
def test_names_as_data_sets_are_called(file, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS["arc_easy"])
    if file.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif file.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS["arc_easy"]), path)
    else:
        path.write_text(json.dumps(ROWS["arc_easy"]) if file.endswith(".json") else lines)
    assert len(read("arc_easy", tmp_path).rows) == len(ROWS["arc_easy"])


def test_of_two_forms_under_one_name_the_columns_decide(tmp_path):
    write_rows(tmp_path, "arc_easy")
    (tmp_path / "ARC-Easy").mkdir()
    (tmp_path / "ARC-Easy/test.json").write_text(json.dumps(INSTRUCTED))
    assert read("arc_easy", tmp_path).source == "arc_easy_validation.jsonl"
    assert read("arc_easy_instruct", tmp_path).source == "ARC-Easy/test.json"
    with pytest.raises(TaskError, match=r"has no column question; .* there are instruction, .*are the task arc_easy_instruct"):
        read("arc_easy", tmp_path / "ARC-Easy")


def test_test_comes_before_validation_where_lm_eval_takes_it_and_training_rows_never_count(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"arc_easy_{split}.jsonl").write_text(json.dumps(ROWS["arc_easy"][0]) + "\n")
        (tmp_path / f"piqa_{split}.jsonl").write_text(json.dumps(ROWS["piqa"][0]) + "\n")
    assert read("arc_easy", tmp_path).source == "arc_easy_test.jsonl"
    assert read("piqa", tmp_path).source == "piqa_validation.jsonl"


def test_a_limit_draws_by_the_seed(tmp_path):
    write_rows(tmp_path, "arc_easy")
    some, again, others = (read("arc_easy", tmp_path, limit=4, seed=seed) for seed in (0, 0, 1))
    assert [row.index for row in some.rows] == sorted(random.Random(0).sample(range(8), 4))
    assert some == again and some.rows != others.rows and some.total == 8
    assert len(read("arc_easy", tmp_path, limit=100).rows) == 8


def test_examples_are_other_rows_and_stay_the_same_under_a_limit(tmp_path):
    write_rows(tmp_path, "arc_easy")
    whole = read("arc_easy", tmp_path, shots=2)
    assert whole.protocol == "cloq, 2-shot (seed 0)"
    for row, plain in zip(whole.rows, read("arc_easy", tmp_path).rows, strict=True):
        context, bare = row.item.pairs[0][0], plain.item.pairs[0][0]
        examples = context.removesuffix(bare).split("\n\n")
        assert context.endswith(bare) and len(examples) == 3 and examples[-1] == ""
        others = {other.item.solved() for other in read("arc_easy", tmp_path).rows if other.key != row.key}
        assert set(examples[:2]) <= others and len(set(examples)) == 3
    few = read("arc_easy", tmp_path, shots=2, limit=3)
    assert set(few.rows) <= set(whole.rows)
    with pytest.raises(TaskError, match="8 examples are wanted, but there are 7 rows"):
        read("arc_easy", tmp_path, shots=8)


def test_examples_come_from_training_rows_where_there_are_any(tmp_path):
    training = [{"question": "Only here?", "answer": "Yes.\n#### 1"}] * 5
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in training))
    write_rows(tmp_path, "gsm8k")
    found = read("gsm8k", tmp_path)
    assert found.pool == "gsm8k_train.jsonl" and found.protocol.startswith("cloq, 5-shot")
    assert found.rows[0].item.prompt.count("Question: Only here?\nAnswer: Yes.\n#### 1\n\n") == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda row: row.pop("answerKey"),
            "line 1 has no column answerKey; arc_easy needs question, choices, answerKey; there are question, choices",
        ),
        (lambda row: row.update(answerKey="Z"), r"line 1 is no row of arc_easy \(ValueError"),
        (lambda row: row.update(choices={}), r"line 1 is no row of arc_easy \(KeyError"),
    ],
)
def test_a_row_that_does_not_fit_is_named(change, said, tmp_path):
    row = json.loads(json.dumps(ROWS["arc_easy"][0]))
    change(row)
    write_rows(tmp_path, "arc_easy", [row])
    with pytest.raises(TaskError, match=said):
        read("arc_easy", tmp_path)


def test_missing_empty_and_broken_files_are_refused(tmp_path):
    with pytest.raises(TaskError, match="there is no file or folder"):
        read("piqa", tmp_path / "none")
    with pytest.raises(TaskError, match=r"piqa: no data in .* \(there: no .json"):
        read("piqa", tmp_path)
    write_rows(tmp_path, "arc_easy")
    with pytest.raises(TaskError, match=r"\(there: arc_easy\). Name a file: --task-data piqa=FILE"):
        read("piqa", tmp_path)
    (tmp_path / "piqa.jsonl").write_text("")
    with pytest.raises(TaskError, match="holds no rows"):
        read("piqa", tmp_path)
    (tmp_path / "piqa.jsonl").write_text("{broken\n")
    with pytest.raises(CalibrationError, match="line 1: not valid JSON"):
        read("piqa", tmp_path)
    (tmp_path / "piqa.jsonl").write_text("[1, 2]")
    with pytest.raises(TaskError, match=r"has no column|is no object"):
        read("piqa", tmp_path / "piqa.jsonl")


def test_training_files_are_passed_over_unless_they_are_named(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS["piqa"])
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/train.jsonl").write_text(lines)
    for data in ({"": tmp_path}, {"piqa": tmp_path / "piqa"}):
        with pytest.raises(TaskError, match=r"\(there: training files alone, such as train\.jsonl, which are for examples\)"):
            read_task(TASKS["piqa"], data)
    found = read_task(TASKS["piqa"], {"piqa": tmp_path / "piqa/train.jsonl"})
    assert found.note == "piqa: piqa/train.jsonl is a training file by its name; it is evaluated since --task-data names it"
    (tmp_path / "piqa/test.jsonl").write_text(lines)
    assert read("piqa", tmp_path).source == "piqa/test.jsonl" and read("piqa", tmp_path).note == ""
    (tmp_path / "rows.text").write_text(lines)
    assert read("piqa", tmp_path / "rows.text").source == "rows.text"


def test_two_files_that_both_fit_are_not_chosen_between(tmp_path):
    write_rows(tmp_path / "a", "piqa")
    write_rows(tmp_path / "b", "piqa")
    with pytest.raises(TaskError, match="could be meant; name one: --task-data piqa=FILE"):
        read("piqa", tmp_path)
    assert read_task(TASKS["piqa"], {"": tmp_path, "piqa": tmp_path / "a"}).total == 6


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A hub on disk: `load_dataset` is the library's own, given a folder in the place of the hub's name."""
    import datasets

    load, asked = datasets.load_dataset, []

    def local(name, config, split):
        asked.append((name, config, split))
        return load(str(tmp_path / name), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(rows_module, "_ask", lambda task, name: None)
    return tmp_path, asked


def test_without_data_the_hubs_rows_are_read(mirror):
    folder, asked = mirror
    (folder / "allenai/ai2_arc").mkdir(parents=True)
    (folder / "allenai/ai2_arc/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["arc_easy"]))
    found = read_task(TASKS["arc_easy"], {})
    assert asked == [("allenai/ai2_arc", "ARC-Easy", "test")] and found.source == "allenai/ai2_arc, test"
    assert [row.item for row in found.rows] == [TASKS["arc_easy"].read(row) for row in ROWS["arc_easy"]]


def test_a_hub_that_does_not_have_it_is_said_with_the_way_out(mirror):
    with pytest.raises(TaskError, match=r"piqa: the hub data set baber/piqa .* cannot be read .* --task-data PATH, with the columns goal"):
        read_task(TASKS["piqa"], {})


def test_without_a_hub_and_without_data_it_is_said_at_once(monkeypatch):
    from huggingface_hub import HfApi

    def unreachable(self, name, timeout):
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    with pytest.raises(
        TaskError, match=r"piqa: no --task-data is given, and the hub does not give baber/piqa \(ConnectionError: no route\)"
    ):
        read_task(TASKS["piqa"], {})
    with pytest.raises(TaskError, match="svamp has no data set on the hub; name its file"):
        read_task(TASKS["svamp"], {})
