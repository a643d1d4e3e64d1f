"""Fine-tune a finished run with TRL:  python train_trl.py RUN DATA.jsonl   (rows with a column "text", or "messages" for a chat model)"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import cloq

out, data = sys.argv[1:]
arguments = SFTConfig(
    f"{out}/checkpoints",
    num_train_epochs=1,
    per_device_train_batch_size=4,
    learning_rate=2e-4,
    max_length=512,
    bf16=torch.cuda.is_available(),  # TRL's default is true, which a CPU refuses
    report_to="none",
)
model = cloq.load(out, trainable=True)
rows = load_dataset("json", data_files=data, split="train")
tokenizer = AutoTokenizer.from_pretrained(f"{out}/model")
SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()  # no peft_config: it would start another adapter
model.save_pretrained(f"{out}/trained")
