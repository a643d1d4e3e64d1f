"""AutoRound's codes for given token sequences; run by the Python of an environment that has AutoRound, and nothing of cloq.

    PYTHON scripts/quality/autoround_codes.py MODEL TOKENS.safetensors OUT --bits 2 --group-size 64 --iters 200

Writes a plain GPTQ folder, OUT/model, and OUT/cost.json: processor seconds and peak MiB from the process's start to the written folder.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path


def main() -> None:
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out", type=Path)
    for name in ("--bits", "--group-size", "--iters"):
        parser.add_argument(name, type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens = load_file(args.tokens)["tokens"]
    loader = torch.utils.data.DataLoader(tokens, batch_size=8)
    scheme = {"bits": args.bits, "group_size": args.group_size or -1, "sym": False, "data_type": "int"}
    made = AutoRound(
        args.model, AutoTokenizer.from_pretrained(args.model), scheme=scheme, dataset=loader, iters=args.iters, seqlen=tokens.shape[1],
        nsamples=len(tokens), batch_size=8, enable_torch_compile=False, device_map="cpu",
    )  # fmt: skip
    made.quantize_and_save(str(args.out / "written"), format="auto_gptq")
    written = next((args.out / "written").rglob("config.json")).parent  # AutoRound makes a folder of its own in there
    shutil.move(str(written), str(args.out / "model"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    (args.out / "cost.json").write_text(json.dumps({"processor s": time.process_time(), "peak MiB": peak}))


if __name__ == "__main__":
    main()
