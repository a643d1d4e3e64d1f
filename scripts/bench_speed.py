"""Where one run's time goes, part by part, beside the operations and bytes of each part and what this machine can do.

    python scripts/bench_speed.py MODEL --calib train.txt --samples 16 --seq-len 512 --threads 1 --json speed.json

One `cloq quantize` with clocks around the routines that do the work. A part's floor is its floating-point operations over the rate of a
matrix product that lies in the cache, plus the bytes that it streams or reads over the rate of a copy; all rates are the best of what was
measured in the same process before and after the run. "At" is floor over seconds. A part well below 100 % is bound by something
else: many small operations, decompositions, small products, or another process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from bench_layers import settings

from cloq.algebra import lowrank
from cloq.api import open_decoder, run
from cloq.calibration import gram, paired
from cloq.initializers import cloq as closed
from cloq.plan import algebra, plan
from cloq.plan.work import Machine, Work, measure
from cloq.quantizers import Gptq, Magr
from cloq.quantizers.grid import SHRINKS
from cloq.specs import RunSpec, run_spec
from cloq.streaming import pipeline, solve
from cloq.streaming.device import resolve_device
from cloq.streaming.memory import peak_resident

WHOLE = {
    "gradients": "following the loss back",
    "load": "load",
    "propagate": "propagate",
    "store": "store",
    "export": "pack and export",
    "apply": "apply",
    "embed": "embed",
}
"""Phases of a run that are one part of the table, and what they are called there."""

SEARCH_BYTES = (2 * len(SHRINKS) + 2) * 60
"""For each weight whose group's scale is searched: every grid rounded to and compared, and the last one fitted."""

SUMS = ("Gram sums", "drift sums")
"""Parts inside the capture; all others that have a clock are inside the solve."""


class Clocks:
    """Seconds and work by part, of routines that `around` wraps. A part inside another (GPTQ after MagR) is not counted twice."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.work: dict[str, Work] = {}

    def around(self, part: str, routine: Callable, work: Callable[..., Work]) -> Callable:
        def timed(*args, **kwargs):
            started = time.perf_counter()
            result = routine(*args, **kwargs)
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started
            self.work[part] = self.work.get(part, Work()) + work(*args)
            return result

        return timed


def clocked_run(spec: RunSpec, out: Path) -> tuple[Clocks, dict[str, float], float]:
    """The parts inside capture and solve, the run's own phases, and its seconds."""
    clocks = Clocks()
    searched = Work(searched=1.0) if spec.quant.search else Work()
    wrapped = [
        (gram, "_add_upper_triangle", "Gram sums", lambda total, rows: algebra.gram(len(total), len(rows))),
        (paired, "_add", "drift sums", lambda total, off, rows: Work(products=2.0 * off.numel() * rows.shape[1])),
        (pipeline, "corrected", "correction", lambda weight, *rest: algebra.corrected(weight.shape, False)),
        (pipeline, "corrected_by_heldout", "correction, chosen", lambda weight, *rest: algebra.corrected(weight.shape, True)),
        (Gptq, "quantize", "codes", lambda self, weight, stats: algebra.gptq(weight.shape) * bool(stats) + weight.numel() * searched),
        (Magr, "reduce", "MagR", lambda self, weight, stats: algebra.magr(weight.shape)),
        (closed, "closed_form", "closed form", lambda error, gram, rank, *rest: algebra.fit(error.shape, "cloq", rank)),
        (closed, "descend", "coordinate descent", lambda quantized, *rest: algebra.descent(quantized.shape)),
        (lowrank, "deflate", "deflation", lambda gram, rows, *rest: algebra.deflation(len(gram), len(rows))),
        (lowrank, "follow", "following the error", lambda error, gram, vectors, *rest: algebra.following(error.shape, vectors.shape[1])),
        (solve, "_errors", "layer metrics", lambda weight, *rest: algebra.errors(weight.shape, 0, False)),
    ]
    with ExitStack() as stack:
        for owner, name, part, work in wrapped:
            stack.enter_context(mock.patch.object(owner, name, clocks.around(part, getattr(owner, name), work)))
        result = run(spec, out)
    return clocks, result.phases, result.seconds


def parts(clocks: Clocks, phases: dict[str, float], planned: dict[str, Work], seconds: float) -> list[tuple[str, float, Work]]:
    """Every second of the run, once: (part, seconds, work)."""
    sums = sum((clocks.work.get(part, Work()) for part in SUMS), Work())
    inside = [part for part in clocks.seconds if part not in SUMS]
    forward = Work(products=max(planned["capture"].products - sums.products, 0.0), streamed=planned["capture"].streamed)
    rows = [(name, phases[phase], planned[phase]) for phase, name in WHOLE.items() if phase in phases]
    rows.append(("capture: forwards", phases["capture"] - sum(clocks.seconds.get(part, 0.0) for part in SUMS), forward))
    rows += [(part, clocks.seconds[part], clocks.work[part]) for part in clocks.seconds]
    rows.append(("rest of the solve", phases["solve"] - sum(clocks.seconds[part] for part in inside), Work()))
    rows.append(("imports, text, report", seconds - sum(phases.values()), Work()))
    return sorted(rows, key=lambda row: -row[1])


def cached_bytes(work: Work) -> float:
    """What is moved within a cache, by the search for scales too."""
    return work.cached + SEARCH_BYTES * work.searched


def floor(work: Work, machine: Machine) -> float:
    """Seconds at the machine's best rates; calls are no work."""
    return (
        work.products / machine.products
        + work.wide / machine.wide
        + (work.streamed + work.disk) / machine.streamed
        + cached_bytes(work) / machine.cached
    )


def best(machines: list[Machine]) -> Machine:
    return Machine(**{name: max(getattr(machine, name) for machine in machines) for name in machines[0].to_dict()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--settings", default="", help="other settings of `cloq quantize` as NAME=VALUE …, such as 'effort=published'")
    parser.add_argument("--only", help="quantize only the layers that match")
    parser.add_argument("--threads", type=int, help="of torch; all cores by default")
    parser.add_argument("--processor-time", action="store_true", help="not wall time: less moved by other work; needs --threads 1")
    parser.add_argument("--json", help="also write the numbers here")
    args = parser.parse_args()
    if args.processor_time:
        if args.threads != 1:
            parser.error("--processor-time adds up the time of all threads; use it with --threads 1")
        mock.patch.object(time, "perf_counter", time.process_time).start()  # for all that this process times
    if args.threads:
        torch.set_num_threads(args.threads)
    chosen = {"only": args.only} if args.only else {}
    chosen |= {"calib_samples": args.samples, "seq_len": args.seq_len, "bits": args.bits}
    spec = run_spec(model=args.model, calib=args.calib, **chosen, **settings(args.settings))
    device = resolve_device(spec.device)
    clock = time.perf_counter
    before = measure(device, clock)
    planned = plan(spec, open_decoder(spec), before)
    with tempfile.TemporaryDirectory() as work:
        clocks, phases, seconds = clocked_run(spec, Path(work) / "out")
    machine = best([before, measure(device, clock)])
    peak = peak_resident()
    print(
        f"{torch.get_num_threads()} threads; products {machine.products / 1e9:.0f} GFLOP/s in float32, {machine.wide / 1e9:.0f} in float64;"
    )
    print(f"{machine.streamed / 1e9:.0f} GB/s streamed, {machine.cached / 1e9:.0f} in the cache; peak memory {peak / 1e6:.0f} MB;")
    print(f"the run took {seconds:.1f} s, planned {sum(planned.seconds.values()):.1f} s\n")
    print("| part | seconds | share | 10⁹ operations | GB moved | floor s | at |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    rows = []
    for part, took, work in parts(clocks, phases, planned.work, seconds):
        least, operations, moved = floor(work, machine), work.products + work.wide, work.streamed + cached_bytes(work) + work.disk
        at = f"{least / took:.0%}" if least and took > 0 else ""
        print(f"| {part} | {took:.2f} | {took / seconds:.1%} | {operations / 1e9:.1f} | {moved / 1e9:.2f} | {least:.2f} | {at} |")
        rows.append({"part": part, "seconds": took, "operations": operations, "bytes": moved, "floor": least})
    if args.json:
        found = {"settings": vars(args), "machine": machine.to_dict(), "seconds": seconds, "peak_bytes": peak, "parts": rows}
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
