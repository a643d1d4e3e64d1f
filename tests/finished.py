"""A finished run on a tiny model, made without running the pipeline: a folder with the model, and a store with every block in it.

Nothing is calibrated. The weights are quantized to the nearest code and the factors are random, which is all that formats care
for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cloq.models import Decoder, linear_shape, set_weight
from cloq.store import Store
from cloq.types import AnyQuantizedWeight, LayerMetrics, LayerResult, LoraFactors

RANK = 4
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 60

Quantize = Callable[[str, Tensor], AnyQuantizedWeight | None]
"""A layer's full name and dense weight → its quantized weight, or `None` to leave it dense."""


def llama(**changes):
    """No weight is square, and every size divides by 32 but not all by 64."""
    from transformers import LlamaConfig

    settings = {
        "vocab_size": 60, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 64, "tie_word_embeddings": True, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaConfig(**settings | changes)


def gpt2():
    """Conv1D layers with biases, one of them square (the attention's c_proj), so its orientation cannot be guessed."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=60, n_embd=64, n_layer=2, n_head=2, n_positions=64, n_inner=192, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """decoder: of the original. store: with every block finished. results: all layers by full name."""

    decoder: Decoder
    store: Store
    results: dict[str, LayerResult]

    def reference(self, adapter: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The original with the decoded weights in place, and the factors' product added where `adapter`."""
        model = plain(self.decoder.folder, dtype)
        for name, result in self.results.items():
            set_weight(model.get_submodule(name), result.effective_weight(adapter=adapter))
        return model


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The folder through plain transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits.float()


def save_model(config, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random instance of the configuration. Weights are large enough for logits to tell one from another."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def finish(
    config, root: Path, quantize: Quantize, *, dtype: torch.dtype = torch.float32, rank: int | Callable[[str], int] = RANK
) -> Finished:
    """Saves the model in `root/original` and a finished store in `root/out`."""
    decoder = Decoder(save_model(config, root / "original", dtype))
    store, found = Store(root / "out"), {}
    store.begin({"settings": {"lora": {"init": "cloq"}}})
    for index in range(len(decoder.blocks)):
        results = {}
        for name, module in decoder.linears(index).items():
            weight = quantize(name, decoder.weight(name, module))
            if weight is not None:
                results[name] = LayerResult(weight, _factors(linear_shape(module), rank if isinstance(rank, int) else rank(name)), _METRICS)
        store.write(index, _with_ranks(results))
        found |= store.read(index)
    return Finished(decoder, store, found)


_METRICS = LayerMetrics(0.5, 0.25, None, None, 64, 0.0, 0.0, RANK, 2.5)


def _factors(shape: tuple[int, int], rank: int) -> LoraFactors:
    return LoraFactors(torch.randn(rank, shape[1]) * 0.05, torch.randn(shape[0], rank) * 0.05)


def _with_ranks(results: dict[str, LayerResult]) -> dict[str, LayerResult]:
    import dataclasses

    return {
        name: dataclasses.replace(result, metrics=dataclasses.replace(result.metrics, rank=result.factors.rank))
        for name, result in results.items()
    }


def edit_config(folder: Path, change: Callable[[dict], None], file: str = "config.json") -> None:
    """Changes a JSON file of a folder in place."""
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))
