"""What every trial starts from: a tiny model in three shards, a text, and one undisturbed run."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from faults.trial import Process, command

VOCABULARY = 260
CONFIG = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 128, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 96, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SETTINGS = {"bits": 2, "group-size": 32, "rank": 4, "calib-samples": 4, "seq-len": 32, "device": "cpu"}
BLOCKS = CONFIG["num_hidden_layers"]


@dataclass(frozen=True)
class Bench:
    """work: everything lies below it. model, text: what runs read. finished: the undisturbed run. expected: its digest. seconds: that
    it took."""

    work: Path
    model: Path
    text: Path
    finished: Path
    expected: dict[str, str]
    seconds: float

    def quantize(self, out: Path, model: Path | None = None):
        """The command that makes `finished`, elsewhere."""
        return command(*_argv(model or self.model, self.text), "--out", out)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder that vanishes afterwards."""
        folder = Path(tempfile.mkdtemp(dir=self.work))
        folder.chmod(0o755)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def _argv(model: Path, text: Path) -> list[object]:
    flags = [part for name, value in SETTINGS.items() for part in (f"--{name}", value)]
    return ["quantize", model, "--calib", text, *flags, "--quiet"]


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """Makes the model, the text and the run in a new folder, which vanishes afterwards."""
    from bench_resume import digest

    work = Path(tempfile.mkdtemp(prefix="cloq-torture-"))
    work.chmod(0o755)  # a trial runs as another user
    try:
        model, text, out = work / "model", work / "text.txt", work / "finished"
        save_model(model)
        save_text(text)
        started = time.perf_counter()
        ended = Process(command(*_argv(model, text), "--out", out)).ended()
        if ended.code != 0:
            raise RuntimeError(f"the undisturbed run failed: {ended.said}")
        yield Bench(work, model, text, out, digest(out), time.perf_counter() - started)
    finally:
        shutil.rmtree(work)


def save_model(folder: Path) -> None:
    """A Llama with random weights in three shards, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **CONFIG), dtype=torch.float32)
        for tensor in model.parameters():
            if tensor.ndim > 1:
                torch.nn.init.normal_(tensor, std=2.0 * tensor.shape[-1] ** -0.5)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with contextlib.redirect_stderr(io.StringIO()):  # a loading bar that has no switch
        model.save_pretrained(folder, max_shard_size=size // 3 + 1)
    alphabet = {"<|end|>": 0} | {letter: i + 1 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>").save_pretrained(folder)


def save_text(path: Path) -> None:
    """Sentences that repeat each other, but for the numbers."""
    path.write_text("".join(f"Line {n} says that {n * n} is the square of {n}, and nothing else. " for n in range(400)))
