"""What an initialization is worth after fine-tuning: every base with every kind of factors, trained alike, in one table with figures.

    python scripts/bench_quality.py MODEL --train train.txt --valid valid.txt --test test.txt --bits 2 --seeds 0 1 2 --out results
    … --tasks arc_easy,piqa --task-data FOLDER --task-rows 200            accuracy before and after, too
    … --methods cloq gptqmodel-eora peft-loftq                            beside what other libraries make (scripts/quality/rivals.py)
    … --methods cloq eora --sweep rank 8 16 32 64 128 --sweep calib-samples 8 32 128      one table and figure more for each sweep
    … --methods cloq eora --lrs 3e-4 1e-3 --kept          tables and figures of what several commands left, each method at rates of its own

Every cell (bits, method, learning rate, seed, and what a sweep changes) is one training run, kept in OUT/cells as it ends; what training
starts from is measured once, and kept in OUT/before. The same command continues where it stopped, and makes OUT/table.md, results.json and
curves.png of what is there, widths.png where there are several, and sweep-SETTING.md and .png for each sweep. A result that was made
with other settings is refused.

**What is equal.** All methods of a width that fit factors to a given base get the same base: GPTQ with scales searched, calibrated through
its own compressed prefix. `loftq` alternates and so has a base of its own, as has `cloq-run`, which is what `cloq quantize` makes: codes
chosen for the factors, later layers quantized on the outputs of `Q + BA`; `cloq-paper` is the published method, `cloq-best` all effort.
Rank, steps, tokens and their order (by seed), optimizer and schedule are the same.

**What is chosen.** The learning rate, per method, from the same grid, by the perplexity on the validation text after training, mean over
seeds; the table shows the test text at that rate. With `--rate-seeds` these seeds alone train at every rate, and the others at the one
that was chosen.

**What seeds draw.** The order of the training text. Bases and factors are those of one draw of calibration text, so that the error over
seeds knows nothing of that draw; with `--redraw` every seed has a draw, and bases and factors, of its own, for as many times their cost.

**As good as the best rival in the end.** The best rival is the method of the lowest validation loss after training at the same width, the
16-bit model and a method's own variants (those of `cloq` have its name in theirs) left out. The column says after how many steps, and
seconds of training, a method's validation loss first is as low, linear in the loss between evaluations.

**What is not the quantization's.** With `--exact-base` training starts from the same factors on `W - B A`, the 16-bit model to the last
digits: what is left to `lora-16` then is the factors' own.

**What a sweep changes.** One setting at a time, of the bases and factors too where it is theirs: the base that factors share is made once
for all ranks and ways of propagation, since its codes know of neither. A method that a setting means nothing to has one cell for all its
values.

Bases are decoded once into float32 and trained so, on a GPU where there is one: the same function as the packed base up to the kernels'
rounding, and faster on a CPU. `--precision bf16` trains with products in bfloat16 (autocast), everybody alike; evaluation stays in float32.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quality.cells import Cell, Kept, Start, grid, starts
from quality.methods import METHODS, OWN
from quality.protocol import Protocol, Sweep, add_arguments, read_protocol
from quality.rivals import Refused
from quality.summary import Row, best_rates, perplexity, summarize

from cloq.errors import CloqError


class Bench:
    """What is made on the way from a cell's name to its result; nothing that is kept already is made again, and with `kept_only` nothing
    is made at all."""

    def __init__(self, protocol: Protocol, out: Path, runs: Path, minutes: float, redraw: bool, kept_only: bool = False):
        from quality.answers import read_tasks
        from quality.starts import Starts
        from quality.training import read_texts

        self._protocol, self._starts = protocol, Starts(protocol, runs, minutes)
        self._tasks, self._texts = read_tasks(protocol), read_texts(protocol)  # first: what is not there leaves no folder behind
        self._cells, self._before, self._redraw = Kept(out / "cells"), Kept(out / "before"), redraw
        self._kept_only = kept_only
        self.refused: dict[Start, str] = {}

    def results(self, cells: Iterable[Cell]) -> dict[Cell, dict[str, Any]]:
        """Of all cells that have one, made as they come."""
        found = ((cell, self.result(cell)) for cell in cells)
        return {cell: result for cell, result in found if result is not None}

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """`None` where the start is another library's, and it refused; `refused` says why. Also where nothing is to be made and it is not
        there."""
        start = self._start(cell)
        protocol = self._protocol.changed(start.changes)
        kept = self._cells.get(cell.name, protocol)
        if kept is not None or self._kept_only or cell.start in self.refused:
            return kept
        began = time.perf_counter()
        try:
            result = self._train(cell, start, protocol)
        except Refused as error:
            self.refused[cell.start] = str(error)
            print(f"{cell.start.name}: {error}", flush=True)
            return None
        self._cells.put(cell.name, protocol, result)
        before, after = (perplexity(result[when]["test"]) for when in ("before", "after"))
        print(f"{cell.name}: {before:,.1f} -> {after:,.2f}, {time.perf_counter() - began:.0f} s", flush=True)
        return result

    def _start(self, cell: Cell) -> Start:
        """The cell's own, where every seed draws its calibration text; else what all seeds share."""
        if not self._redraw or not cell.seed or "calib_seed" not in METHODS[cell.method].moved_by:
            return cell.start
        return replace(cell.start, changes=(*cell.changes, ("calib_seed", cell.seed)))

    def _train(self, cell: Cell, start: Start, protocol: Protocol) -> dict[str, Any]:
        from quality.answers import answer_tasks
        from quality.starts import trainable_model
        from quality.training import losses, train

        from cloq.streaming.device import resolve_device

        gc.collect()  # the last cell's model refers to itself, and the collector counts objects, not their bytes
        model = trainable_model(protocol, self._starts.pair(start)).to(resolve_device("auto"))
        before = self._before.get(start.name, protocol)
        if before is None:
            before = {"losses": losses(model, self._texts), "tasks": answer_tasks(model, protocol, self._tasks)}
            self._before.put(start.name, protocol, before)
        result = train(protocol, cell, model, self._texts) | {"before": before["losses"]}
        if not protocol.tasks:
            return result
        return result | {"tasks": {"before": before["tasks"], "after": answer_tasks(model, protocol, self._tasks)}}


def write(protocol: Protocol, sweeps: Sequence[Sweep], rows: Sequence[Row], bench: Bench, args: argparse.Namespace) -> None:
    """Tables and figures of what there is."""
    from quality.figures import curves, sweep_figure, width_figure, widths
    from quality.tables import main_table, sweep_table

    out = Path(args.out)
    refused = {start.name: reason for start, reason in bench.refused.items()}
    content = {"settings": vars(args), "refused": refused, "rows": [asdict(row) for row in rows]}
    (out / "results.json").write_text(json.dumps(content, indent=1), "utf8")
    tables = {"table.md": main_table(protocol, rows, bench.refused)}
    curves(rows, out / "curves.png")
    if len(widths([row for row in rows if not row.changes])) > 1:
        width_figure(rows, out / "widths.png")
    for sweep in sweeps:
        tables[f"sweep-{sweep.name}.md"] = sweep_table(protocol, sweep, rows)
        sweep_figure(protocol, sweep, rows, out / f"sweep-{sweep.name}.png")
    for name, text in tables.items():
        (out / name).write_text(text, "utf8")
        print(text)


def _width(text: str) -> float:
    return int(text) if text.isdigit() else float(text)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--bits", type=_width, nargs="+", default=[2], help="2, 3, 4, or a mean of them, such as 2.5")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=OWN, help="default: all but other libraries' own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--redraw", action="store_true", help="seeds draw the calibration text too: each has bases and factors of its own")
    parser.add_argument("--kept", action="store_true", help="tables and figures of the results that are there; nothing is trained")
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4])
    parser.add_argument("--rate-seeds", type=int, nargs="+", default=[], help="of the seeds, those that the rate is chosen on; all")
    parser.add_argument("--sweep", nargs="+", action="append", default=[], metavar=("SETTING", "VALUE"), help="repeatable; see above")
    parser.add_argument("--rival-minutes", type=float, default=180, help="what another library's quantization may take")
    parser.add_argument("--runs", help="folder of the bases and factors, which comparisons may share; OUT/runs if not given")
    parser.add_argument("--out", required=True, help="folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    from cloq.models import quiet_libraries

    args = parse(argv)
    if not set(args.rate_seeds) <= set(args.seeds):
        raise SystemExit("error: --rate-seeds are some of the --seeds")
    quiet_libraries()
    protocol, out = read_protocol(args), Path(args.out)
    sweeps = [Sweep.parse(words) for words in args.sweep]
    bench = Bench(protocol, out, Path(args.runs) if args.runs else out / "runs", args.rival_minutes, args.redraw, args.kept)
    points = starts(protocol, args.bits, args.methods, sweeps)
    choosing = args.rate_seeds or args.seeds
    results = bench.results(grid(points, args.lrs, choosing))
    if not results and args.kept:
        raise SystemExit(f"error: {out / 'cells'} has no result of these methods, rates and seeds")
    rates, others = best_rates(results), [seed for seed in args.seeds if seed not in choosing]
    results |= bench.results(start.cell(rate, seed) for seed in others for start, rate in rates.items())
    write(protocol, sweeps, summarize(results, protocol.steps), bench, args)


if __name__ == "__main__":
    try:
        main()
    except (CloqError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
