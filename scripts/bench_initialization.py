"""Every quantizer with every initializer on one real model, right after initialization: layer errors, perplexity, seconds.

    python scripts/bench_initialization.py MODEL --calib train.txt --eval test.txt --bits 2 3 4 --out results

Two settings of calibration, both in one pass over the blocks with all variants side by side:

    --propagate dense     every variant sees the same statistics, those of the 16-bit model: layer errors are comparable to the digit
    --propagate adapter   every variant is calibrated on the outputs of its own compressed prefix, as `cloq quantize` does

Writes OUT.json and OUT.md. A quantizer's base is computed once and shared by the initializers that leave it alone; its time is counted
for each of them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cloq import initializers, quantizers
from cloq.algebra import linalg
from cloq.calibration import calibration_tokens, gram_matrices, shared_inputs
from cloq.models import Batch, Decoder, load_tokenizer, set_weight
from cloq.specs import CalibSpec, LoraSpec, QuantSpec, RunSpec
from cloq.use.evaluate import evaluation_tokens, sequence_losses

BASES = {
    "rtn": {"quantizer": "rtn"},
    "gptq": {},
    "gptq+magr": {"magr": True},
    "rtn, range": {"quantizer": "rtn", "search": False},
    "gptq, range": {"search": False},
    "gptq, act order": {"act_order": True},
    "gptq, act order, static": {"act_order": True, "static_groups": True},
    "gptq, symmetric": {"symmetric": True},
}
"""Scales are chosen by rounding error unless a name says `range` (min-max)."""

LOFTQ_ITERATIONS = {"rtn": 5}
"""LoftQ's rounds: five on the cheap quantizer it was made for, two where every round runs GPTQ again."""

INITS = ("zero", "svd", "loftq", "qera", "eora", "cloq", "cloq, 1 round", "cloq, 2 rounds", "cloq, 4 rounds", "cloq, 8 rounds")
"""The default of `--inits` are the kinds; rounds choose the codes again for the factors, and so give bases of their own."""


@dataclass
class Variant:
    """One row of the table, and its activations on the way through the blocks."""

    bits: int
    base: str
    init: str
    quant: QuantSpec
    lora: LoraSpec
    eval: list[Batch]
    calib: list[Batch]
    unseen: list[Batch]
    errors: list[tuple[float, float, float, float]] = field(default_factory=list)
    seconds: float = 0.0
    effective: dict[str, torch.Tensor] = field(default_factory=dict)

    def row(self, loss: float) -> dict:
        mean = [sum(column) / len(self.errors) for column in zip(*self.errors, strict=True)] if self.errors else [0.0] * 4
        names = ("error_quantized", "error_corrected", "heldout_quantized", "heldout_corrected")
        identity = {"bits": self.bits, "base": self.base, "init": self.init}
        return identity | dict(zip(names, mean, strict=True)) | {"perplexity": math.exp(loss), "solve_seconds": self.seconds}


@torch.no_grad()
def run(args: argparse.Namespace) -> list[dict]:
    decoder = Decoder(args.model)
    tokenizer = load_tokenizer(Path(args.model))
    spec = CalibSpec(args.calib, args.samples, args.seq_len, seed=args.seed)
    tokens = calibration_tokens(spec, tokenizer)
    text = Path(args.eval).read_text("utf8")
    test = evaluation_tokens(text, tokenizer, args.eval_seq_len, args.eval_samples)
    calib, unseen = decoder.enter(tokens.calibration, RunSpec.batch_tokens), decoder.enter(tokens.heldout, RunSpec.batch_tokens)
    start = decoder.enter(test, RunSpec.batch_tokens)
    variants = [
        Variant(bits, base, init, QuantSpec(bits=bits, group_size=args.group_size, **BASES[base]), lora(init, base, args.rank),
                start, calib, unseen)
        for bits in args.bits for base in args.bases for init in args.inits
    ]  # fmt: skip
    reference = Variant(16, "16-bit", "none", QuantSpec(), LoraSpec(), start, calib, unseen)
    for index in range(len(decoder.blocks)):
        began = time.perf_counter()
        decoder.load_block(index)
        block(decoder, index, reference, variants, shared=args.propagate == "dense")
        decoder.drop_block(index)
        print(f"block {index + 1}/{len(decoder.blocks)} {time.perf_counter() - began:.0f} s", flush=True)
    return [v.row(float(sequence_losses(decoder, v.eval, test).mean())) for v in [reference, *variants]]


def lora(init: str, base: str, rank: int) -> LoraSpec:
    if init == "loftq":
        return LoraSpec(init, rank, iterations=LOFTQ_ITERATIONS.get(base, 2))
    kind, _, rounds = init.partition(", ")
    return LoraSpec(kind, rank, rounds=int(rounds.split()[0]) if rounds else 0) if kind == "cloq" else LoraSpec(kind, rank)


def block(decoder: Decoder, index: int, reference: Variant, variants: list[Variant], shared: bool) -> None:
    """One block for all variants: statistics, solves, and everybody's activations one block further."""
    linears = decoder.linears(index)
    weights = {name: decoder.weight(name, module) for name, module in linears.items()}
    groups = shared_inputs(lambda: decoder.run_block(index, reference.calib[0]), linears)
    stats = statistics(decoder, index, reference, linears, [g[0] for g in groups]) if shared else {}
    bases: dict = {}
    for variant in variants:
        for name, module in linears.items():
            set_weight(module, weights[name])
        for group in groups:
            if not shared:
                stats = statistics(decoder, index, variant, linears, group[:1])
            for name in group:
                effective = solve(variant, name, weights[name], *stats[group[0]], bases if shared else {})
                if not shared:
                    set_weight(linears[name], effective)
                variant.effective[name] = effective
        for name, module in linears.items():
            set_weight(module, variant.effective[name])
        variant.eval = forward(decoder, index, variant.eval)
        if not shared:
            variant.calib, variant.unseen = forward(decoder, index, variant.calib), forward(decoder, index, variant.unseen)
        variant.effective = {}
    for name, module in linears.items():
        set_weight(module, weights[name])
    for name in ("calib", "unseen", "eval"):
        setattr(reference, name, forward(decoder, index, getattr(reference, name)))


def statistics(decoder: Decoder, index: int, variant: Variant, linears: dict, names: list[str]) -> dict:
    runs = [[lambda b=b: decoder.run_block(index, b) for b in batches] for batches in (variant.calib, variant.unseen)]
    seen, unseen = (gram_matrices(r, linears, names) for r in runs)
    return {name: (seen[name], unseen[name]) for name in names}


def solve(variant: Variant, name: str, weight: torch.Tensor, stats, unseen, bases: dict) -> torch.Tensor:
    quantizer = quantizers.from_spec(variant.quant)

    def quantize(w, stats):
        if w.data_ptr() != weight.data_ptr():  # not the weight itself, which an initializer may have detached
            return quantizer.quantize(w, stats)
        if not isinstance(quantizer, quantizers.Magr):
            return once((variant.quant, name), lambda: quantizer.quantize(w, stats))
        reduced = once((variant.quant.replace(bits=8), name), lambda: quantizer.reduce(w, stats))  # the same at every width
        return once((variant.quant, name), lambda: quantizer.then.quantize(reduced, stats))

    def once(key, compute):
        """What variants share is computed by the first of them; the others are charged its time."""
        if key in bases:
            variant.seconds += bases[key][1]
        else:
            began = time.perf_counter()
            bases[key] = compute(), time.perf_counter() - began
        return bases[key][0]

    began = time.perf_counter()
    rank = min(variant.lora.rank, *weight.shape)
    quantized, factors = initializers.from_spec(variant.lora, variant.quant.bits).initialize(weight, stats, quantize, rank)
    variant.seconds += time.perf_counter() - began
    dense = quantized.dequantize()
    effective = dense + factors.delta()
    pairs = [(e, g) for g in (stats.gram, unseen.gram) for e in (weight - dense, weight - effective)]
    variant.errors.append(tuple(linalg.relative_error(e, weight, g) for e, g in pairs))
    return effective


def forward(decoder: Decoder, index: int, batches: list[Batch]) -> list[Batch]:
    return [batch.onwards(decoder.run_block(index, batch)) for batch in batches]


def table(rows: list[dict], args: argparse.Namespace) -> str:
    whose = "16-bit model" if args.propagate == "dense" else "compressed prefix"
    head = (
        f"`{Path(args.model).name}`, group {args.group_size}, rank {args.rank}, {args.samples} x {args.seq_len} calibration tokens, "
        f"seed {args.seed}, statistics of the {whose}; perplexity chunks-{args.eval_seq_len}, {args.eval_samples} sequences.\n\n"
    )
    lines = ["| bits | base | factors | perplexity | layer error | held out | solve s |", "|---|---|---|---:|---:|---:|---:|"]
    for r in rows:
        errors = f"{r['error_corrected']:.4f} | {r['heldout_corrected']:.4f}"
        lines.append(f"| {r['bits']} | {r['base']} | {r['init']} | {r['perplexity']:.2f} | {errors} | {r['solve_seconds']:.0f} |")
    return head + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=["rtn", "gptq", "gptq+magr"])
    parser.add_argument("--inits", nargs="+", choices=INITS, default=INITS[:6])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument("--eval-seq-len", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--propagate", choices=("dense", "adapter"), default="dense")
    parser.add_argument("--out", required=True, help="without ending")
    args = parser.parse_args()
    rows = run(args)
    Path(args.out + ".json").write_text(json.dumps({"settings": vars(args), "rows": rows}, indent=1))
    Path(args.out + ".md").write_text(table(rows, args))
    print(table(rows, args))


if __name__ == "__main__":
    main()
