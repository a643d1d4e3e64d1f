"""Calibration text that the model writes itself: no data needed, and by construction in the model's own distribution."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


@torch.no_grad()
def sample_text(folder: Path, sequences: int, seq_len: int, seed: int, device: str = "cpu", batch: int = 16) -> Tensor:
    """`(sequences, seq_len)` int64, sampled at temperature 1 from the model in `folder`, each from its own beginning-of-text token.

    An end-of-text token does not end a sequence; what follows it is the model's next document. The whole model is in memory for this, in
    its stored precision: sampling block by block from disk would read every weight once per token.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if device != "cpu" else torch.float32).to(device).eval()
    model.generation_config.eos_token_id = None
    start = next(t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if t is not None)
    rows = []
    with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        for done in range(0, sequences, batch):
            prompt = torch.full((min(batch, sequences - done), 1), start, device=device)
            rows.append(
                model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    min_new_tokens=seq_len, max_new_tokens=seq_len, pad_token_id=start,
                )[:, 1:].cpu()
            )  # fmt: skip
    return torch.cat(rows)
