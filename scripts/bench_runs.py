"""Whole runs with different settings, right after initialization: perplexity against what the run costs.

    python scripts/bench_runs.py MODEL --calib train.txt --eval test.txt --variant "rounds=0 correction=0" --variant "" --out runs

Each variant is a set of settings as in the Python API (`rounds=8 correction=0.25`) on top of cloq's defaults, and is run for every seed in
a process of its own, as `cloq quantize` runs it; base and adapter are then read from the written files. What is there already is not made
again. Prints a table (means over the seeds, and the largest distance from them) and writes runs.json, runs.md and runs.png: perplexity
against processor seconds, which other work on the machine moves less than wall seconds; a line joins what no other variant beats in both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

from bench_layers import settings

MEASURED = ("perplexity", "base alone", "layer error", "held out", "processor s", "wall s", "peak MiB")


def make(args: argparse.Namespace, variant: str, seed: int, out: Path) -> dict[str, float]:
    """One run in a child, and its measurements."""
    cost = out / "cost.json"
    if not cost.exists():
        began = time.perf_counter()
        command = [sys.executable, __file__, *sys.argv[1:], "--child", variant, "--child-seed", str(seed), "--child-out", str(out / "run")]
        process = subprocess.Popen(command, stdout=sys.stderr)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{variant or 'the defaults'}, seed {seed}: failed with status {status}")
        found = {"processor s": usage.ru_utime + usage.ru_stime, "wall s": time.perf_counter() - began}
        peak = json.loads((out / "run/report.json").read_text())["peak_memory"]["host"]
        cost.write_text(json.dumps(found | {"peak MiB": peak / 2**20}))
    return json.loads(cost.read_text()) | quality(args, out / "run")


def quality(args: argparse.Namespace, out: Path) -> dict[str, float]:
    from cloq.export.peft import AdapterFolder
    from cloq.export.read import QuantizedFolder
    from cloq.models import load_tokenizer
    from cloq.streaming.store import Store
    from cloq.use.evaluate import evaluation_tokens, perplexity

    kept = out.parent / "quality.json"
    if kept.exists():
        return json.loads(kept.read_text())
    tokens = evaluation_tokens(Path(args.eval).read_text("utf8"), load_tokenizer(Path(args.model)), args.eval_seq_len, args.eval_samples)
    decoder = QuantizedFolder(out / "model").decoder("cpu")
    layers = [layer.metrics for layer in Store(out).summaries().values()]
    found = {
        "perplexity": perplexity(decoder, tokens, set_weights=AdapterFolder(out / "adapter").added_to(decoder)).value,
        "base alone": perplexity(decoder, tokens).value,
        "layer error": mean(layer.error_corrected for layer in layers),
        "held out": mean(layer.heldout_corrected for layer in layers),
    }
    kept.write_text(json.dumps(found))
    return found


def run(args: argparse.Namespace, variant: str, seed: int, out: Path) -> None:
    import cloq

    shared = {"calib": args.calib, "calib_samples": args.samples, "seq_len": args.seq_len, "seed": seed, "bits": args.bits}
    cloq.quantize(args.model, out=out, **(shared | settings(variant)))


def table(rows: list[dict], args: argparse.Namespace) -> str:
    head = (
        f"`{Path(args.model).name}`, {args.bits} bits, {args.samples} x {args.seq_len} calibration tokens, {len(args.seeds)} seed(s); "
        f"perplexity chunks-{args.eval_seq_len}, {args.eval_samples} sequences.\n\n"
    )
    lines = [f"| settings | {' | '.join(MEASURED)} |", f"|---|{'---:|' * len(MEASURED)}"]
    for row in rows:
        shown = []
        for name in MEASURED:
            values = [found[name] for found in row["seeds"].values()]
            off = max(abs(value - mean(values)) for value in values)
            digits = 4 if "error" in name or name == "held out" else 2 if name == "perplexity" else 0
            shown.append(f"{mean(values):,.{digits}f}" + (f" ± {off:,.{digits}f}" if len(values) > 1 and name == "perplexity" else ""))
        lines.append(f"| {row['variant'] or 'defaults'} | {' | '.join(shown)} |")
    return head + "\n".join(lines) + "\n"


def figure(rows: list[dict], args: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from cloq.report.drawing import plain_log

    drawn, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    points = {
        row["variant"]: [mean(found[name] for found in row["seeds"].values()) for name in ("processor s", "perplexity")] for row in rows
    }
    best = [at for at in sorted(points.values()) if at[1] == min(other[1] for other in points.values() if other[0] <= at[0])]
    axis.plot(*zip(*best, strict=True), color="tab:blue", alpha=0.3)  # what no other variant beats in both
    for variant, at in points.items():
        axis.plot(*at, "o", color="tab:blue")
        axis.annotate(variant or "defaults", at, xytext=(6, 5), textcoords="offset points", fontsize=8)
    axis.set(title=f"{Path(args.model).name}, {args.bits} bits", xlabel="processor seconds", ylabel="perplexity with adapter", xscale="log")
    axis.margins(x=0.2, y=0.1)
    plain_log(axis.xaxis)
    drawn.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--variant", action="append", required=True, help="settings, such as 'rounds=2 magr=true'; '' are the defaults")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=8)
    parser.add_argument("--eval-seq-len", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", required=True, help="folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--child-seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child-out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        return run(args, args.child, args.child_seed, Path(args.child_out))
    rows = [{"variant": variant, "seeds": {}} for variant in args.variant]
    for seed in args.seeds:
        for row in rows:
            name = f"{args.bits}-{row['variant'].replace(' ', ',') or 'defaults'}-seed{seed}"
            out = Path(args.out) / name
            out.mkdir(parents=True, exist_ok=True)
            row["seeds"][seed] = make(args, row["variant"], seed, out)
            print(name, {key: round(value, 4) for key, value in row["seeds"][seed].items()}, flush=True)
    (Path(args.out) / "runs.json").write_text(json.dumps({"settings": vars(args), "rows": rows}, indent=1))
    (Path(args.out) / "runs.md").write_text(table(rows, args))
    figure(rows, args, Path(args.out) / "runs.png")
    print(table(rows, args))


if __name__ == "__main__":
    main()
