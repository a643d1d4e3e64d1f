"""Peak memory of `cloq quantize`, base by base and init by init: each run in a process of its own, by the operating system's account.

    python scripts/bench_memory.py MODEL --calib train.txt --samples 64 --seq-len 512

    … --bases gptq --inits cloq --activations host disk --samples 64 512

Only the first block is quantized: the others need the same memory one after the other. The first row is a process that imports the
libraries, reads nothing and ends: what no run can go below.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from cloq.specs import ACTIVATIONS

BASES = {"rtn": {"quantizer": "rtn"}, "gptq": {}, "gptq+magr": {"magr": True}}
INITS = ("zero", "svd", "loftq", "qera", "eora", "cloq")


def child(args: argparse.Namespace) -> None:
    """One run, or the imports alone; says its peak in bytes in the last line of what it prints."""
    import cloq
    from cloq.streaming import pipeline
    from cloq.streaming.memory import peak_resident

    if args.spare is not None:
        pipeline.spare_memory = lambda *device: args.spare << 20
    if args.base:
        cloq.quantize(
            args.model, out=args.out, bits=args.bits, init=args.init, calib=args.calib, calib_samples=args.samples[0], seq_len=args.seq_len,
            only="*.layers.0.*", activations=args.activations[0], **BASES[args.base],
        )  # fmt: skip
    print(peak_resident())


def peak(args: argparse.Namespace, base: str = "", init: str = "", samples: int = 0, activations: str = "auto") -> float:
    """MiB."""
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        command = [sys.executable, __file__, *sys.argv[1:], "--base", base, "--init", init, "--out", str(Path(work) / "out")]
        command += ["--samples", str(samples), "--activations", activations]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if ended.returncode:
            raise SystemExit(f"{base} with {init} failed")
        return int(ended.stdout.split()[-1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--samples", type=int, nargs="+", default=[64], help="a table for each")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=["auto"], help="a table for each")
    parser.add_argument("--spare", type=int, help="MiB for what would else be computed again; a quarter of what is free if not given")
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--inits", nargs="+", choices=INITS, default=list(INITS))
    parser.add_argument("--work", help="folder for the runs, on a disk: activations that wait on disk take memory where /tmp is memory")
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--init", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        child(args)
        return
    rows = [{"imports": peak(args)}]
    print(f"imports alone: {rows[0]['imports']:.0f} MiB", flush=True)
    for samples, activations in itertools.product(args.samples, args.activations):
        print(f"\n{samples} × {args.seq_len} tokens, --activations {activations}", flush=True)
        print(f"\n| base | {' | '.join(args.inits)} |\n|---|{'---:|' * len(args.inits)}", flush=True)
        for base in args.bases:
            found = {init: peak(args, base, init, samples, activations) for init in args.inits}
            rows.append({"samples": samples, "activations": activations, "base": base} | found)
            print(f"| {base} | {' | '.join(f'{value:.0f}' for value in found.values())} |", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "MiB": rows}, indent=1))


if __name__ == "__main__":
    main()
