"""Fine-tune a finished run with transformers' Trainer:  python train_trainer.py RUN DATA.jsonl   (rows with a column "text")"""

import sys

from datasets import load_dataset
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import cloq

out, data = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(f"{out}/model")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def tokens(row):
    ids = tokenizer(row["text"] + tokenizer.eos_token, truncation=True, max_length=512).input_ids
    return {"input_ids": ids, "labels": ids}


rows = load_dataset("json", data_files=data, split="train").map(tokens)
model = cloq.load(out, trainable=True)  # the run's factors, with gradients: no LoraConfig, no get_peft_model
arguments = TrainingArguments(
    f"{out}/checkpoints",
    num_train_epochs=1,
    per_device_train_batch_size=4,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    report_to="none",
)
Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)).train()
model.save_pretrained(f"{out}/trained")  # the factors alone
