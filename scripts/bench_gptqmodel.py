"""cloq against GPTQModel's own quantization and EoRA adapter: same model, bits, group size and tokens, each in a process of its own.

    python scripts/bench_gptqmodel.py MODEL --calib train.txt --eval test.txt --bits 2

Prints perplexity (all bases read by the same reader, exactly as they decode), wall and processor seconds from start of process to written
folder, and peak resident memory of the process. GPTQModel gets the very token sequences that cloq draws.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHOSEN = {"heldout": 0.125}
"""For runs whose correction is chosen on held-out tokens, which nothing is fitted to."""

TOOLS = {
    "gptqmodel": {"adapter": False},
    "gptqmodel+eora": {"adapter": True},
    "cloq, base alone": {"init": "zero", "propagate": "quantized", **CHOSEN},
    "cloq, base alone, no correction": {"init": "zero", "propagate": "quantized", "correction": 0.0},
    "cloq, base alone, range": {"init": "zero", "propagate": "quantized", "correction": 0.0, "search": False},
    "cloq, base alone, range, ordered": {
        "init": "zero",
        "propagate": "quantized",
        "correction": 0.0,
        "search": False,
        "damping": 0.05,
        "act_order": True,
        "static_groups": True,
    },
    "cloq": CHOSEN,
    "cloq, fast": {"effort": "fast"},
    "cloq, as published": {"effort": "published"},
}
"""What is run: GPTQModel without and with its own EoRA adapter, cloq for a base alone and as it is meant, with scales from the range
(as GPTQModel has them) or searched (cloq's default). `ordered` comes nearest to GPTQModel's defaults: damping 0.05, and columns by their
activations with the groups kept as they are."""

PEAK = "peak.txt"

ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"}
"""Of every child. Workers: GPTQModel ends with an error where it would choose one by itself, as it does on two cores."""


def quantize_with_gptqmodel(args: argparse.Namespace, out: Path, adapter: bool) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.adapter.adapter import Lora

    from cloq.calibration import calibration_tokens
    from cloq.models import load_tokenizer
    from cloq.specs import CalibSpec

    _finish_one_module_at_a_time()
    spec = CalibSpec(args.calib, args.samples, args.seq_len, seed=args.seed)
    tokens = calibration_tokens(spec, load_tokenizer(Path(args.model))).calibration
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    eora = {"adapter": Lora(path=str(out / "adapter"), rank=args.rank)} if adapter else {}
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size or -1, sym=False, desc_act=False, format="gptq_v2", **eora)
    model = GPTQModel.load(args.model, config)
    model.quantize(rows, batch_size=1)
    model.save(str(out / "model"))


def _finish_one_module_at_a_time() -> None:
    """GPTQModel 7.6.0 with EoRA comes to a standstill where two of its workers finish modules of one parent at the same moment: one holds
    the processor's lock and waits for the parent's (`GPTQProcessor.submodule_finalize`), the other the parent's and waits for the
    processor's (`pack_module`). One worker for all of them cannot."""
    import gptqmodel

    gptqmodel.DEVICE_THREAD_POOL.submit = gptqmodel.DEVICE_THREAD_POOL.submit_serial


def quantize_with_cloq(args: argparse.Namespace, out: Path, **settings) -> None:
    import cloq

    cloq.quantize(
        args.model, out=out, bits=args.bits, group_size=args.group_size or None, rank=args.rank, calib=args.calib,
        calib_samples=args.samples, seq_len=args.seq_len, seed=args.seed, **{"heldout": 0.0} | settings,
    )  # fmt: skip


def in_child(name: str, out: Path) -> dict[str, float]:
    """Seconds and peak memory of one quantization in a fresh process."""
    began = time.perf_counter()
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name, "--out", str(out)]
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} failed with status {status}")
    spent = {"seconds": time.perf_counter() - began, "processor s": usage.ru_utime + usage.ru_stime}
    return spent | {"peak MiB": int((out / PEAK).read_text()) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64, help="0 for one group per output channel")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration sequences")
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument("--json", help="also write the rows here")
    parser.add_argument("--child", choices=list(TOOLS), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        from cloq.streaming.memory import peak_resident

        work = quantize_with_gptqmodel if args.child.startswith("gptqmodel") else quantize_with_cloq
        work(args, Path(args.out), **TOOLS[args.child])
        (Path(args.out) / PEAK).write_text(str(peak_resident()))
        return

    from cloq.export.peft import AdapterFolder
    from cloq.export.read import QuantizedFolder
    from cloq.models import load_tokenizer
    from cloq.use.evaluate import evaluation_tokens, perplexity

    tokens = evaluation_tokens(Path(args.eval).read_text("utf8"), load_tokenizer(Path(args.model)), 1024, args.eval_samples)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for number, name in enumerate(args.tools):
            out = Path(work) / str(number)
            cost = in_child(name, out)
            decoder = QuantizedFolder(out / "model").decoder("cpu")
            row = {"tool": name, "base perplexity": perplexity(decoder, tokens).value, **cost}
            adapter = next(iter([*out.rglob("adapter_config.json")]), None)
            if adapter is not None and "base alone" not in name:
                row["with adapter"] = perplexity(decoder, tokens, set_weights=AdapterFolder(adapter.parent).added_to(decoder)).value
            rows.append(row)
            print(row, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
