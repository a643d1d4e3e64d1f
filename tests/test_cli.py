"""The command line: what it accepts, what it prints for people and for scripts, and one clear line for bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cloq.cli import main
from cloq.cli.settings import HELP
from cloq.specs import FLAT
from tests.tiny import save_tiny

TINY = ["--bits", "2", "--group-size", "32", "--rank", "4", "--calib-samples", "4", "--seq-len", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("A tokenizer of bytes makes much of few words. " * 40)
    return path


@pytest.fixture(scope="module")
def finished(model, text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert main(["quantize", str(model), "--calib", str(text), "--out", str(out), "--quiet", *TINY]) == 0
    return out


def refused(capsys, *argv: str) -> str:
    """The message of a command that must end with code 2, in at most two lines and without a traceback."""
    assert main([str(a) for a in argv]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("command", ("check", "eval", "generate", "merge", "train"))
def test_a_name_that_no_file_can_have(command, capsys):
    further = {"generate": ("--prompt", "Why"), "merge": ("--to", "there"), "train": ("--data", "rows.jsonl")}.get(command, ())
    assert "is a longer name than the file system takes" in refused(capsys, command, 5000 * "x", *further)


def test_every_flat_setting_is_a_flag_or_an_argument():
    assert set(FLAT) - set(HELP) == {"model", "rules", "quantized"}


def test_help_and_version_load_nothing_heavy():
    code = "import sys; from cloq.cli import main; main(['--help']); print({'torch', 'transformers'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith("set()")
    assert all(command in said for command in ("quantize", "init", "plan", "export", "check", "eval", "demo"))


def test_python_m_cloq_is_the_command_line():
    said = subprocess.run([sys.executable, "-m", "cloq", "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("cloq ")


def test_a_run_prints_its_summary(model, text, tmp_path, capsys):
    assert main(["quantize", str(model), "--calib", str(text), "--out", str(tmp_path / "out"), *TINY]) == 0
    said = capsys.readouterr().out
    assert "mean layer error" in said and "report.html" in said


def test_json_lines_tell_every_layer_and_the_end(model, text, tmp_path, capsys):
    assert main(["quantize", str(model), "--calib", str(text), "--out", str(tmp_path / "out"), "--json", *TINY]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events[0] == {"event": "start", "blocks": 2, "finished": 0, "layers": 14}
    layers = [e for e in events if e["event"] == "layer"]
    assert len(layers) == 14 and all(e["error_corrected"] <= e["error_quantized"] * (1 + 1e-6) for e in layers)
    assert events[-1]["event"] == "done" and events[-1]["adapter"].endswith("adapter")


def test_quiet_prints_nothing(finished, model, text, capsys):
    assert main(["quantize", str(model), "--calib", str(text), "--out", str(finished), "--quiet", *TINY]) == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_run_file_is_a_whole_command_and_flags_win_over_it(finished, tmp_path):
    assert main(["quantize", "--config", str(finished / "run.yaml"), "--out", str(tmp_path / "same"), "--quiet"]) == 0
    assert main(["quantize", "--config", str(finished / "run.yaml"), "--bits", "4", "--out", str(tmp_path / "four"), "--quiet"]) == 0
    widths = [json.loads((tmp_path / f / "model/config.json").read_text())["quantization_config"]["bits"] for f in ("same", "four")]
    assert widths == [2, 4]


def test_check_passes_on_a_finished_run_and_fails_on_a_broken_one(finished, tmp_path, capsys):
    assert main(["check", str(finished)]) == 0
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(finished, broken)
    config = broken / "adapter/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 0.25', '"lora_alpha": 8'))
    capsys.readouterr()
    assert main(["check", str(broken)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_eval_prints_a_table_or_json(finished, text, capsys):
    assert main(["eval", str(finished), "--text", str(text), "--seq-len", "32", "--samples", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["model"] for r in rows] == ["16-bit", "base", "base + adapter"] and {r["protocol"] for r in rows} == {"chunks-32"}
    assert main(["eval", str(finished), "--text", str(text), "--seq-len", "32", "--samples", "4", "--no-dense"]) == 0
    assert "chunks-32" in capsys.readouterr().out


def test_export_writes_beside_the_model(finished, capsys):
    assert main(["export", str(finished), "--format", "container"]) == 0
    assert (finished / "model-container/config.json").exists() and "model-container" in capsys.readouterr().out


def test_export_writes_an_adapter_of_one_rank(finished, tmp_path, capsys):
    assert main(["export", str(finished), "--one-rank", "--to", str(tmp_path / "padded")]) == 0
    assert (tmp_path / "padded/adapter_config.json").exists() and "padded" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_refused_with_an_option_of_the_command(finished, text, capsys):
    for what in (["--format", "container"], ["--one-rank"]):
        said = refused(capsys, "export", finished, *what, "--to", text / "there")
        assert "cannot write to" in said and "choose another --to" in said and "--out" not in said


def test_plan_says_what_will_happen_without_doing_it(model, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(model), "--calib", str(text), *TINY]) == 0
    said = capsys.readouterr().out
    assert "memory" in said and "bits per weight" in said
    assert list(tmp_path.iterdir()) == []


def test_init_fits_factors_to_a_given_base(finished, model, text, tmp_path):
    argv = ["init", "--dense", model, "--quantized", finished / "model", "--calib", text, "--out", tmp_path / "out", "--quiet", *TINY[4:]]
    assert main([str(a) for a in argv]) == 0
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists() and not (tmp_path / "out/model").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["quantize", "--bits", "5"], "bits is 5; allowed: 2, 3, 4, 8"),
        (["quantize", "--group-size", "48"], "group_size is 48; allowed: 32, 64, 128, channel"),
        (["quantize", "--group-size", "many"], "--group-size is 'many'"),
        (["quantize", "--rank", "0"], "rank is 0"),
        (["quantize", "--init", "magic"], "init is 'magic'; allowed: cloq"),
        (["quantize", "--quantizer", "nf4", "--bits", "2"], "nf4 is a 4-bit codebook"),
        (["quantize", "--quantizer", "nf4", "--bits", "4", "--symmetric"], "symmetric is True, which quantizer 'nf4' does not have"),
        (["quantize", "--quantizer", "rtn", "--act-order"], "act_order is True, which quantizer 'rtn' does not have"),
        (["quantize", "--init", "eora", "--split", "paper"], "split is paper, which init 'eora' does not have"),
        (["quantize", "./no/such/folder"], "is not a folder"),
        (["quantize", "--config", "no.yaml"], "no.yaml"),
        (["quantize", "--no-such-flag"], "no-such-flag"),
        (["init", "--dense", "a", "--quantized", "b", "--bits", "4"], "--bits says how to quantize, but the base is given"),
        (["init", "--dense", "a", "--quantized", "b", "--no-search"], "--no-search says how to quantize, but the base is given"),
        (["init", "--dense", "a", "--quantized", "b", "--rounds", "2"], "--rounds says how to quantize, but the base is given"),
        (["init", "--dense", "a", "--quantized", "b", "--init", "loftq"], "cannot be fitted to a given base"),
        (["check", "no-such-run"], "no-such-run"),
        (["eval", "no-such-run"], "no-such-run"),
        (["export", "no-such-run", "--format", "dense"], "no-such-run"),
        (["export", "no-such-run", "--one-rank"], "no-such-run"),
        (["export", "no-such-run"], "name what to write: --format gptq"),
        (["export", "no-such-run", "--one-rank", "--format", "dense"], "name what to write"),
        (["export", "no-such-run", "--format", "dense", "--adapter", "a"], "--adapter is of --one-rank"),
        (["nonesuch"], "nonesuch"),
    ],
)
def test_bad_input_is_one_clear_line_and_code_2(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_a_run_file_with_a_given_base_takes_no_flag_that_would_be_ignored(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("settings:\n  quantized: base\n")
    said = refused(capsys, "quantize", "--config", tmp_path / "run.yaml", "--damping", "0.1", "--out", tmp_path / "out")
    assert "--damping says how to quantize, but the base is given" in said


def test_a_run_file_with_an_unknown_key_names_it(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("settings:\n  quant:\n    bitz: 2\n")
    assert "'bitz'" in refused(capsys, "quantize", "--config", tmp_path / "run.yaml", "--out", tmp_path / "out")


def test_a_foreign_folder_is_refused(model, text, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    said = refused(capsys, "quantize", model, "--calib", text, "--out", tmp_path, *TINY)
    assert "holds something else (mine.txt)" in said and (tmp_path / "mine.txt").read_text() == "keep"


def test_interruption_keeps_finished_blocks_and_says_how_to_continue(model, text, tmp_path, capsys, monkeypatch):
    from cloq.streaming import pipeline

    solve, calls = pipeline.solve_layer, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) > 10:
            raise KeyboardInterrupt
        return solve(*args, **kwargs)

    monkeypatch.setattr(pipeline, "solve_layer", interrupted)
    argv = ["quantize", str(model), "--calib", str(text), "--out", str(tmp_path / "out"), "--quiet", *TINY]
    assert main(argv) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out/.cloq/blocks").iterdir()] == ["00000.safetensors"]
    monkeypatch.setattr(pipeline, "solve_layer", solve)
    assert main(argv) == 0
