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
from bench_layers import Layer, layers_of

from cloq.calibration import calibration_tokens
from cloq.initializers import closed_form
from cloq.models import Decoder, followed, load_tokenizer, squared_gradients
from cloq.quantizers import Rtn
from cloq.specs import CalibSpec
from cloq.streaming.fisher import output_weights

DRAWS = 6
"""Of each number of tokens, at most."""


def gradients(args: argparse.Namespace, layers: list[Layer]) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Squared gradients of every calibration sequence, and those of all held-out ones together."""
    decoder, names = Decoder(args.model), frozenset(layer.name for layer in layers)
    spec = CalibSpec(args.calib, args.samples, args.seq_len, heldout=args.heldout, seed=args.seed)
    tokens = calibration_tokens(spec, load_tokenizer(Path(args.model)))
    numbered = enumerate(tokens.calibration.split(1))
    each = [squared_gradients(decoder, sequence, args.seq_len, names, [number]) for number, sequence in numbered]
    others = [len(each) + number for number in range(len(tokens.heldout))]
    return each, squared_gradients(decoder, tokens.heldout, 4096, names, others)


def left(layer: Layer, bits: int, rank: int, weights: torch.Tensor | None, counts: torch.Tensor) -> float:
    """With factors that know of these weights, on held-out inputs, each output counted as given."""
    error = layer.weight - Rtn(bits, 64, search=True).quantize(layer.weight).dequantize()
    error = error - closed_form(error, layer.stats.gram, min(rank, *error.shape), outputs=weights).factors.delta()
    return float(counts @ ((error @ layer.unseen.gram) * error).sum(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="patterns of layers, such as q_proj 'mlp.*'")
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--share", type=float, default=0.9, help="as of --fisher")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--heldout", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    layers = layers_of(args)
    each, unseen = gradients(args, layers)
    plain = [left(layer, args.bits, args.rank, None, unseen[layer.name]) for layer in layers]
    print(f"{len(layers)} layers of {Path(args.model).name}, blocks {args.blocks}, {args.bits} bits, rank {args.rank}\n")
    print("| tokens | draws | left |\n|---:|---:|---:|")
    for tokens in args.tokens:
        size = -(-tokens // followed(args.seq_len))
        draws = [each[first : first + size] for first in range(0, len(each) - size + 1, size)][:DRAWS]
        ratios = []
        for draw in draws:
            weights = output_weights({layer.name: sum(one[layer.name] for one in draw) for layer in layers}, args.share)
            for layer, alone in zip(layers, plain, strict=True):
                ratios.append(math.log(left(layer, args.bits, args.rank, weights.get(layer.name), unseen[layer.name]) / alone))
        print(f"| {size * followed(args.seq_len)} | {len(draws)} | {math.exp(fmean(ratios)):.3f} |", flush=True)


if __name__ == "__main__":
    main()
