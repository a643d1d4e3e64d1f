"""Cells of the quality benchmark: names that older results keep, points of sweeps, and what is refused."""

from __future__ import annotations

import json

import bench_quality
import pytest
from quality.cells import Cell, Kept, Start, applied, grid, starts
from quality.methods import METHODS
from quality.protocol import Protocol, Sweep, read_protocol

from cloq.specs import LoraSpec, RunSpec

LINE = ["m", "--train", "a.txt", "--valid", "b.txt", "--test", "c.txt", "--out", "o"]
PROTOCOL = Protocol("m", "a.txt", "b.txt", "c.txt")
EARLIER = {
    "model": "m", "train": "a.txt", "valid": "b.txt", "test": "c.txt", "calib": None, "steps": 60, "batch": 2, "seq_len": 256,
    "eval_len": 512, "eval_every": 20, "valid_samples": 4, "test_samples": 16, "dropout": 0.0, "weight_decay": 0.0, "rank": 64,
    "group_size": 64, "calib_samples": 32, "calib_len": 512,
}  # fmt: skip
"""What a cell's file said before there were tasks and sweeps."""


def protocol_of(*words: str) -> Protocol:
    return read_protocol(bench_quality.parse([*LINE, *words]))


def test_cells_of_the_first_version_are_taken_up(tmp_path):
    cell = Cell(2, "cloq", 3e-4, 0)
    assert cell.name == "2-cloq-lr0.0003-seed0" and protocol_of().record() == EARLIER
    content = {"cell": {"bits": 2, "method": "cloq", "lr": 3e-4, "seed": 0}, "protocol": EARLIER, "result": {"losses": [1.0]}}
    (tmp_path / f"{cell.name}.json").write_text(json.dumps(content))
    assert Kept(tmp_path).get(cell.name, protocol_of()) == {"losses": [1.0]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", "32"], r"\(rank 64 instead of 32\)"),
        (["--no-sequential"], r"\(sequential None instead of False\)"),
        (["--propagate", "dense"], r"\(propagate None instead of 'dense'\)"),
        (["--tasks", "piqa"], r"tasks None instead of \['piqa'\]"),
    ],
)
def test_cells_of_other_settings_are_refused_with_what_differs(tmp_path, words, said):
    kept = Kept(tmp_path)
    kept.put("name", protocol_of(), {})
    with pytest.raises(SystemExit, match=f"made with other settings {said}|made with other settings .*{said}"):
        kept.get("name", protocol_of(*words))


def test_what_is_kept_comes_back(tmp_path):
    kept, protocol = Kept(tmp_path), protocol_of("--tasks", "piqa,arc_easy", "--task-data", "data", "--sweep", "rank", "8", "16")
    assert kept.get("name", protocol) is None
    kept.put("name", protocol, {"during": {20: 1.5}})
    assert kept.get("name", protocol) == {"during": {"20": 1.5}} and [path.name for path in tmp_path.iterdir()] == ["name.json"]


def test_a_swept_value_that_is_the_protocol_s_own_is_the_plain_cell():
    sweep = Sweep.parse(["rank", "8", "64"])
    assert [Start(2, "cloq", sweep.changes(PROTOCOL, value)).name for value in sweep.values] == ["2-cloq-rank-8", "2-cloq"]
    own_text = Sweep.parse(["calib", "a.txt", "d/code.txt"])  # calibration is on the training text where nothing is said
    assert [own_text.changes(PROTOCOL, value) for value in own_text.values] == [(), (("calib", "d/code.txt"),)]
    assert Cell(2, "cloq", 3e-4, 1, (("calib", "d/code.txt"),)).name == "2-cloq-lr0.0003-seed1-calib-code"
    ways = Sweep.parse(["propagate", "adapter", "dense"])
    assert [ways.changes(PROTOCOL, value) for value in ways.values] == [(), (("propagate", "dense"),)]


def test_a_changed_cell_is_kept_with_the_changed_settings():
    changes = Sweep.parse(["group-size", "32", "0"]).changes(PROTOCOL, 0)
    assert PROTOCOL.changed(changes).record() == EARLIER | {"group_size": 0}
    assert Sweep.parse(["group-size", "32", "0"]).shown(0) == "channel" and Sweep.parse(["sequential", "no", "yes"]).values == (False, True)


def test_every_point_once_and_only_where_it_means_something():
    sweeps = [Sweep.parse(["rank", "8", "64"]), Sweep.parse(["calib-samples", "8", "32"])]
    names = [start.name for start in starts(PROTOCOL, [2], ["lora-16", "loftq", "cloq", "qlora-nf4", "peft-loftq"], sweeps)]
    assert names == [
        "16-lora-16", "2-loftq", "2-cloq", "16-lora-16-rank-8", "2-loftq-rank-8", "2-cloq-rank-8", "2-cloq-calib-samples-8",
    ]  # fmt: skip
    assert applied("zero", (("propagate", "dense"), ("rank", 8))) == (("rank", 8),)


@pytest.mark.parametrize("setting, values", [("rounds", (0, LoraSpec().rounds, 16)), ("fisher", (0.5, RunSpec("m").fisher, 0.0))])
def test_what_methods_leave_open_is_swept(setting, values):
    (one, _, other), sweep = values, Sweep.parse([setting, *map(str, values)])
    names = [start.name for start in starts(PROTOCOL, [2], ["lora-16", "loftq", "cloq", "cloq-paper", "cloq-best", "cloq-run"], [sweep])]
    assert names == [
        "16-lora-16",
        "2-loftq",
        "2-cloq",
        "2-cloq-paper",
        "2-cloq-best",
        "2-cloq-run",
        f"2-cloq-run-{setting}-{one}",
        f"2-cloq-run-{setting}-{other}",
    ]
    assert PROTOCOL.changed(sweep.changes(PROTOCOL, other)).record() == EARLIER | {setting: other} and PROTOCOL.record() == EARLIER


def test_seeds_are_outermost():
    cells = list(grid([Start(2, "zero"), Start(2, "cloq")], [1e-3, 1e-4], [0, 1]))
    assert [cell.seed for cell in cells] == [0] * 4 + [1] * 4 and len(set(cells)) == 8
    assert [cell.method for cell in cells[:2]] == ["zero", "cloq"]


def test_a_method_is_left_out_where_there_is_none():
    assert METHODS["lora-16"].widths([2, 3]) == [16] and METHODS["qlora-nf4"].widths([2, 3]) == []
    assert METHODS["peft-loftq"].widths([2, 4]) == [4] and METHODS["gptqmodel-eora"].widths([2, 4]) == [2, 4]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["height", "1", "2"], "allowed are rank, group-size, calib,"),
        (["rank", "8", "many"], "invalid literal"),
        (["rank", "8"], "at least two values"),
        (["calib", "one/text.txt", "other/text.txt"], "of different names"),
        (["propagate", "adapter", "both"], "'both'; allowed: adapter, quantized, dense"),
        (["sequential", "yes", "true"], "'true'; allowed: yes, no"),
    ],
)
def test_a_sweep_that_cannot_be(words, said):
    with pytest.raises(SystemExit, match=said):
        Sweep.parse(words)
