"""From how many tokens the loss has to be followed back: what factors leave whose weights come from few, as others' gradients count it.

    python scripts/bench_fisher.py MODEL --calib train.txt --blocks 1 12 25 --tokens 512 1024 2048 4096 12288

Layers are rounded to the nearest, with scales searched; factors are the closed form's. For each number of tokens several draws are made of
the calibration sequences, without a sequence in two of them. What is left is counted on held-out inputs by held-out gradients, and is
relative to what factors leave that know of no weights: geometric means over layers and draws.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import fmean

import torch
from bench_layers import Layer, add_arguments, layers_of, tokens_of

from cloq.calibration import CalibrationTokens
from cloq.initializers import closed_form
from cloq.models import Decoder, followed, squared_gradients
from cloq.quantizers import Rtn
from cloq.specs import RunSpec
from cloq.streaming.fisher import output_weights

DRAWS = 6
"""Of each number of tokens, at most."""


def gradients(
    args: argparse.Namespace, tokens: CalibrationTokens, layers: list[Layer]
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Squared gradients of every calibration sequence, and those of all held-out ones together."""
    decoder, names = Decoder(args.model), frozenset(layer.name for layer in layers)
    numbered = enumerate(tokens.calibration.split(1))
    each = [squared_gradients(decoder, sequence, args.seq_len, names, [number]) for number, sequence in numbered]
    others = [len(each) + number for number in range(len(tokens.heldout))]
    return each, squared_gradients(decoder, tokens.heldout, RunSpec.batch_tokens, names, others)


def left(layer: Layer, error: torch.Tensor, rank: int, weights: torch.Tensor | None, counts: torch.Tensor) -> float:
    """Of the error, with factors that know of these weights, on held-out inputs, each output counted as given."""
    error = error - closed_form(error, layer.stats.gram, min(rank, *error.shape), outputs=weights).factors.delta()
    return float(counts @ ((error @ layer.unseen.gram) * error).sum(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(samples=24, heldout=0.8)
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--share", type=float, default=RunSpec.fisher, help="as of --fisher")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64)
    args = parser.parse_args()
    text = tokens_of(args)
    layers = layers_of(args, text)
    each, unseen = gradients(args, text, layers)
    rounded = Rtn(args.bits, 64, search=True)
    errors = [layer.weight - rounded.quantize(layer.weight).dequantize() for layer in layers]

    def all_left(weights: dict[str, torch.Tensor]) -> list[float]:
        return [
            left(layer, error, args.rank, weights.get(layer.name), unseen[layer.name]) for layer, error in zip(layers, errors, strict=True)
        ]

    plain = all_left({})
    print(f"{len(layers)} layers of {Path(args.model).name}, blocks {args.blocks}, {args.bits} bits, rank {args.rank}\n")
    print("| tokens | draws | left |\n|---:|---:|---:|")
    for tokens in args.tokens:
        size = -(-tokens // followed(args.seq_len))
        draws = [each[first : first + size] for first in range(0, len(each) - size + 1, size)][:DRAWS]
        ratios = []
        for draw in draws:
            weights = output_weights({layer.name: sum(one[layer.name] for one in draw) for layer in layers}, args.share)
            ratios += [math.log(mine / alone) for mine, alone in zip(all_left(weights), plain, strict=True)]
        print(f"| {size * followed(args.seq_len)} | {len(draws)} | {math.exp(fmean(ratios)):.3f} |", flush=True)


if __name__ == "__main__":
    main()
