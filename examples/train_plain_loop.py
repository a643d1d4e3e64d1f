"""Fine-tune a finished run with a loop of your own:  python train_plain_loop.py RUN DATA.jsonl   (rows with a column "text")"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

import cloq

out, data = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(f"{out}/model")
model = cloq.load(out, trainable=True).train()
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
for line in Path(data).read_text("utf8").splitlines():
    text = json.loads(line)["text"] + tokenizer.eos_token
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512).input_ids.to(model.device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {loss.item():.3f}")
model.save_pretrained(f"{out}/trained")
