"""What the survey of a run found, and what its means were spent on.

    cloq quantize MODEL --bits 2.25 --adaptive-rank --calib train.txt --out run
    python scripts/bench_survey.py run

Of every kind of layer: its share of the weights, its share of the loss that rounding all layers alike would cost at each width, the mean
width and rank that it got. Below, the rise of the loss that the survey foresees, in nats per token, for every layer alike and for what was
chosen. Prints Markdown.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path

from cloq.api import open_decoder, read_run_file
from cloq.streaming.layers import plan_layers
from cloq.streaming.store import Store
from cloq.streaming.survey import possible


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    out = parser.parse_args().run
    spec, store = read_run_file(out / "run.yaml"), Store(out)
    kept = store.kept_survey()
    if kept is None:
        raise SystemExit(f"error: {out} has no survey; make a run with --bits 2.5, --mean-bits or --adaptive-rank")
    layers, summaries = plan_layers(spec, open_decoder(spec.replace(device="cpu"))), store.summaries()
    kinds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, losses in kept[0].items():
        layout, metrics = summaries[name]
        weights, kind = math.prod(layout.shape), kinds[name.rsplit(".", 1)[-1]]
        widths, ranks = possible(spec, name, layers[name], layout.shape)
        asked = ranks.index(min(layers[name].rank, *layout.shape))
        for row, width in enumerate(widths):
            kind[f"loss {width}"] += float(losses[row, asked])
        kind["chosen"] += float(losses[widths.index(layout.bits), ranks.index(metrics.rank)])
        kind["weights"] += weights
        kind["bits"] += weights * layout.bits
        kind["sides"] += sum(layout.shape)
        kind["factors"] += metrics.rank * sum(layout.shape)
    print(table(kinds))
    rises = {key: sum(kind[key] for kind in kinds.values()) for key in _losses(kinds)}
    print("\nnats per token: " + ", ".join(f"{key.removeprefix('loss ')} {rise:.4f}" for key, rise in rises.items()))


def _losses(kinds: dict[str, dict[str, float]]) -> list[str]:
    return [key for key in next(iter(kinds.values())) if key.startswith("loss")] + ["chosen"]


def table(kinds: dict[str, dict[str, float]]) -> str:
    total = {key: sum(kind[key] for kind in kinds.values()) for key in ("weights", *_losses(kinds))}
    shares = [key for key in _losses(kinds) if key != "chosen"]
    lines = [
        "| kind | share of weights | " + " | ".join(f"of the {key} bits" for key in shares) + " | bits | rank |",
        "|---|" + "---:|" * (len(shares) + 3),
    ]
    for name, kind in kinds.items():
        of = " | ".join(f"{kind[key] / total[key]:.0%}" for key in shares)
        means = f"{kind['bits'] / kind['weights']:.2f} | {kind['factors'] / kind['sides']:.0f}"
        lines.append(f"| {name} | {kind['weights'] / total['weights']:.1%} | {of} | {means} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
