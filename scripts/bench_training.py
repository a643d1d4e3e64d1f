"""Memory and time of LoRA training on a packed base, beside NF4 (QLoRA) and a dense model: peak memory and seconds per step.

    cloq quantize MODEL --bits 2 --out RUN
    python scripts/bench_training.py MODEL RUN

Every case is a process of its own, whose largest resident set counts (on a GPU, torch's own peak). All cases have
the same rank, targets, batch, sequence length and optimizer; NF4 and dense start from zero factors, as QLoRA and LoRA do.

The bound is what such a training cannot do without: the process before it loads the model, the stored weights, 16 bytes for each trained
parameter (value, gradient, two moments), and what autograd keeps for the backward pass, which is measured; for a packed base without any
decoded weight, which is the claim to be tested. The transient of one layer's decoded weight and the loss's float32 logits come on top.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = {
    "packed": "packed base, CLoQ factors",
    "packed-kept": "the same, decoded weights kept (plain PEFT)",
    "nf4": "NF4 base, zero factors (QLoRA)",
    "dense": "dense model, zero factors (LoRA)",
}


RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""For glibc: a mapping of its own for everything large, gone when it is freed. Otherwise gaps in the heap count as used."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the 16-bit model")
    parser.add_argument("run", type=Path, help="a finished cloq run of it, GPTQ format")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in all cases")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--return-freed", action="store_true", help="make glibc give back at once what is freed: slower, less memory")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments)
        return
    print(
        f"{arguments.batch} × {arguments.seq_len} tokens, {arguments.precision}, checkpointing {'on' if arguments.checkpointing else 'off'}"
    )
    print(f"{'':44} {'s/step':>7} {'weights':>8} {'kept':>8} {'bound':>8} {'peak':>8} {'peak/bound':>10}")
    for case in arguments.cases:
        found = in_child(case)
        row = [found["seconds"], *(found[key] / 2**20 for key in ("weights", "kept", "bound", "peak")), found["peak"] / found["bound"]]
        print(f"{CASES[case]:44} {row[0]:7.2f} {row[1]:8.0f} {row[2]:8.0f} {row[3]:8.0f} {row[4]:8.0f} {row[5]:10.2f}", flush=True)
    print("memory in MiB; kept: by autograd from the forward to the backward pass")


def in_child(case: str) -> dict:
    """What one case, run with this command's own arguments, found."""
    with tempfile.NamedTemporaryFile("r") as answer:
        environment = os.environ | {"BENCH_ANSWER": answer.name, "TORCHDYNAMO_DISABLE": "1"}
        environment |= RETURN_FREED if "--return-freed" in sys.argv else {}
        process = subprocess.Popen([sys.executable, *sys.argv, "--child", case], env=environment, stdout=subprocess.DEVNULL)
        if process.wait():
            raise SystemExit(f"{case} ended with {process.returncode}")
        return json.loads(answer.read())


def measure(arguments: argparse.Namespace) -> None:
    import torch

    from cloq.models import quiet_libraries
    from cloq.streaming.memory import peak_resident

    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.precision)
    import cloq.training.run  # noqa: F401 - what every case imports sooner or later

    for library in ("gptqmodel", "bitsandbytes"):
        __import__(library)
    before = 0 if device.type == "cuda" else resident()
    model = load(arguments, dtype).to(device).train()
    model.config.use_cache = False
    if arguments.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(1, 1000, (arguments.batch, arguments.seq_len), generator=torch.Generator().manual_seed(0)).to(device)
    kept = kept_bytes(model, ids)
    seconds = []
    for _ in range(arguments.steps):
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    weights = sum(t.nbytes for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()] if not t.requires_grad}.values())
    values = sum(p.numel() for p in trained)
    found = {
        "seconds": statistics.median(seconds[1:] or seconds),
        "weights": weights,
        "kept": kept,
        "bound": before + weights + 16 * values + kept,
        "peak": torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_resident(),
    }
    Path(os.environ["BENCH_ANSWER"]).write_text(json.dumps(found))


def load(arguments: argparse.Namespace, dtype):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import cloq

    if arguments.child == "packed":
        return cloq.load(arguments.run, trainable=True, dtype=dtype)
    if arguments.child == "packed-kept":
        base = AutoModelForCausalLM.from_pretrained(arguments.run / "model", dtype=dtype)
        return PeftModel.from_pretrained(base, arguments.run / "adapter", is_trainable=True)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    quantization = {"quantization_config": nf4} if arguments.child == "nf4" else {}
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, **quantization)
    stated = json.loads((arguments.run / "adapter/adapter_config.json").read_text())
    torch.manual_seed(0)
    return get_peft_model(
        base, LoraConfig(r=stated["r"], lora_alpha=stated["r"], target_modules=stated["target_modules"], task_type="CAUSAL_LM")
    )


def kept_bytes(model, ids) -> int:
    """Of tensors that autograd keeps for the backward pass, each storage once, parameters not counted."""
    import torch

    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    return sum(kept.values())


def resident() -> int:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
