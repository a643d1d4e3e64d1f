"""A model in memory, as tasks need it: whole, with its tokenizer, and with a statement of how it computes.

Two ways for a quantized base. `decoded`: every weight is decoded once into a dense float32 model and the adapter's product is added to it,
the function that base and adapter are. `packed`: the libraries' own kernels and PEFT, as users run it; a CPU decodes every weight again
on every call there, several times slower.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloq.errors import ModelError, TaskError
from cloq.models import Decoder, is_conv1d, load_config, load_tokenizer, max_positions, set_weight
from cloq.models.skeleton import reason


@dataclass(frozen=True, eq=False)
class TaskModel:
    """model: in eval mode. end: tokens that end a text. start: what a text without context is conditioned on. max_positions: longest
    sequence, `None` where the configuration does not say. weights: how it computes, in words. keeps_logits: its forward can be told to
    compute the last logits only. shares_prefixes: sequences can go on from the keys and values of a common beginning."""

    model: nn.Module
    tokenizer: Any
    end: tuple[int, ...]
    start: int
    max_positions: int | None
    weights: str
    keeps_logits: bool
    shares_prefixes: bool

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@contextmanager
def opened(base: Path, adapter: Path | None, device: str, decoded: bool, trust_remote_code: bool = False) -> Iterator[TaskModel]:
    """The model in `base` with the adapter on it. decoded: see above; a base that is not quantized is loaded plainly either way.

    A model on the CPU computes in float32. Raises a `CloqError` for what cannot be loaded or cannot be decoded with this adapter.
    """
    quantized, trust = _method(base), trust_remote_code
    if decoded and quantized:
        with decoded_model(base, adapter, device, trust) as model:
            yield task_model(model, base, f"{quantized} decoded to float32", trust)
    elif adapter is None and not quantized:
        model, dtype = _plain(base, device, trust)
        yield task_model(model, base, dtype, trust)
    elif decoded:
        model, dtype = _plain(base, device, trust)
        _add_adapter(model, adapter, base)
        yield task_model(model, base, f"{dtype}, adapter added", trust)
    else:
        model = _packed(base, adapter, device, trust)
        yield task_model(model, base, f"packed {quantized}" if quantized else f"{_name(model.dtype)}, adapter by PEFT", trust)


def look_at(base: Path, adapter: Path | None, decoded: bool, chat: bool, trust_remote_code: bool = False) -> None:
    """Raises, from the files alone, what `opened` would after a while: tensors and libraries that are missing, an adapter that cannot be
    decoded. chat: the tokenizer needs a chat template. Whether the adapter fits the base is not looked at."""
    from cloq.export.peft import AdapterFolder
    from cloq.export.read import QuantizedFolder

    quantized = _method(base)
    if decoded and quantized:
        QuantizedFolder(base).decoder(trust_remote_code=trust_remote_code)
    elif quantized:
        _refuse_unloadable(base, trust_remote_code)
    if decoded and adapter is not None:
        AdapterFolder(adapter).refuse_more_than_lora()
    if chat and not load_tokenizer(base, trust_remote_code).chat_template:
        raise TaskError(f"the tokenizer in {base} has no chat template (a base model rarely has one); leave --chat out")


@contextmanager
def decoded_model(
    base: Path, adapter: Path | None = None, device: str = "cpu", trust_remote_code: bool = False
) -> Iterator[nn.Module]:  # fmt: skip
    """The dense float32 model that a quantized base decodes to, the adapter's product added; it is emptied at the end."""
    from cloq.export.read import QuantizedFolder

    decoder: Decoder = QuantizedFolder(base).decoder(device, trust_remote_code=trust_remote_code)
    with decoder.outer():
        for index in range(len(decoder.blocks)):
            decoder.load_block(index)
        if adapter is not None:
            _add_adapter(decoder.model, adapter, base)
        yield decoder.model
        for index in range(len(decoder.blocks)):
            decoder.drop_block(index)


def _add_adapter(model: nn.Module, folder: Path, base: Path) -> None:
    from cloq.export.peft import AdapterFolder
    from cloq.use.pairing import refuse_misfit

    adapter = AdapterFolder(folder)
    for name, module in refuse_misfit(adapter, base, model).modules.items():
        weight = module.weight.detach().float()
        weight = weight.T if is_conv1d(module) else weight
        set_weight(module, weight + adapter.delta(name).to(weight.device))


def _plain(folder: Path, device: str, trust_remote_code: bool) -> tuple[nn.Module, str]:
    """Through transformers, in float32 on a CPU, else in the precision in which it is stored; and that precision's name."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder} cannot be loaded by transformers ({reason(error, trust_remote_code)})") from error
    lacking = sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])
    if lacking:  # transformers would go on with random numbers
        raise ModelError(f"{folder} lacks the tensor {lacking[0]}, or has it in another shape; fetch the model again")
    return model.to(device), _name(model.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _packed(base: Path, adapter: Path | None, device: str, trust_remote_code: bool) -> nn.Module:
    """The real libraries. On a CPU without a C++ compiler GPTQ's kernels need `TORCHDYNAMO_DISABLE=1`."""
    from cloq.use.loading import load, load_base

    settings: dict[str, Any] = {"dtype": torch.float32} if torch.device(device).type == "cpu" else {}
    settings |= {"trust_remote_code": True} if trust_remote_code else {}
    if adapter is not None:
        return load(base, base=base, adapter=adapter, **settings).to(device)
    _refuse_unloadable(base, trust_remote_code)
    return load_base(base, **settings).to(device)


def _refuse_unloadable(base: Path, trust_remote_code: bool) -> None:
    """Raises `MissingLibrary`, or `ModelError` for a damaged base: a missing tensor would abort the process."""
    from cloq.use.check import check_base
    from cloq.use.loading import require_libraries

    require_libraries(base)
    failed = [finding.what for finding in check_base(base, trust_remote_code) if not finding.ok]
    if failed:
        raise ModelError(f"{base} cannot be loaded as it is: {failed[0]} (cloq check says more)")


def _method(base: Path) -> str | None:
    """How the base is quantized, in words for people."""
    from cloq.export.read import read_config

    quantization = read_config(base).get("quantization_config")
    if not quantization:
        return None
    bits = f" {quantization['bits']}-bit" if "bits" in quantization else ""
    return f"{quantization.get('quant_method', 'bitsandbytes')}{bits}"


def task_model(model: nn.Module, folder: Path, weights: str, trust_remote_code: bool = False) -> TaskModel:
    tokenizer = load_tokenizer(folder, trust_remote_code)
    end = _ends(folder, tokenizer)
    start = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), None)
    if start is None:
        raise TaskError(f"the tokenizer in {folder} has neither a begin-of-text nor an end-of-text token, and tasks need one of them")
    limit = max_positions(load_config(folder, trust_remote_code))
    known = inspect.signature(_inner(model).forward).parameters
    shares = "past_key_values" in known and all(map(_repeats, new_cache(model).layers))
    return TaskModel(model.eval(), tokenizer, end, start, limit, weights, "logits_to_keep" in known, shares)


def new_cache(model: nn.Module):
    """Empty keys and values, to be handed to a forward."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _repeats(layer) -> bool:
    """Whether a layer's cache can be repeated for several sequences; recurrent states cannot."""
    return hasattr(layer, "batch_repeat_interleave")


def _inner(model: nn.Module) -> nn.Module:
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _ends(folder: Path, tokenizer) -> tuple[int, ...]:
    """The tokenizer's end-of-text token, and whatever else the model's generation settings say ends a text."""
    from transformers import GenerationConfig

    stated = GenerationConfig.from_pretrained(folder).eos_token_id if (folder / "generation_config.json").is_file() else None
    more = stated if isinstance(stated, list) else [stated]
    return tuple(dict.fromkeys(token for token in (tokenizer.eos_token_id, *more) if token is not None))
