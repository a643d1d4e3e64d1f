"""What an initialization is worth after fine-tuning: every base with every kind of factors, trained alike, in one table with figures.

    python scripts/bench_quality.py MODEL --train train.txt --valid valid.txt --test test.txt --bits 2 --seeds 0 1 2 --out results

Every cell (bits, method, learning rate, seed) is one training run, kept in OUT/cells as it ends; the same command continues where it
stopped, and makes OUT/table.md, OUT/results.json and OUT/curves.png of what is there.

**What is equal.** All methods of a width that fit factors to a given base get the same base: GPTQ with scales searched, calibrated through
its own compressed prefix. `loftq` alternates and so has a base of its own, as has `cloq-run`, which is what `cloq quantize` makes: later
layers quantized on the outputs of `Q + BA`. Rank, steps, tokens and their order (by seed), optimizer and schedule are the same.

**What is chosen.** The learning rate, per method, from the same grid, by the perplexity on the validation text after training, mean over
seeds; the table shows the test text at that rate.

Bases are decoded once into float32 and trained so: the same function as the packed base up to the kernels' rounding, and faster on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

BITS_16 = 16


@dataclass(frozen=True)
class Method:
    """base: `dense`, `nf4`, `gptq` (shared by all that name it), or `own`. init, settings: of the run that makes the factors.
    balanced: share the singular values of the product between the factors before training; the product stays."""

    base: str
    init: str = "zero"
    settings: tuple[tuple[str, object], ...] = ()
    balanced: bool = False

    def widths(self, bits: list[int]) -> list[int]:
        return {"dense": [BITS_16], "nf4": [4]}.get(self.base, bits)


METHODS = {
    "lora-16": Method("dense"),
    "qlora-nf4": Method("nf4"),
    "zero": Method("gptq", "zero"),
    "svd": Method("gptq", "svd"),
    "qera": Method("gptq", "qera"),
    "eora": Method("gptq", "eora"),
    "cloq": Method("gptq", "cloq"),
    "cloq-balanced": Method("gptq", "cloq", balanced=True),
    "loftq": Method("own", "loftq", (("quantizer", "rtn"),)),
    "cloq-run": Method("own", "cloq"),
}
"""`loftq` alternates on round-to-nearest, as published, with scales searched like everybody's."""


@dataclass(frozen=True)
class Cell:
    """One training run."""

    bits: int
    method: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.bits}-{self.method}-lr{self.lr:g}-seed{self.seed}"


# -- bases and factors: ordinary runs of cloq ------------------------------------------------------------------------------


def run_folder(args: argparse.Namespace, bits: int, method: Method) -> Path | None:
    """The finished run of base and factors; made or continued if it isn't there. `None` for the 16-bit model."""
    import cloq
    from cloq.api import run
    from cloq.specs import run_spec

    calibration = {"calib": args.calib or args.train, "calib_samples": args.calib_samples, "seq_len": args.calib_len, "rank": args.rank}
    runs = Path(args.out) / "runs"
    extra = dict(method.settings)
    if method.base == "dense":
        return None
    if method.base == "nf4":
        return cloq.quantize(args.model, out=runs / "4-nf4", bits=4, quantizer="nf4", init="zero", **calibration).out
    common = {"bits": bits, "group_size": args.group_size, **calibration}
    tag = "-".join([method.init, *(str(value) for value in extra.values())])
    if method.base == "own":
        return cloq.quantize(args.model, out=runs / f"{bits}-own-{tag}", init=method.init, **common, **extra).out
    base = cloq.quantize(args.model, out=runs / f"{bits}-gptq", init="zero", propagate="quantized", **common)
    if method.init == "zero":
        return base.out
    spec = run_spec(model=args.model, quantized=str(base.base), init=method.init, **common, **extra)
    return run(spec, runs / f"{bits}-gptq-{tag}").out


def trainable_model(args: argparse.Namespace, folder: Path | None, balanced: bool) -> nn.Module:
    """The base in float32 with the run's adapter, or with LoRA's usual one on the 16-bit model, as a `peft.PeftModel`."""
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from cloq import linalg
    from cloq.api import RUN_FILE, read_run_file
    from cloq.export.read import QuantizedFolder
    from cloq.models import Decoder, locate, set_weight

    model = AutoModelForCausalLM.from_pretrained(locate(args.model), dtype=torch.float32)
    if folder is None:
        names = sorted({name.rsplit(".", 1)[-1] for name in Decoder(locate(args.model)).all_linears()})
        torch.manual_seed(0)  # of LoRA's random A, which the runs have fixed in their files
        config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=names, lora_dropout=args.dropout, task_type="CAUSAL_LM")
        return get_peft_model(model, config)
    given = read_run_file(folder / RUN_FILE).quantized
    base = QuantizedFolder(Path(given) if given else folder / "model")
    for name in base.names:
        set_weight(model.get_submodule(name), base.weight(name).dequantize())
    config = PeftConfig.from_pretrained(folder / "adapter")
    config.lora_dropout = args.dropout
    model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True, config=config)
    for module in model.modules() if balanced else ():
        if hasattr(module, "lora_A"):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            B.data, A.data = linalg.balance(B.data, A.data)
    return model


# -- training ---------------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, cell: Cell, model: nn.Module, texts: dict[str, Tensor]) -> dict:
    """AdamW on the factors alone, linear warm-up and cosine decay; the same sequences in the same order for every method of a seed."""
    from transformers import get_cosine_schedule_with_warmup

    torch.manual_seed(cell.seed)
    order = torch.randperm(len(texts["train"]), generator=torch.Generator().manual_seed(cell.seed))
    needed = args.steps * args.batch
    order = order.repeat(-(-needed // len(order)))[:needed].reshape(args.steps, args.batch)
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=cell.lr, weight_decay=args.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(0.03 * args.steps)), args.steps)
    found = {"losses": [], "during": {}, "seconds": 0.0, "factors": sum(p.numel() for p in factors)}
    found["before"] = {name: loss(model, texts[name]) for name in ("valid", "test")}
    for step in range(args.steps):
        began = time.perf_counter()
        model.train()
        rows = texts["train"][order[step]]
        value = model(input_ids=rows, labels=rows).loss
        value.backward()
        nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        found["seconds"] += time.perf_counter() - began
        found["losses"].append(value.item())
        if not math.isfinite(value.item()):
            return found | {"diverged": step + 1, "after": {name: float("nan") for name in ("valid", "test")}}
        if args.eval_every and (step + 1) % args.eval_every == 0 and step + 1 < args.steps:
            found["during"][step + 1] = loss(model, texts["valid"])
    return found | {"after": {name: loss(model, texts[name]) for name in ("valid", "test")}}


@torch.no_grad()
def loss(model: nn.Module, rows: Tensor) -> float:
    """Mean negative log-likelihood in nats on `(sequences, length)`, every token but a sequence's first predicted."""
    model.eval()
    return sum(float(model(input_ids=row[None], labels=row[None]).loss) for row in rows) / len(rows)


def read_texts(args: argparse.Namespace) -> dict[str, Tensor]:
    from cloq.evaluate import evaluation_tokens
    from cloq.models import load_tokenizer, locate

    tokenizer = load_tokenizer(locate(args.model))

    def rows(path: str, length: int, most: int | None) -> Tensor:
        return evaluation_tokens(Path(path).read_text("utf8"), tokenizer, length, most)

    return {
        "train": rows(args.train, args.seq_len, None),
        "valid": rows(args.valid, args.eval_len, args.valid_samples),
        "test": rows(args.test, args.eval_len, args.test_samples),
    }


# -- the table --------------------------------------------------------------------------------------------------------------


def summarize(args: argparse.Namespace, results: dict[Cell, dict]) -> list[dict]:
    """One row per (bits, method) at its best learning rate; perplexities as exp of the mean loss over seeds, with the standard error."""
    rows = []
    for bits, method in dict.fromkeys((cell.bits, cell.method) for cell in results):
        mine = {cell: r for cell, r in results.items() if (cell.bits, cell.method) == (bits, method)}
        rates = {cell.lr for cell in mine}
        best = min(rates, key=lambda lr: _mean([_finite(r["after"]["valid"]) for c, r in mine.items() if c.lr == lr]))
        chosen = {cell.seed: r for cell, r in mine.items() if cell.lr == best}
        after = {seed: r["after"]["test"] for seed, r in sorted(chosen.items())}
        rows.append(
            {
                "bits": bits, "method": method, "lr": best, "seeds": len(chosen), "after": after,
                "before": _mean([r["before"]["test"] for r in chosen.values()]),
                "loss": _mean(list(after.values())), "stderr": _stderr(list(after.values())),
                "seconds per step": _mean([r["seconds"] / len(r["losses"]) for r in chosen.values()]),
                "curve": {step: _mean([r["during"][step] for r in chosen.values() if step in r["during"]])
                          for step in sorted(set().union(*(r["during"] for r in chosen.values())), key=int)},
                "valid": (_mean([r["before"]["valid"] for r in chosen.values()]), _mean([r["after"]["valid"] for r in chosen.values()])),
            }
        )  # fmt: skip
    return rows


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _finite(value: float) -> float:
    return value if math.isfinite(value) else float("inf")


def _stderr(values: list[float]) -> float:
    if len(values) < 2:
        return float("nan")
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def table(args: argparse.Namespace, rows: list[dict]) -> str:
    """Perplexity before and after, the share of the gap from `zero` to 16-bit LoRA that is closed, the paired difference from `cloq`."""
    head = (
        f"`{Path(args.model).name}`, group {args.group_size}, rank {args.rank}; {args.steps} steps of {args.batch} x {args.seq_len} "
        f"tokens, dropout {args.dropout:g}, weight decay {args.weight_decay:g}; test perplexity chunks-{args.eval_len} on "
        f"{args.test_samples} sequences; ± is the standard error over seeds, in per cent of the perplexity.\n\n"
    )
    lines = [
        "| bits | method | lr | seeds | before | after | ± % | gap closed | loss − cloq's, paired |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    ceiling = next((r["loss"] for r in rows if r["method"] == "lora-16"), None)
    for row in rows:
        zero, cloq = (next((r for r in rows if r["bits"] == row["bits"] and r["method"] == name), None) for name in ("zero", "cloq"))
        closed = f"{(zero['loss'] - row['loss']) / (zero['loss'] - ceiling):.0%}" if zero and ceiling is not None else ""
        before, after = math.exp(row["before"]), math.exp(row["loss"])
        lines.append(
            f"| {row['bits']} | {row['method']} | {row['lr']:g} | {row['seeds']} | {before:,.2f} | {after:,.2f} | "
            f"{100 * row['stderr']:.2f} | {closed} | {_paired(row, cloq)} |"
        )
    return head + "\n".join(lines) + "\n"


def _paired(row: dict, other: dict | None) -> str:
    if other is None or other is row:
        return ""
    common = sorted(set(row["after"]) & set(other["after"]))
    differences = [row["after"][seed] - other["after"][seed] for seed in common]
    return f"{_mean(differences):+.4f} ± {_stderr(differences):.4f}" if differences else ""


def figure(args: argparse.Namespace, rows: list[dict], path: Path) -> None:
    """Validation perplexity against the training step, a panel per width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    widths = sorted({row["bits"] for row in rows if row["bits"] != BITS_16}) or [BITS_16]
    drawn, axes = plt.subplots(1, len(widths), figsize=(5.5 * len(widths), 4), squeeze=False, layout="constrained")
    for axis, bits in zip(axes[0], widths, strict=True):
        for row in rows:
            if row["bits"] in (bits, BITS_16):
                points = {0: row["valid"][0], **{int(k): v for k, v in row["curve"].items()}, args.steps: row["valid"][1]}
                axis.plot(list(points), [math.exp(v) for v in points.values()], label=row["method"], lw=2 if "cloq" in row["method"] else 1)
        axis.set(title=f"{bits} bits", xlabel="step", ylabel="validation perplexity", yscale="log")
        axis.legend(fontsize=8)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True, help="text to fine-tune on")
    parser.add_argument("--valid", required=True, help="text that chooses the learning rate")
    parser.add_argument("--test", required=True, help="text of the table")
    parser.add_argument("--calib", help="calibration text; the training text if not given")
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-4])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--eval-len", type=int, default=512)
    parser.add_argument("--eval-every", type=int, default=20, help="steps between validations; 0 for none")
    parser.add_argument("--valid-samples", type=int, default=4)
    parser.add_argument("--test-samples", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calib-samples", type=int, default=32)
    parser.add_argument("--calib-len", type=int, default=512)
    parser.add_argument("--out", required=True, help="folder")
    args = parser.parse_args()
    out = Path(args.out)
    (out / "cells").mkdir(parents=True, exist_ok=True)
    protocol = {k: v for k, v in vars(args).items() if k not in ("bits", "methods", "seeds", "lrs", "out")}
    texts = read_texts(args)
    results: dict[Cell, dict] = {}
    grid = itertools.product(args.seeds, args.lrs, ((bits, name) for name in args.methods for bits in METHODS[name].widths(args.bits)))
    for seed, lr, (bits, name) in grid:
        cell = Cell(bits, name, lr, seed)
        path = out / "cells" / f"{cell.name}.json"
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["protocol"] != protocol:
                raise SystemExit(f"{path} was made with other settings ({kept['protocol']}); use another --out")
            results[cell] = kept["result"]
            continue
        began = time.perf_counter()
        model = trainable_model(args, run_folder(args, bits, METHODS[name]), METHODS[name].balanced)
        results[cell] = train(args, cell, model, texts)
        path.write_text(json.dumps({"cell": asdict(cell), "protocol": protocol, "result": results[cell]}, indent=1))
        before, after = (math.exp(results[cell][when]["test"]) for when in ("before", "after"))
        print(f"{cell.name}: {before:,.1f} -> {after:,.2f}, {time.perf_counter() - began:.0f} s", flush=True)
        del model
    rows = summarize(args, results)
    (out / "results.json").write_text(json.dumps({"settings": vars(args), "rows": rows}, indent=1))
    (out / "table.md").write_text(table(args, rows))
    figure(args, rows, out / "curves.png")
    print(table(args, rows))


if __name__ == "__main__":
    main()
