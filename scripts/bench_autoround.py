"""Codes that AutoRound trains, with CLoQ's factors on them: right after initialization, and after the fine-tuning of bench_quality.py.

    python3 -m venv autoround && autoround/bin/pip install auto-round
    python scripts/bench_autoround.py MODEL --train train.txt --valid valid.txt --test test.txt --python autoround/bin/python --out out

AutoRound works in an environment of its own, `--python`, on the very token sequences that cloq draws, with its defaults but for `--iters`;
the factors are those of `cloq init` for its base, fitted to the same tokens. Settings and texts are bench_quality.py's, so that rows can be
set beside its table; `--compare RUN …` adds runs of the same model, such as `cloq quantize`'s. One seed and rate after the other; what is
there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from quality.cells import Cell, Kept
from quality.protocol import Protocol, add_arguments, read_protocol
from quality.rivals import Refused, autoround_codes

METHOD = "autoround"


def factors(protocol: Protocol, base: Path, out: Path) -> dict[str, float]:
    """`cloq init` for the base, in a process of its own; what it cost."""
    settings = {
        "--dense": protocol.model, "--quantized": base, "--calib": protocol.calibration_text, "--calib-samples": protocol.calib_samples,
        "--seq-len": protocol.calib_len, "--rank": protocol.rank, "--split": "paper", "--out": out,
    }  # fmt: skip
    flags = [str(word) for pair in settings.items() for word in pair]
    if not (out / "report.json").exists():
        subprocess.run([sys.executable, "-m", "cloq", "init", *flags, "--quiet"], check=True)
    report = json.loads((out / "report.json").read_text())
    return {"seconds": report["seconds"], "peak MiB": report["peak_memory"]["host"] / 2**20}


def trained(args: argparse.Namespace, protocol: Protocol, name: str, base: Path, adapter: Path, kept: Kept) -> dict[str, float]:
    """Test perplexity before training, and after it by seed and rate."""
    from quality.starts import Pair, trainable_model
    from quality.summary import perplexity
    from quality.training import losses, read_texts, train

    texts, found = read_texts(protocol), {}
    for seed in args.seeds:
        for lr in args.lrs:
            cell = Cell(args.bits, name, lr, seed)
            result = kept.get(cell.name, protocol)
            if result is None:
                model = trainable_model(protocol, Pair(base, adapter))
                result = {"before": losses(model, texts)} | train(protocol, cell, model, texts)
                kept.put(cell.name, protocol, result)
            found["before"] = perplexity(result["before"]["test"])
            found[f"lr {lr:g}, seed {seed}"] = perplexity(result["after"]["test"])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    from cloq.export.peft import AdapterFolder
    from cloq.export.read import QuantizedFolder
    from cloq.models import load_tokenizer, quiet_libraries
    from cloq.use.evaluate import evaluation_tokens, perplexity
    from cloq.use.pairing import base_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--python", required=True, help="of an environment with AutoRound")
    parser.add_argument("--iters", type=int, default=200, help="AutoRound's steps for each block; 200 is its default, 50 its light recipe")
    parser.add_argument("--rival-minutes", type=float, default=600, help="what AutoRound may take")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4])
    parser.add_argument("--compare", nargs="*", default=[], help="folders of runs to train alike")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args(argv)
    quiet_libraries()
    protocol, made = read_protocol(args), args.out / f"{METHOD}-{args.bits}-{args.iters}"
    try:
        autoround_codes(protocol, args.bits, args.iters, args.python, made, args.rival_minutes)
    except Refused as error:
        raise SystemExit(f"error: AutoRound: {error}") from error
    rows = [{"what": "AutoRound's codes", **json.loads((made / "cost.json").read_text())}]
    tokens = evaluation_tokens(
        Path(protocol.test).read_text("utf8"), load_tokenizer(Path(protocol.model)), protocol.eval_len, protocol.test_samples
    )
    rows[0]["perplexity"] = perplexity(QuantizedFolder(made / "model").decoder(), tokens).value
    rows.append({"what": "CLoQ's factors on them", **factors(protocol, made / "model", made / "factors")})
    kept = Kept(args.out / "cells")
    rows[1] |= trained(args, protocol, f"{METHOD}-{args.iters}", made / "model", made / "factors" / "adapter", kept)
    for run in map(Path, args.compare):
        base = base_folder(run, AdapterFolder(run / "adapter"))
        rows.append({"what": run.name, **trained(args, protocol, run.name, base, run / "adapter", kept)})
    for row in rows:
        print(json.dumps({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}))
    (args.out / "results.json").write_text(json.dumps({"settings": {**vars(args), "out": str(args.out)}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
