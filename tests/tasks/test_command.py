"""`cloq eval` on tasks, on adapters, on plain models, and on several models beside each other."""

import json
import math
import shutil

import pytest
import torch

from cloq.cli import main
from cloq.report import read_report
from tests.finished import edit_json, edit_tensors, needs
from tests.tasks.data import ROWS, wide_model, write_all

TINY = ["--bits", "2", "--group-size", "32", "--rank", "4", "--calib-samples", "4", "--seq-len", "32", "--device", "cpu", "--quiet"]
TEXT = "A tokenizer of bytes makes much of few words. " * 40


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a text, the tasks' data, and a finished run with a copy of its adapter that was changed a little."""
    root = tmp_path_factory.mktemp("place")
    model = wide_model(root / "model", num_hidden_layers=2)
    (root / "text.txt").write_text(TEXT)
    write_all(root / "data")
    assert main(["quantize", str(model), "--calib", str(root / "text.txt"), "--out", str(root / "run"), *TINY]) == 0
    shutil.copytree(root / "run/adapter", root / "trained")
    from safetensors.torch import load_file, save_file

    weights = load_file(root / "trained/adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    changed = {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
    save_file(changed, root / "trained/adapter_model.safetensors", {"format": "pt"})
    return root


@pytest.fixture
def evaluate(place, capsys):
    """Runs `cloq eval … --json` and gives what it printed."""

    def run(*argv):
        assert main(["eval", *map(str, argv), "--device", "cpu", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def tasks(place, *names: str) -> list:
    return ["--tasks", ",".join(names), "--task-data", place / "data"]


def test_a_run_is_three_models_and_its_report_keeps_their_scores(place, evaluate):
    found = evaluate(place / "run", *tasks(place, "arc_easy", "lambada"))
    scores = [one for one in found["results"] if one["metric"] == "acc_norm"]
    assert [one["model"] for one in scores] == ["16-bit", "base", "base + adapter"]
    assert [one["weights"] for one in scores] == ["float32", *["gptq 2-bit decoded to float32"] * 2]
    assert {(one["model"], one["first"]) for one in found["comparisons"]} == {("base", "16-bit"), ("base + adapter", "16-bit")}
    kept = [one for one in read_report(place / "run").tasks if one.metric == "acc_norm"]
    assert [(one.model, one.value, one.low) for one in kept] == [(one["model"], one["value"], one["low"]) for one in scores]
    rows = [json.loads(line) for line in (place / "run/evaluation.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * (len(ROWS["arc_easy"]) + len(ROWS["lambada_openai"]))
    assert "arc_easy" in (place / "run/report.html").read_text()


def test_a_repeated_evaluation_replaces_its_numbers_and_perplexities_stay(place, evaluate):
    evaluate(place / "run", "--text", place / "text.txt", "--seq-len", 32, "--samples", 4)
    evaluate(place / "run", *tasks(place, "piqa"))
    evaluate(place / "run", *tasks(place, "piqa"), "--no-dense")
    report = read_report(place / "run")
    assert [one.model for one in report.quality] == ["16-bit", "base", "base + adapter"]
    assert sorted(one.model for one in report.tasks if one.task == "piqa" and one.metric == "acc") == ["16-bit", "base", "base + adapter"]


def test_a_trained_adapter_stands_beside_the_runs_models_or_alone(place, evaluate):
    beside = evaluate(place / "run", *tasks(place, "lambada"), "--adapter", place / "trained", "--no-dense")["results"]
    logs = {one["model"]: one["value"] for one in beside if one["metric"] == "perplexity"}
    assert list(logs) == ["base", "base + adapter", "base + trained"] and logs["base + trained"] != logs["base + adapter"]
    alone = evaluate(place / "trained", *tasks(place, "lambada"))
    assert next(one["value"] for one in alone if one["metric"] == "perplexity") == pytest.approx(logs["base + trained"], rel=1e-6)
    given = evaluate(place / "run/model", *tasks(place, "lambada"), "--adapter", place / "trained")
    assert given[1]["value"] == pytest.approx(logs["base + trained"], rel=1e-6) and given[1]["model"] == "model + trained"


def test_perplexity_of_an_adapter_and_of_a_plain_model(place, evaluate):
    text = ["--text", place / "text.txt", "--seq-len", 32, "--samples", 4]
    run = {one["model"]: one["perplexity"] for one in evaluate(place / "run", *text, "--adapter", place / "trained")}
    assert evaluate(place / "model", *text)[0]["perplexity"] == pytest.approx(run["16-bit"], rel=1e-6)
    assert evaluate(place / "run/adapter", *text)[0]["perplexity"] == pytest.approx(run["base + adapter"], rel=1e-6)
    assert evaluate(place / "trained", *text)[0]["perplexity"] == pytest.approx(run["base + trained"], rel=1e-6)


@needs("gptqmodel", "optimum")
def test_packed_and_decoded_agree(place, evaluate):
    wanted = ["--no-dense", *tasks(place, "lambada")]
    decoded, packed = (evaluate(place / "run", flag, *wanted)["results"] for flag in ("--decoded", "--packed"))
    assert {one["weights"] for one in packed} == {"packed gptq 2-bit"}
    for a, b in zip(decoded, packed, strict=True):
        assert (
            math.log(a["value"]) == pytest.approx(math.log(b["value"]), abs=2e-2)
            if a["metric"] == "perplexity"
            else a["value"] == b["value"]
        )


def test_models_are_compared_now_and_from_stored_rows_later(place, evaluate, tmp_path):
    asked = [*tasks(place, "arc_easy"), "--text", place / "text.txt", "--seq-len", 32, "--samples", 6]
    rows = tmp_path / "rows.jsonl"
    now = evaluate("--compare", f"full={place / 'model'}", place / "run", f"tuned={place / 'trained'}", *asked, "--rows", rows)
    later = evaluate("--compare", rows)
    assert now["comparisons"] == later["comparisons"]
    assert [
        (one["model"], one["task"].rpartition("/")[2], one["metric"], one["test"]) for one in now["comparisons"] if one["model"] == "run"
    ] == [
        ("run", "text.txt", "perplexity", "paired t"),
        ("run", "arc_easy", "acc", "McNemar, exact"),
        ("run", "arc_easy", "acc_norm", "McNemar, exact"),
    ]
    values = [{(one["model"], one["metric"]): one["value"] for one in found["results"] if "metric" in one} for found in (now, later)]
    assert values[0] == pytest.approx(values[1])
    assert evaluate("--compare", rows, f"again={place / 'model'}", *asked)["comparisons"][-1]["p"] == 1.0


def test_tables_say_what_was_done(place, capsys):
    argv = ["eval", "--compare", place / "model", place / "run", *tasks(place, "arc_easy", "svamp"), "--limit", 3, "--max-new-tokens", 4]
    assert main([str(a) for a in argv]) == 0
    said = capsys.readouterr().out
    assert "cloq, 0-shot, with 95 % intervals" in said and "cloq, 0-shot, at most 4 new tokens" in said
    assert "3 of 8" in said and "computed as: model: float32; run: gptq 2-bit decoded to float32" in said
    assert "p: against model on the same rows (McNemar, exact), not corrected" in said


def test_prompts_that_do_not_fit_are_counted(place, capsys, tmp_path):
    short = wide_model(tmp_path / "short", max_position_embeddings=40)
    assert main([str(a) for a in ("eval", short, *tasks(place, "arc_easy"))]) == 0
    assert "arc_easy: 8 prompts longer than the context lost the beginning" in capsys.readouterr().out


@needs("lm_eval")
def test_lm_eval_runs_on_the_same_models(place, evaluate, tmp_path):
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(place / "data/piqa_validation.jsonl")}}}
    yaml = {
        "task": "mine", "output_type": "multiple_choice", "validation_split": "validation", "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_choice": "{{[sol1, sol2]}}", "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps(yaml | data))
    theirs = evaluate(place / "run", "--tasks", "mine", "--include", tmp_path)["results"]
    own = evaluate(place / "run", *tasks(place, "piqa"))["results"]
    assert [one["value"] for one in theirs] == [one["value"] for one in own if one["metric"] == "acc"]
    assert [one["model"] for one in theirs] == ["16-bit", "base", "base + adapter"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--tasks", "piqa", "--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--tasks", ""], "no task is named; known: arc_easy"),
        (["--tasks", "piqa,piqa"], "a task is named twice"),
        (["--tasks", "lambada,lambada_openai"], "a task is named twice"),
        (["--tasks", "piqa", "--task-data", "boolq=x"], "--task-data names boolq, which is not among the tasks piqa"),
        (["--tasks", "piqa", "--task-data", "piqa=nowhere"], "piqa: there is no file or folder nowhere"),
        (["--tasks", "svamp", "--chat", "--shots", "2"], "--chat asks without examples"),
        (["--tasks", "piqa", "--shots", "-1"], "--shots is -1; allowed: 0 to 100"),
        (["other"], "2 models are named; to set them beside each other: cloq eval --compare"),
        (["--compare"], "--compare needs two models or more"),
        (["--compare", "--adapter", "x"], "--adapter and --compare do not go together"),
        (["--seq-len", "0"], "--seq-len is 0; it must be at least 2"),
        (["--seq-len", "1"], "--seq-len is 1; it must be at least 2"),
        (["--seq-len", "-5"], "--seq-len is -5; it must be at least 2"),
        (["--samples", "-3"], "--samples is -3; it must be at least 1, or left out for all"),
        (["--samples", "0"], "--samples is 0; it must be at least 1"),
        (["--tasks", "piqa", "--seed", "-1"], "--seed is -1; allowed: 0 to 4294967295"),
        (["--seed", "99999999999999999999"], "--seed is 99999999999999999999; allowed: 0 to 4294967295"),
    ],
)
def test_bad_input_is_one_line_and_loads_no_model(argv, said, place, capsys, monkeypatch):
    monkeypatch.setattr("cloq.tasks.model.opened", lambda *_: pytest.fail("a model was loaded"))
    assert main(["eval", str(place / "run"), *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def refused(capsys, *argv) -> str:
    """The message of a command that ends before any model is run."""
    capsys.readouterr()
    assert main(["eval", *map(str, argv), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.fixture
def none_runs(monkeypatch):
    for name in ("cloq.use.evaluate.perplexity", "cloq.tasks.model.opened"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("a model was run"))


@pytest.fixture
def foreign(place, tmp_path):
    """The adapter of another run, of the same shapes."""
    base = shutil.copytree(place / "run/model", tmp_path / "other/model")
    adapter = shutil.copytree(place / "run/adapter", tmp_path / "other/foreign")
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"] + 1}))
    edit_json(adapter / "adapter_config.json", lambda config: config.update(base_model_name_or_path=str(base)))
    return adapter


def short_text(place) -> list:
    return ["--text", place / "text.txt", "--seq-len", 32, "--samples", 4]


def test_an_adapter_of_another_base_is_refused(place, foreign, capsys, none_runs):
    for asked in (short_text(place), tasks(place, "piqa")):
        said = refused(capsys, place / "run", "--adapter", place / "trained", "--adapter", foreign, *asked)
        assert f"says that it belongs to {foreign.parent / 'model'}, not to {place / 'run/model'}; to evaluate it on the base" in said
    edit_json(foreign / "adapter_config.json", lambda config: config.update(r=8, lora_alpha=8))
    for asked in (short_text(place), tasks(place, "piqa"), [*tasks(place, "piqa"), "--packed"]):
        assert "do not belong together" in refused(capsys, place / "run/model", "--adapter", foreign, *asked)


def test_whose_an_adapter_is_is_for_the_user_to_say_where_the_base_is_named(place, foreign, evaluate):
    assert evaluate(place / "run/model", "--adapter", foreign, *short_text(place))[0]["model"] == "model + foreign"
    moved = shutil.copytree(place / "run", foreign.parent / "moved")
    shutil.copytree(place / "trained", moved / "trained")
    assert len(evaluate(moved, "--adapter", moved / "trained", *short_text(place))) == 4


def test_every_model_is_looked_at_before_the_first_is_run(place, capsys, none_runs, tmp_path):
    assert "nope holds no readable adapter" in refused(
        capsys, place / "run", "--adapter", place / "trained", "--adapter", "nope", *short_text(place)
    )
    assert "no chat template" in refused(capsys, place / "run", *tasks(place, "svamp"), "--chat")
    damaged = shutil.copytree(place / "run/model", tmp_path / "damaged")
    edit_tensors(damaged / "model.safetensors", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.qweight"))
    for flag in ("--packed", "--decoded"):
        assert "up_proj" in refused(capsys, "--compare", place / "run", damaged, *tasks(place, "piqa"), flag)
    tiny = wide_model(tmp_path / "tiny", max_position_embeddings=48)
    said = refused(capsys, "--compare", place / "run", tiny, "--text", place / "text.txt", "--seq-len", 64)
    assert "--seq-len is 64, but tiny takes at most 48 tokens; use --seq-len 48" in said
    said = refused(capsys, "--compare", place / "run", tiny, *tasks(place, "svamp"))
    assert "256 new tokens do not fit a context of 48; lower --max-new-tokens" in said


def test_without_a_length_it_is_that_of_the_smallest_context(place, evaluate, tmp_path):
    tiny = wide_model(tmp_path / "tiny", max_position_embeddings=48)
    found = evaluate("--compare", place / "run", tiny, "--text", place / "text.txt", "--samples", 2)
    assert {one["protocol"] for one in found["results"]} == {"chunks-48"}


def test_adapters_of_one_name_can_be_told_apart(place, evaluate, capsys):
    twice = ["--adapter", place / "trained", "--adapter", place / "run/../trained"]
    assert "two models would be called 'base + trained'; name them: NAME=PATH" in refused(capsys, place / "run", *twice)
    named = ["--adapter", f"x={place / 'trained'}", "--adapter", place / "trained"]
    models = [one["model"] for one in evaluate(place / "run", *named, "--no-dense", *short_text(place))]
    assert models == ["base", "base + adapter", "x", "base + trained"]
    assert evaluate(place / "run/model", named[0], named[1], *short_text(place))[0]["model"] == "x"


def test_code_that_comes_with_a_model_is_run_where_it_is_trusted(place, capsys, tmp_path):
    own = wide_model(tmp_path / "own", num_hidden_layers=1)
    (own / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n"
        "class MyLlamaConfig(LlamaConfig):\n    model_type = 'mine'\n\n"
        "class MyLlamaForCausalLM(LlamaForCausalLM):\n    config_class = MyLlamaConfig\n"
    )
    auto = {"AutoConfig": "mine.MyLlamaConfig", "AutoModelForCausalLM": "mine.MyLlamaForCausalLM"}
    edit_json(own / "config.json", lambda config: config.update(auto_map=auto, model_type="mine"))
    for asked in (short_text(place), tasks(place, "piqa")):
        assert "if you trust it, pass --trust-remote-code" in refused(capsys, own, *asked)
        assert main(["eval", str(own), *map(str, asked), "--device", "cpu", "--trust-remote-code"]) == 0


def test_stored_rows_keep_chance_and_how_many_there_were(place, capsys, tmp_path):
    argv = ["eval", "--compare", place / "model", place / "run", *tasks(place, "arc_easy"), "--limit", 3, "--rows", tmp_path / "rows.jsonl"]
    assert main([str(a) for a in argv]) == 0
    now = capsys.readouterr().out
    assert main(["eval", "--compare", str(tmp_path / "rows.jsonl")]) == 0
    later = capsys.readouterr().out
    lines = [line.split() for line in later.splitlines() if "arc_easy" in line]
    assert lines[0][2:6] == ["3", "of", "8", "25.0"]
    assert lines == [line.split() for line in now.splitlines() if "arc_easy" in line]


def test_a_training_file_that_is_named_is_evaluated_and_said(place, capsys, tmp_path):
    data = shutil.copy(place / "data/piqa_validation.jsonl", tmp_path / "piqa_train.jsonl")
    assert main(["eval", str(place / "model"), "--tasks", "piqa", "--task-data", f"piqa={data}"]) == 0
    assert "note: piqa: piqa_train.jsonl is a training file by its name" in capsys.readouterr().err


def test_messages_name_options_of_this_command(place, capsys, none_runs, tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "odd.jsonl").write_text('{"id": "a", "line": "It was a bright cold day in April."}\n' * 20)
    assert "empty.jsonl holds no text; give other text to --text" in refused(capsys, place / "run", "--text", tmp_path / "empty.jsonl")
    said = refused(capsys, place / "run", "--text", tmp_path / "odd.jsonl")
    assert "Name the column with --text-column; there are: id (text), line (text)" in said
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no network")))
    said = refused(capsys, place / "run")
    assert "Without the hub: --text demo (always there), or a local file such as --text text.txt" in said


def test_a_column_of_text_can_be_named(place, evaluate, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"id": "a", "line": "It was a bright cold day in April."}\n' * 20)
    assert evaluate(place / "model", "--text", tmp_path / "odd.jsonl", "--text-column", "line", "--seq-len", 32)[0]["tokens"] > 100


def test_where_results_cannot_go_nothing_is_evaluated(place, capsys, none_runs, tmp_path):
    (tmp_path / "file").write_text("a file\n")
    said = refused(capsys, place / "run", *short_text(place), "--rows", tmp_path / "file/rows.jsonl")
    assert "cannot write to" in said and "name another file with --rows" in said and "--out" not in said
    (tmp_path / "mine.jsonl").write_text('{"text": "mine"}\n')
    assert "is no row of an evaluation" in refused(capsys, place / "run", *short_text(place), "--rows", tmp_path / "mine.jsonl")
    broken = shutil.copytree(place / "run", tmp_path / "broken")
    (broken / "report.json").write_text("{")
    assert "report.json is damaged" in refused(capsys, broken, *short_text(place))


def test_an_interrupted_evaluation_does_not_say_that_it_continues(place, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cloq.use.evaluate.perplexity", interrupted)
    assert main(["eval", str(place / "run"), *map(str, short_text(place)), "--json"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing is kept of it, the same command starts over\n"


def test_names_that_are_nothing_are_refused(place, capsys, tmp_path):
    moved = shutil.copytree(place / "trained", tmp_path / "moved")
    edit_json(moved / "adapter_config.json", lambda config: config.update(base_model_name_or_path=str(tmp_path / "gone")))
    for argv, said in (
        (["no-such-run"], "no-such-run is no folder of a run, an adapter or a model, no stored rows, and no hub id"),
        (["--compare", str(place / "run"), f"a={place / 'model'}", f"a={place / 'trained'}"], "two models would be called 'a'"),
        (["--compare", str(place / "text.jsonl"), str(place / "run")], "text.jsonl"),
        ([str(moved)], f"names its base as {tmp_path / 'gone'}, which is not there; name its base, or the run, as the model: cloq eval"),
    ):
        assert main(["eval", *argv]) == 2
        assert said in capsys.readouterr().err
