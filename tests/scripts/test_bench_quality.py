"""The whole command on a tiny model: what is kept is not made again, and what is trained is what the table says."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import bench_quality
import pytest
import quality.answers
import quality.training
from quality.cells import Cell

from tests.tasks.data import wide_model, write_rows

TEXT = "The quick brown fox jumps over the lazy dog while it rains in the old town. " * 40
SEEDS, RATES = (0, 1), (1e-3, 1e-4)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    wide_model(root / "model", num_hidden_layers=1)
    (root / "text.txt").write_text(TEXT)
    write_rows(root / "data", "piqa")
    return root


def run(place: Path, *words: str, out: str = "out") -> Path:
    text = str(place / "text.txt")
    sizes = ["--steps", "2", "--batch", "1", "--seq-len", "32", "--eval-len", "32", "--eval-every", "1", "--calib-samples", "4"]
    more = ["--calib-len", "32", "--valid-samples", "1", "--test-samples", "2", "--rank", "4", "--group-size", "32"]
    argv = [str(place / "model"), "--train", text, "--valid", text, "--test", text, *sizes, *more, "--out", str(place / out), *words]
    bench_quality.main(argv)
    return place / out


def kept(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for folder in ("cells", "before") for path in (out / folder).iterdir()}


def test_a_comparison(place, capsys, monkeypatch):
    calls = {"losses": 0, "tasks": 0}
    losses, answer_tasks = quality.training.losses, quality.answers.answer_tasks
    monkeypatch.setattr(quality.training, "losses", lambda *a: calls.update(losses=calls["losses"] + 1) or losses(*a))
    monkeypatch.setattr(quality.answers, "answer_tasks", lambda *a: calls.update(tasks=calls["tasks"] + 1) or answer_tasks(*a))
    words = [
        "--methods",
        "zero",
        "cloq",
        "--seeds",
        "0",
        "1",
        "--lrs",
        "1e-3",
        "1e-4",
        "--tasks",
        "piqa",
        "--task-data",
        str(place / "data"),
    ]

    out = run(place, *words)

    trained = 2 * len(SEEDS) * len(RATES)
    assert calls == {"losses": trained + 2, "tasks": trained + 2}  # before training once for each method, not for its seeds and rates
    cells = {name: json.loads((out / "cells" / f"{name}.json").read_text())["result"] for name in names(("zero", "cloq"))}
    assert len(list((out / "cells").iterdir())) == trained and [*cells["2-cloq-lr0.001-seed0"]["during"]] == ["1"]
    before = {name: (one["before"], one["tasks"]["before"]) for name, one in cells.items()}
    assert before["2-cloq-lr0.001-seed0"] == before["2-cloq-lr0.0001-seed1"] != before["2-zero-lr0.001-seed0"]
    assert len(cells["2-cloq-lr0.001-seed0"]["tasks"]["after"]["piqa"]["rows"]) == 6
    assert cells["2-cloq-lr0.001-seed0"]["losses"][0] != cells["2-cloq-lr0.001-seed1"]["losses"][0]  # other sequences
    assert cells["2-cloq-lr0.001-seed0"]["losses"][0] == cells["2-cloq-lr0.0001-seed0"]["losses"][0]  # the same ones

    first, table = kept(out), (out / "table.md").read_text()
    assert run(place, *words) == out and kept(out) == first and (out / "table.md").read_text() == table
    assert calls == {"losses": trained + 2, "tasks": trained + 2} and table in capsys.readouterr().out
    with pytest.raises(SystemExit, match="tasks"):
        run(place, "--methods", "zero")


def names(methods: tuple[str, ...]) -> list[str]:
    return [Cell(2, method, lr, seed).name for method in methods for lr in RATES for seed in SEEDS]


def test_the_rate_may_be_chosen_on_some_of_the_seeds(place):
    words = ["--methods", "zero", "cloq", "--seeds", "0", "1", "2", "--lrs", "1e-3", "1e-4", "--rate-seeds", "1"]
    out = run(place, *words, out="rates")
    cells = {path.stem for path in (out / "cells").iterdir()}
    rows = {row["method"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    tried = {Cell(2, method, lr, 1).name for method in rows for lr in RATES}
    assert cells == tried | {Cell(2, method, row["lr"], seed).name for method, row in rows.items() for seed in (0, 1, 2)}
    assert all(row["after"].keys() == {"0", "1", "2"} for row in rows.values())
    with pytest.raises(SystemExit, match="--rate-seeds are some of the --seeds"):
        run(place, "--methods", "zero", "--seeds", "0", "--rate-seeds", "1", out="rates")


def test_one_model_is_in_memory_at_a_time(place, monkeypatch):
    from peft import PeftModel

    there, train = [], quality.training.train
    monkeypatch.setattr(quality.training, "train", lambda *a: there.append(models()) or train(*a))

    def models() -> int:
        return sum(isinstance(one, PeftModel) for one in gc.get_objects())

    gc.collect()
    before = models()
    gc.disable()
    try:
        run(place, "--methods", "zero", "--seeds", "0", "1", "2", out="memory")
    finally:
        gc.enable()
    assert there == [before + 1] * 3


def test_what_several_commands_left_is_put_into_one_table_without_training(place, monkeypatch):
    run(place, "--methods", "zero", "--seeds", "0", "--lrs", "1e-3", out="several")
    out = run(place, "--methods", "cloq", "--seeds", "0", "1", "--lrs", "1e-4", out="several")
    both, before = ["--methods", "zero", "cloq", "--seeds", "0", "1", "--kept"], kept(out)
    monkeypatch.setattr(quality.training, "train", None)
    run(place, *both, "--lrs", "1e-3", "1e-4", out="several")
    rows = {row["method"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert {name: (row["lr"], [*row["after"]]) for name, row in rows.items()} == {"zero": (1e-3, ["0"]), "cloq": (1e-4, ["0", "1"])}
    assert kept(out) == before
    with pytest.raises(SystemExit, match="has no result"):
        run(place, *both, "--lrs", "1e-2", out="several")


def test_seeds_may_draw_the_calibration_text_too(place):
    words = ["--methods", "lora-16", "zero", "cloq", "--seeds", "0", "1"]
    shared, own = run(place, *words, out="shared"), run(place, *words, "--redraw", out="own")
    runs = {path.name for path in (shared / "runs").iterdir()}
    assert {path.name for path in (own / "runs").iterdir()} == runs | {f"{name}-calib-seed-1" for name in runs}
    results = {(out.name, path.stem): json.loads(path.read_text())["result"] for out in (shared, own) for path in (out / "cells").iterdir()}
    for cell in (Cell(16, "lora-16", 3e-4, 1), Cell(2, "cloq", 3e-4, 0), Cell(2, "zero", 3e-4, 0)):
        assert results["own", cell.name]["losses"] == results["shared", cell.name]["losses"]  # the draw that all have in common
    for method in ("zero", "cloq"):
        cell = Cell(2, method, 3e-4, 1)
        assert results["own", cell.name]["before"] != results["shared", cell.name]["before"]
    assert {row["method"]: len(row["after"]) for row in json.loads((own / "results.json").read_text())["rows"]} == {
        "lora-16": 2, "zero": 2, "cloq": 2,
    }  # fmt: skip
    with pytest.raises(SystemExit, match="calib_seed"):
        run(place, *words, out="own")


def test_training_in_bfloat16_is_training_in_float32_but_for_rounding_and_another_cell(place):
    same = ["--methods", "cloq", "--seeds", "0"]
    found = {name: run(place, *same, "--precision", name, out=name) / "cells" / "2-cloq-lr0.0003-seed0.json" for name in ("fp32", "bf16")}
    results = {name: json.loads(path.read_text())["result"] for name, path in found.items()}
    assert results["fp32"]["before"] == results["bf16"]["before"] and results["fp32"]["losses"] != results["bf16"]["losses"]
    assert results["bf16"]["after"]["test"] == pytest.approx(results["fp32"]["after"]["test"], rel=0.01)
    with pytest.raises(SystemExit, match="precision None instead of 'bf16'"):
        run(place, *same, "--precision", "bf16", out="fp32")


def test_an_exact_base_starts_where_the_16_bit_model_does(place):
    """And trains from the factors of the run, not as LoRA does; its results do not mix with those of the quantized base."""
    words = ["--methods", "lora-16", "cloq", "--seeds", "0", "--exact-base"]
    found = {path.stem: json.loads(path.read_text())["result"] for path in (run(place, *words, out="exact") / "cells").iterdir()}
    lora, cloq = found["16-lora-16-lr0.0003-seed0"], found["2-cloq-lr0.0003-seed0"]
    assert cloq["before"]["test"] == pytest.approx(lora["before"]["test"], abs=1e-4)
    assert cloq["after"]["test"] != lora["after"]["test"]
    with pytest.raises(SystemExit, match="exact_base"):
        run(place, *words[:-1], out="exact")


def test_sweeps(place):
    out = run(
        place, "--methods", "cloq", "lora-16", "--seeds", "0", "--sweep", "rank", "2", "4", "--sweep", "group-size", "32", "0", out="swept"
    )
    assert {path.stem.replace("-lr0.0003-seed0", "") for path in (out / "cells").iterdir()} == {
        "2-cloq", "16-lora-16", "2-cloq-rank-2", "16-lora-16-rank-2", "2-cloq-group-size-0",
    }  # fmt: skip
    assert {path.name for path in (out / "runs").iterdir()} == {
        "2-gptq", "2-gptq-cloq-paper", "2-gptq-cloq-paper-rank-2", "2-gptq-group-size-0", "2-gptq-cloq-paper-group-size-0",
    }  # fmt: skip
    factors = {path.stem: json.loads(path.read_text())["result"]["factors"] for path in (out / "cells").iterdir()}
    assert factors["2-cloq-lr0.0003-seed0"] == 2 * factors["2-cloq-lr0.0003-seed0-rank-2"]
    assert "| channel | 2 | cloq |" in (out / "sweep-group-size.md").read_text()
    assert (out / "sweep-rank.png").stat().st_size > 10_000 and (out / "curves.png").stat().st_size > 10_000


def test_another_library_that_refuses_leaves_a_word_and_the_others_go_on(place, capsys):
    """GPTQModel has no time at all here."""
    out = run(place, "--methods", "gptqmodel-eora", "zero", "--seeds", "0", "1", "--rival-minutes", "0.001", out="refused")
    table = (out / "table.md").read_text()
    assert "2-gptqmodel-eora has no row: not done within 0.001 minutes" in table and "| 2 | zero |" in table
    assert capsys.readouterr().out.count("2-gptqmodel-eora: not done") == 1  # asked once, not for every seed
    assert json.loads((out / "results.json").read_text())["refused"].keys() == {"2-gptqmodel-eora"}
