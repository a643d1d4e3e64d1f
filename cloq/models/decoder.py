"""All that knows transformers: a decoder-only model as a row of blocks whose weights come and go.

The model is built without weights (on torch's meta device). What is needed is read from the checkpoint when it is needed and dropped
afterwards: the embeddings for the way in, one block at a time, the final norm and head for the way out. The model's own forward is what
runs on the way in and out, with every block's `forward` stood in for; so positions, masks, rotary tables, per-layer variants, embedding
scales and logit caps are whatever the model says they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloq.errors import ModelError
from cloq.models.checkpoint import Checkpoint, check_finite

Call = tuple[tuple, dict[str, Any]]
"""Positional and keyword arguments of a block's forward, after the hidden states."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch on its way through the blocks. hidden: `(sequences, tokens, width)`. calls: further arguments, for each block."""

    hidden: Tensor
    calls: list[Call]


class Decoder:
    """A causal language model, streamed block by block from a folder.

    folder: a Hugging Face folder with safetensors. device, dtype: where and in what precision blocks compute; the checkpoint's own
    precision does not matter. Raises `ModelError` for anything that is not a decoder whose blocks hold linear layers.
    """

    def __init__(self, folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, trust_remote_code: bool = False):
        self.folder, self.device, self.dtype = Path(folder), torch.device(device), dtype
        self.config, self.model = _skeleton(self.folder, dtype, trust_remote_code)
        self.checkpoint = Checkpoint(self.folder)
        self.source_names = _source_names(self.model, self.checkpoint)
        self.prefix, self.blocks = _find_blocks(self.model)
        self._returns_tuple = False

    # -- what is there -------------------------------------------------------------------------------------------------

    def block_name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def linears(self, index: int) -> dict[str, nn.Module]:
        """Linear layers of a block by full name, in the order of definition. transformers' Conv1D counts, a subclass with its own
        forward (an expert router) does not."""
        found = self.blocks[index].named_modules(prefix=self.block_name(index))
        return {name: module for name, module in found if is_linear(module)}

    def all_linears(self) -> list[str]:
        """Full names of every linear layer in every block, in order."""
        return [name for index in range(len(self.blocks)) for name in self.linears(index)]

    def fused_experts(self, index: int) -> list[str]:
        """Names of weights with three dimensions: experts fused into one parameter, which hooks on modules do not see."""
        return [name for name, p in self.blocks[index].named_parameters(prefix=self.block_name(index)) if p.ndim > 2]

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the configuration allows, where it says."""
        text = self.config.get_text_config()
        return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)

    # -- weights come and go -------------------------------------------------------------------------------------------

    def read(self, name: str) -> Tensor:
        """A parameter by its name in the model, in its stored dtype, checked for NaN and Inf."""
        if name not in self.source_names:
            raise ModelError(f"{self.folder} lacks the tensor {name} that {type(self.model).__name__} needs; the checkpoint is incomplete")
        return check_finite(self.checkpoint.read(self.source_names[name]), name)

    def weight(self, name: str, module: nn.Module) -> Tensor:
        """A linear layer's weight as `(out, in)` float32 on the device, whatever way round the module stores it."""
        stored = self.read(f"{name}.weight").to(self.device, torch.float32)
        return stored.T if is_conv1d(module) else stored

    def load_block(self, index: int) -> nn.Module:
        """The block with its weights in place, in eval mode."""
        block = self.blocks[index]
        self._fill(block, self.block_name(index))
        return block.eval()

    def drop_block(self, index: int) -> None:
        _empty(self.blocks[index])

    @contextlib.contextmanager
    def outer(self) -> Iterator[None]:
        """Everything but the blocks in place: embeddings, final norm, head."""
        inside = {id(p) for p in self.blocks.parameters()}
        parts = [(n, m) for n, m in self.model.named_modules() if m._parameters and not any(id(p) in inside for p in m.parameters(recurse=False))]
        for name, module in parts:
            self._fill(module, name, recurse=False)
        self.model.tie_weights()
        self.model.eval()
        try:
            yield
        finally:
            for _, module in parts:
                _empty(module, recurse=False)

    def _fill(self, module: nn.Module, prefix: str, recurse: bool = True) -> None:
        for name, parameter in list(module.named_parameters(prefix=prefix, recurse=recurse)):
            if parameter.device.type != "meta":
                continue
            if name not in self.source_names and name in self.tied_names():
                continue
            owner, leaf = _owner(module, name.removeprefix(prefix + "."))
            value = self.read(name)
            if value.shape != parameter.shape:
                raise ModelError(f"{name} is {tuple(value.shape)} in the checkpoint but {tuple(parameter.shape)} in the configuration")
            owner._parameters[leaf] = nn.Parameter(value.to(self.device, self.dtype), requires_grad=False)
        for name, buffer in list(module.named_buffers(prefix=prefix, recurse=recurse)):
            owner, leaf = _owner(module, name.removeprefix(prefix + "."))
            if name in self.source_names and leaf not in owner._non_persistent_buffers_set:
                buffer = self.checkpoint.read(self.source_names[name]).to(buffer.dtype)
            owner._buffers[leaf] = buffer.to(self.device)

    def tied_names(self) -> dict[str, str]:
        return getattr(self.model, "all_tied_weights_keys", None) or {}

    # -- the way in, through, and out ----------------------------------------------------------------------------------

    @torch.no_grad()
    def enter(self, tokens: Tensor, batch_tokens: int) -> list[Batch]:
        """Runs the model's own way in on `tokens (sequences, length)` and returns what the first block gets and what every block is
        called with, in micro-batches of about `batch_tokens` tokens. Equal arguments of different batches are kept once."""
        size = max(1, batch_tokens // tokens.shape[1])
        kept: list[Tensor] = []
        with self.outer():
            return [self._enter_one(chunk.to(self.device), kept) for chunk in tokens.split(size)]

    def _enter_one(self, tokens: Tensor, kept: list[Tensor]) -> Batch:
        seen: dict[int, tuple[Tensor, Call]] = {}

        def record(index: int, hidden: Tensor, args: tuple, kwargs: dict) -> Tensor:
            seen[index] = (hidden, (_intern(args, kept), _intern(kwargs, kept)))
            return hidden

        self._with_blocks(record, tokens, logits_to_keep=1)
        if len(seen) != len(self.blocks):
            raise ModelError(f"{type(self.model).__name__} ran {len(seen)} of {len(self.blocks)} blocks in one forward; it cannot be streamed")
        return Batch(seen[0][0], [seen[i][1] for i in range(len(self.blocks))])

    @torch.no_grad()
    def run_block(self, index: int, batch: Batch) -> Tensor:
        """The block's output hidden states for one micro-batch."""
        args, kwargs = batch.calls[index]
        output = self.blocks[index](batch.hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def leave(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Logits `(sequences, length, vocabulary)` from the last block's output. Needs `outer()`."""
        last = len(self.blocks) - 1
        return self._with_blocks(lambda index, h, args, kwargs: hidden if index == last else h, tokens.to(self.device))

    def _with_blocks(self, stand_in: Callable[[int, Tensor, tuple, dict], Tensor], tokens: Tensor, **extra) -> Tensor:
        def forward_of(index: int):
            def forward(*args, **kwargs):
                if args:
                    hidden, args = args[0], args[1:]
                else:
                    hidden = kwargs.pop("hidden_states")
                output = stand_in(index, hidden, args, kwargs)
                return (output,) if self._returns_tuple else output

            return forward

        for index, block in enumerate(self.blocks):
            block.forward = forward_of(index)
        try:
            return self.model(input_ids=tokens, use_cache=False, **extra).logits
        finally:
            for block in self.blocks:
                del block.forward


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored `(in, out)`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Puts an `(out, in)` weight into a linear layer, in the layer's dtype and way round."""
    current = module.weight
    value = weight.T if is_conv1d(module) else weight
    module.weight = nn.Parameter(value.to(current.device, current.dtype).contiguous(), requires_grad=False)


def load_config(folder: Path, trust_remote_code: bool = False):
    """The folder's configuration; `ModelError` if it is missing, unreadable, or of a model that transformers does not know."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder}/config.json does not describe a model that transformers knows ({first[:300]})") from error


def load_tokenizer(folder: Path, trust_remote_code: bool = False):
    """The folder's tokenizer; `ModelError` if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer back ends raise types of their own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder} has no usable tokenizer ({first[:300]})") from error


def _skeleton(folder: Path, dtype: torch.dtype, trust_remote_code: bool):
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(folder, trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{folder} is an encoder-decoder ({config.model_type}); cloq takes decoder-only causal language models")
    bare = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(bare, dtype=dtype, attn_implementation="sdpa", trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "attention" in str(error).lower() and "support" in str(error).lower():
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(bare, dtype=dtype, attn_implementation="eager", trust_remote_code=trust_remote_code)
        else:
            raise ModelError(f"{folder} holds a {config.model_type}, which is not a causal language model that transformers can build") from error
    if not getattr(bare, "is_decoder", False) and type(model).__name__ in _NEEDS_IS_DECODER:
        raise ModelError(f"{folder} holds {type(model).__name__}, an encoder unless its configuration says is_decoder; cloq takes decoders")
    return config, model


_NEEDS_IS_DECODER = {"BertLMHeadModel", "RobertaForCausalLM", "XLMRobertaForCausalLM", "ElectraForCausalLM", "CamembertForCausalLM"}


def _source_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Names in the model → names in the files, by transformers' own rules for renamed keys and base-model prefixes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    wanted = dict(model.state_dict(keep_vars=True))
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    found = {}
    for source in checkpoint.names:
        target, converted = rename_source_key(source, renamings, converters, model.base_model_prefix, wanted)
        if converted is None and target in wanted:
            found[target] = source
    return found


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's row of blocks: of all module lists that are not inside another one, the one with the most weights in linear layers."""

    def size(blocks: nn.ModuleList) -> int:
        return sum(m.weight.numel() for m in blocks.modules() if is_linear(m))

    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists if other != n)}
    best = max(outermost, key=lambda name: size(outermost[name]), default=None)
    if best is None or size(outermost[best]) == 0:
        raise ModelError(f"{type(model).__name__} has no row of blocks that hold linear layers; cloq takes decoder-only language models")
    blocks = outermost[best]
    if len({id(b) for b in blocks}) != len(blocks):
        raise ModelError(f"{type(model).__name__} uses the same block more than once; shared blocks are not supported")
    return best, blocks


def _owner(module: nn.Module, dotted: str) -> tuple[nn.Module, str]:
    *path, leaf = dotted.split(".")
    return module.get_submodule(".".join(path)), leaf


def _empty(module: nn.Module, recurse: bool = True) -> None:
    for part in module.modules() if recurse else [module]:
        for leaf, parameter in part._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                part._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _intern(value: Any, kept: list[Tensor]) -> Any:
    """The same structure with every tensor replaced by an equal one that was seen before, so that what batches share is stored once."""
    if isinstance(value, Tensor):
        for other in kept:
            if other is value or (other.shape == value.shape and other.dtype == value.dtype and torch.equal(other, value)):
                return other
        kept.append(value)
        return value
    if isinstance(value, dict):
        return {key: _intern(item, kept) for key, item in value.items()}
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_intern(item, kept) for item in value)
    return value
