"""How a run's cost grows with blocks, tokens and width, and how well `cloq plan` knows it beforehand.

    python scripts/bench_scaling.py MODEL --calib train.txt --blocks 2 4 8 --tokens 4096 8192 16384 --widths 192 576 1152 --out scaling

Each point is one `cloq quantize` with the defaults, in a process of its own with one thread, of a model with MODEL's configuration and
tokenizer, random weights, and another number of blocks or another width (heads and the inside of the MLP grow with it). One axis moves at
a time, from the first of `--blocks`, of `--tokens` and the middle one of `--widths`. What is there already is not made again.

Measured: the processor seconds of the blocks (all but opening the model, drawing tokens and writing the result), and the process's peak
memory. Planned: `cloq plan`'s operations at rates that are measured in the same process, in processor seconds too, and its memory.
Prints a table and the exponent of each axis, the slope of the least-squares line through the logarithms, and writes
scaling.json, scaling.md and scaling.png.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

AXES = ("blocks", "tokens", "width")
SEQ_LEN = 512
OUTSIDE = ("load", "embed", "export", "around")
"""Phases of a plan that are not the blocks' own work."""


def make(args: argparse.Namespace, blocks: int, tokens: int, width: int) -> dict[str, float]:
    """One point, in a child unless it was made before."""
    out = Path(args.out) / f"blocks-{blocks}-tokens-{tokens}-width-{width}"
    kept = out / "found.json"
    if not kept.exists():
        save_model(args, blocks, width, out / "model")  # here: the child's peak is to be the run's
        point = ["--child", str(tokens), "--child-out", str(out)]
        if subprocess.run([sys.executable, __file__, *sys.argv[1:], *point], stdout=sys.stderr).returncode:
            raise SystemExit(f"{out.name} failed")
    return json.loads(kept.read_text())


def save_model(args: argparse.Namespace, blocks: int, width: int, folder: Path) -> None:
    """Random weights in 16 bits, in MODEL's architecture."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(args.model)
    share = width / config.hidden_size
    heads = {name: max(1, round(share * getattr(config, name))) for name in ("num_attention_heads", "num_key_value_heads")}
    config.update({"num_hidden_layers": blocks, "hidden_size": width, "intermediate_size": round(share * config.intermediate_size)} | heads)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)


def child(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    from cloq.api import open_decoder, run
    from cloq.plan import measure, plan
    from cloq.specs import run_spec

    tokens, out = args.child, Path(args.child_out)
    calibration = {"calib": args.calib, "calib_samples": tokens // SEQ_LEN, "seq_len": SEQ_LEN}
    spec = run_spec(model=str(out / "model"), bits=args.bits, device="cpu", **calibration)
    planned = plan(spec, open_decoder(spec), measure("cpu", time.process_time))
    work = sum(seconds for phase, seconds in planned.seconds.items() if phase not in OUTSIDE)
    used = dict.fromkeys(("start", "end"), 0.0)

    def clock(event: str, values: dict) -> None:
        used["start"] = time.process_time() if event == "start" else used["start"]
        used["end"] = time.process_time() if event == "block" else used["end"]

    result = run(spec, out / "run", restart=True, emit=clock)
    found = {
        "parameters": planned.parameters, "seconds": used["end"] - used["start"], "planned seconds": work,
        "peak MB": result.report.peak_memory["host"] / 1e6, "planned MB": sum(planned.memory.values()) / 1e6,
    }  # fmt: skip
    (out / "found.json").write_text(json.dumps(found))


def exponent(at: list[float], values: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = [math.log(value) for value in at], [math.log(value) for value in values]
    middle = sum(x) / len(x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def table(args: argparse.Namespace, rows: list[dict]) -> str:
    lines = ["| moved | blocks | tokens | width | processor s | planned | peak MB | planned |", "|---|" + "---:|" * 7]
    for row in rows:
        found = row["found"]
        measured = " | ".join(
            f"{found[name]:,.0f} | {found[f'planned {unit}']:,.0f} ({found[f'planned {unit}'] / found[name] - 1:+.0%})"
            for name, unit in (("seconds", "seconds"), ("peak MB", "MB"))
        )
        lines.append(f"| {row['axis']} | {row['blocks']} | {row['tokens']:,} | {row['width']} | {measured} |".replace("-", "−"))
    slopes = []
    for axis in AXES:
        mine = [row for row in rows if row["axis"] == axis]
        if len(mine) > 1:
            slopes.append(f"{axis} {exponent([r[axis] for r in mine], [r['found']['seconds'] for r in mine]):.2f}")
    return "\n".join(lines) + f"\n\nProcessor seconds grow with the power of: {', '.join(slopes)}\n"


def figure(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(1, len(AXES), figsize=(10, 3.4), layout="constrained", sharey=True)
    for name, panel in zip(AXES, axes, strict=True):
        mine = [row for row in rows if row["axis"] == name]
        for key, style, label in (("seconds", "o-", "measured"), ("planned seconds", "x--", "planned")):
            panel.loglog([row[name] for row in mine], [row["found"][key] for row in mine], style, label=label)
        panel.set_xticks([row[name] for row in mine], [f"{row[name]:,}" for row in mine], minor=False)
        panel.minorticks_off()
        panel.set_xlabel(name)
    axes[0].set_ylabel("processor seconds")
    axes[0].legend()
    drawn.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 576, 1152])
    parser.add_argument("--out", required=True, help="folder")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child-out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    start = {"blocks": args.blocks[0], "tokens": args.tokens[0], "width": args.widths[len(args.widths) // 2]}
    rows = []
    for axis, values in zip(AXES, (args.blocks, args.tokens, args.widths), strict=True):
        for value in values:
            point = start | {axis: value}
            rows.append({"axis": axis, **point, "found": make(args, *point.values())})
            print(json.dumps(rows[-1]), flush=True)
    out = Path(args.out)
    (out / "scaling.json").write_text(json.dumps({"settings": vars(args), "rows": rows}, indent=1))
    (out / "scaling.md").write_text(table(args, rows))
    figure(rows, out / "scaling.png")
    print(table(args, rows))


if __name__ == "__main__":
    main()
