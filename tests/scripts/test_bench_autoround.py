"""The whole command with a stand-in for AutoRound in the other environment, which has to be given cloq's tokens and is asked once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bench_autoround
import pytest
import torch
from safetensors.torch import load_file

import cloq
from tests.tasks.data import wide_model

TEXT = "The quick brown fox jumps over the lazy dog while it rains in the old town. " * 40

STAND_IN = """
import json, pathlib, shutil, torch
PREPARED = pathlib.Path({prepared!r})

class AutoRound:
    def __init__(self, model, tokenizer, *, scheme, dataset, iters, **more):
        tokens = torch.cat(list(dataset))
        self.asked = {{"scheme": scheme, "iters": iters, "tokens": tokens.tolist(), "nsamples": more["nsamples"], "seqlen": more["seqlen"]}}

    def quantize_and_save(self, folder, format):
        assert format == "auto_gptq"
        shutil.copytree(PREPARED, pathlib.Path(folder) / "model-w2g32")
        with (PREPARED.parent / "asked.jsonl").open("a") as file:
            file.write(json.dumps(self.asked) + chr(10))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("autoround")
    wide_model(root / "model", num_hidden_layers=1)
    (root / "text.txt").write_text(TEXT)
    settings = {"bits": 2, "group_size": 32, "rank": 4, "calib_samples": 4, "seq_len": 32, "device": "cpu"}
    cloq.quantize(str(root / "model"), out=root / "run", calib=str(root / "text.txt"), init="zero", propagate="quantized", **settings)
    (root / "other" / "auto_round").mkdir(parents=True)
    (root / "other" / "auto_round" / "__init__.py").write_text(STAND_IN.format(prepared=str(root / "run" / "model")))
    return root


def test_codes_of_another_environment_are_fitted_and_trained(place, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(place / "other"))
    text, out = str(place / "text.txt"), place / "out"
    sizes = ["--steps", "2", "--batch", "1", "--seq-len", "32", "--eval-len", "32", "--calib-samples", "4", "--calib-len", "32"]
    more = ["--valid-samples", "1", "--test-samples", "2", "--rank", "4", "--group-size", "32", "--iters", "3", "--lrs", "1e-3"]
    argv = [str(place / "model"), "--train", text, "--valid", text, "--test", text, *sizes, *more, "--python", sys.executable]

    bench_autoround.main([*argv, "--compare", str(place / "run"), "--out", str(out)])

    asked = [json.loads(line) for line in (place / "run" / "asked.jsonl").read_text().splitlines()]
    tokens = load_file(out / "autoround-2-3" / "tokens.safetensors")["tokens"]
    assert len(asked) == 1 and asked[0]["iters"] == 3 and asked[0]["scheme"]["bits"] == 2
    assert torch.equal(torch.tensor(asked[0]["tokens"]), tokens) and tokens.shape == (4, 32)
    codes, factors, run = json.loads((out / "results.json").read_text())["rows"]
    assert codes["processor s"] > 0 and codes["peak MiB"] > 100
    assert codes["perplexity"] == pytest.approx(run["before"], rel=1e-4)  # the same codes: `zero` leaves the base alone
    assert factors["before"] != pytest.approx(run["before"], rel=1e-4) and factors["lr 0.001, seed 0"] > 0

    before = (out / "cells" / "2-autoround-3-lr0.001-seed0.json").read_bytes()
    bench_autoround.main([*argv, "--compare", str(place / "run"), "--out", str(out)])
    assert len((place / "run" / "asked.jsonl").read_text().splitlines()) == 1
    assert (out / "cells" / "2-autoround-3-lr0.001-seed0.json").read_bytes() == before
