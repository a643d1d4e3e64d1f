"""A finished run on a tiny model, made without running the pipeline: a folder with the model, and a store with every block in it.

Nothing is calibrated. The weights are quantized to the nearest code and the factors are random, which is all that formats care for.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cloq.export import FORMATS, write_adapter, write_model
from cloq.models import Decoder, linear_shape, set_weight
from cloq.streaming.store import Store
from cloq.types import AnyQuantizedWeight, LayerMetrics, LayerResult, LoraFactors
from tests.tiny import load_plain, save_tiny

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # GPTQModel would compile its kernel, for which a C++ compiler is needed

RANK = 4
TOKENS = torch.randint(1, 250, (2, 12), generator=torch.Generator().manual_seed(0))

Quantize = Callable[[str, Tensor], AnyQuantizedWeight | None]
"""A layer's full name and dense weight → its quantized weight, or `None` to leave it dense."""


def needs(*libraries: str):
    """Skips a test where a library is missing."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


@dataclass(frozen=True)
class Finished:
    """decoder: of the original. store: with every block finished. results: all layers by full name."""

    decoder: Decoder
    store: Store
    results: dict[str, LayerResult]

    def export(self, form: str, **settings: Any) -> Path:
        """Written the first time in the place of the run's base, later beside it."""
        target = self.store.out / ("model" if not (self.store.out / "model").exists() else f"model-{form}")
        return write_model(self.decoder, self.store, FORMATS[form](**settings), target)

    def adapter(self, base: Path) -> Path:
        return write_adapter(self.store, str(base.resolve()), self.decoder.all_linears(), self.store.out / "adapter")

    def reference(self, adapter: bool = False, precision: torch.dtype = torch.float32) -> nn.Module:
        """The original in float32 with the decoded weights in place, rounded to `precision` (of GPTQ's and compressed-tensors' scales,
        in which their libraries multiply), and the factors' product added where `adapter`."""
        model = load_plain(self.decoder.folder)
        for name, result in self.results.items():
            weight = result.weight.dequantize().to(precision).float()
            self._put(model, name, weight + result.factors.delta() if adapter else weight)
        return model

    def _put(self, model: nn.Module, name: str, weight: Tensor) -> None:
        layer = self.decoder.expert_layers.get(name)
        if layer is None:
            set_weight(model.get_submodule(name), weight)
            return
        slot = self.decoder.model.get_submodule(layer.experts).slots[name.removeprefix(f"{layer.experts}.")]
        slot.of(model.get_parameter(f"{layer.experts}.{slot.leaf}").detach()).copy_(weight)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits.float()


def streamed_logits(decoder: Decoder) -> Tensor:
    """Block by block, as a run does it."""
    batches = decoder.enter(TOKENS, 1 << 20)
    for index in range(len(decoder.blocks)):
        decoder.load_block(index)
        batches = [dataclasses.replace(batch, hidden=decoder.run_block(index, batch)) for batch in batches]
        decoder.drop_block(index)
    with decoder.outer():
        return decoder.leave(batches[0].hidden, TOKENS).float()


def finish(
    family: str, root: Path, quantize: Quantize, *, dtype: torch.dtype = torch.float32, rank: int | Callable[[str], int] = RANK,
    **config: Any,
) -> Finished:  # fmt: skip
    """Saves a tiny model of the family with two blocks in `root/original`, and a finished store in `root/out`."""
    blocks = {"n_layer": 2} if family.startswith(("gpt2", "gpt_bigcode")) else {"num_hidden_layers": 2}
    decoder = Decoder(save_tiny(family, root / "original", dtype=dtype, **blocks | config))
    store, found = Store(root / "out"), {}
    store.begin({"settings": {"lora": {"init": "cloq"}}})
    for index in range(len(decoder.blocks)):
        results = {}
        for name, module in decoder.linears(index).items():
            weight = quantize(name, decoder.weight(name, module))
            if weight is not None:
                results[name] = _result(weight, linear_shape(module), rank if isinstance(rank, int) else rank(name))
        store.write(index, results)
        found |= store.read(index)
    return Finished(decoder, store, found)


def _result(weight: AnyQuantizedWeight, shape: tuple[int, int], rank: int) -> LayerResult:
    out, columns = shape
    generator = torch.Generator().manual_seed(out * columns + rank)
    factors = LoraFactors(torch.randn(rank, columns, generator=generator) * 0.1, torch.randn(out, rank, generator=generator) * 0.1)
    return LayerResult(weight, factors, LayerMetrics(0.5, 0.25, None, None, 64, 0.0, 0.0, rank, 2.5))


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    """Changes a JSON file in place."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes a safetensors file in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
