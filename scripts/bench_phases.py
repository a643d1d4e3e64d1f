"""Where one run's time goes, phase by phase, beside the arithmetic that the phase needs and the time it would take at the machine's rate.

    python scripts/bench_phases.py MODEL --calib train.txt --samples 32 --seq-len 512

The floor is the phase's operations over the rate of a float32 matrix product that lies in the cache, the best of what was measured in the
same process before and after the run. A phase that is far above its floor is bound by something else: many small operations, memory, disk.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from cloq.api import open_decoder, run
from cloq.pipeline import resolve_device
from cloq.plan import plan
from cloq.plan.work import measure
from cloq.specs import run_spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--json", help="also write the numbers here")
    args = parser.parse_args()
    spec = run_spec(model=args.model, calib=args.calib, calib_samples=args.samples, seq_len=args.seq_len, bits=args.bits)
    planned = plan(spec, open_decoder(spec))
    with tempfile.TemporaryDirectory() as work:
        result = run(spec, Path(work) / "out")
    rate = max(planned.machine.products, measure(resolve_device(spec.device)).products)
    print(f"{rate / 1e9:.0f} GFLOP/s measured; run {result.seconds:.0f} s, planned {sum(planned.seconds.values()):.0f} s\n")
    print("| phase | seconds | share | T operations | floor s | planned s |")
    print("|---|---:|---:|---:|---:|---:|")
    rows = []
    for phase, seconds in sorted(result.phases.items(), key=lambda item: -item[1]):
        work = planned.work.get(phase)
        operations = work.products + work.wide if work else 0.0
        rows.append({"phase": phase, "seconds": seconds, "operations": operations, "floor": operations / rate})
        estimate = planned.seconds.get(phase, 0.0)
        share = seconds / result.seconds
        print(f"| {phase} | {seconds:.1f} | {share:.0%} | {operations / 1e12:.2f} | {operations / rate:.1f} | {estimate:.1f} |")
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "rate": rate, "seconds": result.seconds, "phases": rows}, indent=1))


if __name__ == "__main__":
    main()
