"""Peak memory of `cloq quantize`, base by base and init by init: each run in a process of its own, by the operating system's account.

    python scripts/bench_memory.py MODEL --calib train.txt --samples 64 --seq-len 512

Only the first block is quantized: the others need the same memory one after the other. The first row is a process that imports the
libraries, reads nothing and ends: what no run can go below.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BASES = {"rtn": {"quantizer": "rtn"}, "gptq": {}, "gptq+magr": {"magr": True}}
INITS = ("zero", "svd", "loftq", "qera", "eora", "cloq")


def quantize(args: argparse.Namespace) -> None:
    """The child: one run, or the imports alone."""
    import cloq
    import cloq.streaming.pipeline

    if args.base:
        cloq.quantize(
            args.model, out=args.out, bits=args.bits, init=args.init, calib=args.calib, calib_samples=args.samples, seq_len=args.seq_len,
            only="*.layers.0.*", **BASES[args.base],
        )  # fmt: skip


def peak(args: argparse.Namespace, base: str, init: str) -> float:
    """MiB."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, __file__, *sys.argv[1:], "--base", base, "--init", init, "--out", str(Path(work) / "out")]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise SystemExit(f"{base} with {init} failed")
        return json.loads((Path(work) / "out/report.json").read_text())["peak_memory"]["host"] / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--init", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        quantize(args)
        return
    rows = {"imports": {"": peak(args, "", "")}}
    print(f"imports alone: {rows['imports']['']:.0f} MiB\n\n| base | {' | '.join(INITS)} |\n|---|{'---:|' * len(INITS)}", flush=True)
    for base in BASES:
        rows[base] = {init: peak(args, base, init) for init in INITS}
        print(f"| {base} | {' | '.join(f'{rows[base][init]:.0f}' for init in INITS)} |", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "MiB": rows}, indent=1))


if __name__ == "__main__":
    main()
