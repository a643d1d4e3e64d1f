"""How `cloq quantize` scales with the number of processes on one machine.

    python scripts/bench_distributed.py MODEL --calib train.txt --processes 1 2 4 --samples 16 --seq-len 256 --only '*.layers.[0-2].*'

Every number of processes quantizes the same from the beginning, with the same number of threads in each process, under `torchrun`. Prints a
table as it goes: seconds of the whole call and of its phases as the first process timed them, in which `exchange` is the results on their
way and the waiting for whoever takes longest; and the peak memory of every process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

PHASES = ("embed", "capture", "solve", "exchange", "propagate", "export")


def quantize(args: argparse.Namespace) -> None:
    """One of the processes."""
    import cloq
    from cloq.streaming.memory import peak_resident

    result = cloq.quantize(
        args.model, out=args.out / "out", bits=args.bits, calib=args.calib, calib_samples=args.samples, seq_len=args.seq_len,
        only=tuple(args.only), sequential=args.sequential, device=args.device,
    )  # fmt: skip
    seen = {
        "seconds": result.seconds,
        "phases": result.phases,
        "error": fmean(layer.metrics.error_corrected for layer in result.layers.values()),
        "peak": peak_resident() / 2**20,
    }
    (args.out / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


def measured(args: argparse.Namespace, processes: int) -> list[dict]:
    """What each process has seen, by rank."""
    with tempfile.TemporaryDirectory() as work:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__]
        subprocess.run([*launch, *sys.argv[1:], "--out", work], check=True, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
        return [json.loads((Path(work) / f"{rank}.json").read_text()) for rank in range(processes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--sequential", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        quantize(args)
        return
    print(f"| processes | seconds | speed-up | {' | '.join(PHASES)} | MiB of each | mean error |")
    print(f"|{'--:|' * (len(PHASES) + 5)}")
    base = None
    for processes in args.processes:
        ranks = measured(args, processes)
        first = ranks[0]
        base = base or first["seconds"]
        phases = " | ".join(f"{first['phases'].get(phase, 0.0):.1f}" for phase in PHASES)
        peaks = ", ".join(f"{rank['peak']:.0f}" for rank in ranks)
        numbers = f"{first['seconds']:.1f} | {base / first['seconds']:.2f} | {phases} | {peaks} | {first['error']:.5f}"
        print(f"| {processes} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
