"""Settings beside each other on a few real layers: the quickest way to see whether an idea lowers the error on held-out text.

    python scripts/bench_layers.py MODEL --calib train.txt --blocks 0 10 --variant "" --variant rounds=2 --variant "rounds=2 damping=0.05"

Each variant is a set of settings as in the Python API (`bits=3 init=loftq`), on top of cloq's defaults; the first one is what the others
are compared with. All see the same weights and the statistics of the 16-bit model, so errors are comparable to the digit. Printed: the
mean layer error of `Q` and of `Q + BA` on the calibration tokens and on held-out ones, the held-out error relative to the first variant
(geometric mean and worst layer), and seconds.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from cloq.calibration import CalibrationTokens, calibration_tokens, gram_matrices, shared_inputs
from cloq.models import Decoder, load_tokenizer
from cloq.specs import CalibSpec, RunSpec, layer_spec, matches, run_spec
from cloq.streaming.solve import solve_layer
from cloq.types import LayerMetrics, LayerStats


class Layer(NamedTuple):
    """A linear layer with the statistics of its inputs on calibration and held-out text."""

    name: str
    weight: torch.Tensor
    stats: LayerStats
    unseen: LayerStats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `tokens_of` and `layers_of` ask for."""
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="patterns of layers, such as q_proj 'mlp.*'")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--heldout", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)


def tokens_of(args: argparse.Namespace) -> CalibrationTokens:
    spec = CalibSpec(args.calib, args.samples, args.seq_len, heldout=args.heldout, seed=args.seed)
    return calibration_tokens(spec, load_tokenizer(Path(args.model)))


@torch.no_grad()
def layers_of(args: argparse.Namespace, tokens: CalibrationTokens) -> list[Layer]:
    decoder = Decoder(args.model)
    texts = [decoder.enter(part, RunSpec.batch_tokens) for part in (tokens.calibration, tokens.heldout)]
    found = []
    for index in range(max(args.blocks) + 1):
        decoder.load_block(index)
        if index in args.blocks:
            linears = decoder.linears(index)
            groups = shared_inputs(lambda i=index: decoder.run_block(i, texts[0][0]), linears)
            firsts = [group[0] for group in groups]
            seen, unseen = (
                gram_matrices([lambda b=b, i=index: decoder.run_block(i, b) for b in batches], linears, firsts) for batches in texts
            )
            found += [
                Layer(name, decoder.weight(name, linears[name]).clone(), seen[group[0]], unseen[group[0]])
                for group in groups for name in group if not args.only or any(matches(pattern, name) for pattern in args.only)
            ]  # fmt: skip
        for batches in texts:
            batches[:] = [batch.onwards(decoder.run_block(index, batch)) for batch in batches]
        decoder.drop_block(index)
    return found


def settings(variant: str) -> dict:
    """`"bits=3 act_order=true"` as a dictionary; values are read as JSON where they are that."""
    found = {}
    for part in variant.split():
        name, _, value = part.partition("=")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def measure(layers: list[Layer], variant: str) -> list[LayerMetrics]:
    run = run_spec(**settings(variant))
    return [solve_layer(layer.weight, layer.stats, layer.unseen, layer_spec(run, layer.name), run.lora).metrics for layer in layers]


def row(variant: str, mine: list[LayerMetrics], first: list[LayerMetrics]) -> dict:
    ratios = [a.heldout_corrected / b.heldout_corrected for a, b in zip(mine, first, strict=True)]
    mean = {name: sum(getattr(m, name) for m in mine) / len(mine) for name in ("error_quantized", "error_corrected", "heldout_corrected")}
    ratio = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return {"variant": variant or "defaults", **mean, "ratio": ratio, "worst": max(ratios), "seconds": sum(m.seconds for m in mine)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--variant", action="append", required=True, help="settings, such as 'bits=3 rounds=2'; '' are the defaults")
    args = parser.parse_args()
    layers = layers_of(args, tokens_of(args))
    print(
        f"{len(layers)} layers of {Path(args.model).name}, blocks {args.blocks}, {args.samples} x {args.seq_len} tokens, seed {args.seed}\n"
    )
    print("| variant | error of Q | of Q + BA | held out | relative | worst layer | seconds |\n|---|---:|---:|---:|---:|---:|---:|")
    first = None
    for variant in args.variant:
        mine = measure(layers, variant)
        first = first or mine
        r = row(variant, mine, first)
        errors = " | ".join(f"{r[name]:.5f}" for name in ("error_quantized", "error_corrected", "heldout_corrected"))
        print(f"| {r['variant']} | {errors} | {r['ratio']:.3f} | {r['worst']:.3f} | {r['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
