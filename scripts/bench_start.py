"""What dropout and weight decay do to a start, before any training: perplexity with a share of the factors' inputs dropped, and with
their product shrunk.

    python scripts/bench_start.py MODEL RUN --eval test.txt --dropout 0.05 0.1 --shrunk 0.99 0.97 0.9

RUN is a finished `cloq quantize` of MODEL. In ordinary LoRA neither does anything before the first step: the factors' product is zero.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn


def main() -> None:
    import cloq
    from cloq.models import load_tokenizer, quiet_libraries
    from cloq.use.evaluate import evaluation_tokens

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("run")
    parser.add_argument("--eval", required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--shrunk", type=float, nargs="+", default=[0.99, 0.97, 0.9])
    parser.add_argument("--json", help="also write the numbers here")
    args = parser.parse_args()
    quiet_libraries()
    model = cloq.load(args.run, trainable=True, dtype=torch.float32)
    rows = evaluation_tokens(Path(args.eval).read_text("utf8"), load_tokenizer(Path(args.model)), args.seq_len, args.samples)
    found = {"as it is": perplexity(model, rows)}
    for share in args.dropout:
        found[f"dropout {share:g}"] = perplexity(model, rows, dropout=share)
    for factor in args.shrunk:
        found[f"{factor:g} BA"] = perplexity(model, rows, factor=factor)
    print("\n".join(f"{name:>14}  {value:,.2f}" for name, value in found.items()))
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "perplexity": found}, indent=1))


@torch.no_grad()
def perplexity(model: nn.Module, rows: torch.Tensor, dropout: float = 0.0, factor: float = 1.0) -> float:
    """Of the model in training mode where something is dropped, with the same random numbers every time."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    name = model.active_adapter
    for layer in layers:
        layer.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()
        layer.scaling[name] *= factor
    model.train(dropout > 0)
    torch.manual_seed(0)
    losses = [model(input_ids=row[None], labels=row[None]).loss.double() for row in rows]
    for layer in layers:
        layer.scaling[name] /= factor
    return float(torch.stack(losses).mean().exp())


if __name__ == "__main__":
    main()
