"""A model whose weights come and go, and its own forward with something else in the places of its blocks.

The model is built without weights (on torch's meta device). What is needed is read from the checkpoint when it is needed and dropped
afterwards: one block at a time, and what is outside of the blocks.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cloq.calibration.hooks import Enough
from cloq.errors import ModelError
from cloq.linears import is_conv1d
from cloq.models.checkpoint import Checkpoint, TensorSource, check_finite
from cloq.models.heap import trim_heap
from cloq.models.origins import find_origins
from cloq.models.skeleton import build_skeleton, find_blocks, load_config, max_positions

StandIn = Callable[[int, Tensor, tuple, dict[str, Any]], Tensor]
"""Takes a block's place in the model's forward: its index, hidden states and further arguments → what it returns as hidden
states."""

Returned = dict[type, "int | None"]
"""For every class of block: `None` if its forward returns hidden states alone, else the length of the tuple that it returns."""


class StreamedModel:
    """A causal language model in a folder, without its weights: names and shapes of everything, and the weights of those parts that
    are in use.

    folder: a Hugging Face folder with safetensors. device, dtype: where and in what precision blocks compute; the checkpoint's
    own precision does not matter. tensors: where weights are read from, by default the folder's files as they are; for a folder
    with quantized weights, a source that decodes them.

    Opening reads no weight. Raises `ModelError` for anything that is not a decoder whose blocks hold linear layers, for tensors
    that are missing or of another shape, and for quantized weights without a source that decodes them.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
        *,
        tensors: TensorSource | None = None,
    ):
        self.folder, self.device, self.dtype = Path(folder), torch.device(device), dtype
        self.config = load_config(self.folder, trust_remote_code)
        if tensors is None:
            _refuse_quantized(self.folder, self.config)
        self.model = build_skeleton(self.config, dtype, trust_remote_code)
        self.prefix, self.blocks = find_blocks(self.model)
        self.checkpoint: TensorSource = Checkpoint(self.folder) if tensors is None else tensors
        self.source_names = find_origins(self.model, self.checkpoint)
        self._check_tensors()

    # -- what is there, without any weight -----------------------------------------------------------------------------

    def block_name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def block_parameters(self, index: int) -> int:
        """How many parameters a block has."""
        return sum(p.numel() for p in self.blocks[index].parameters())

    def outer_parameters(self, head: bool = True) -> int:
        """How many parameters there are in `outer(head)`; tied ones count once."""
        tied = self.tied_names()
        left_out = self._left_out(head)
        own = (pair for n, m in self._outer_modules() if m not in left_out for pair in m.named_parameters(n, recurse=False))
        return sum(parameter.numel() for name, parameter in own if name not in tied)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the configuration allows, where it says."""
        return max_positions(self.config)

    @property
    def width(self) -> int:
        """Of the hidden states; where the configuration has no name for it that transformers knows, of the embeddings."""
        return getattr(self.config.get_text_config(), "hidden_size", None) or self.model.get_input_embeddings().weight.shape[-1]

    @property
    def bytes_of_a_token(self) -> int:
        """Of one token's hidden states."""
        return self.width * self.dtype.itemsize

    def tied_names(self) -> dict[str, str]:
        """Parameters that are another one: name → the name of the one whose tensor is in the files.

        As in `from_pretrained`: the configuration says what is tied, the files say which of the two is stored, and two stored
        tensors that differ are not tied.
        """
        return self._tied

    @functools.cached_property
    def _tied(self) -> dict[str, str]:
        tied = {}
        for target, source in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            if target not in self.source_names:
                tied[target] = source
            elif source not in self.source_names:
                tied[source] = target
            elif torch.equal(self.read(target), self.read(source)):
                tied[target] = source
        return {name: tied.get(other, other) for name, other in tied.items()}

    def _check_tensors(self) -> None:
        kind, tied = type(self.model).__name__, getattr(self.model, "all_tied_weights_keys", None) or {}
        either = {*tied, *tied.values()}
        inside = [name for name in either if name.startswith(self.prefix + ".")]
        if inside:
            raise ModelError(f"{kind} ties weights inside its blocks, such as {inside[0]}; that is not supported")
        missing = [n for n in self.model.state_dict(keep_vars=True) if n not in self.source_names and n not in either]
        missing += [f"{s} or {t}" for t, s in tied.items() if s in either - set(tied) and not {s, t} & set(self.source_names)]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(f"{self.folder} lacks the tensor {missing[0]}{more} that {kind} needs; fetch the model again")
        for name, origin in self.source_names.items():
            found, wanted = origin.shape(self.checkpoint, self.model), tuple(_tensor(self.model, name).shape)
            if found != wanted:
                raise ModelError(f"{name} is {found} in {self.folder} but {wanted} by its config.json; they do not belong together")

    # -- weights come and go -------------------------------------------------------------------------------------------

    def read(self, name: str) -> Tensor:
        """A parameter or stored buffer by its name in the model, in its stored dtype, checked for NaN and Inf."""
        if name not in self.source_names:
            raise ModelError(f"{self.folder} has no tensor for {name} of {type(self.model).__name__}")
        return check_finite(self.source_names[name].read(self.checkpoint, self.model), name)

    def weight(self, name: str, module: nn.Module) -> Tensor:
        """A linear layer's weight as `(out, in)` float32 on the device, whatever way round the module stores it."""
        stored = self.read(f"{name}.weight").to(self.device, torch.float32)
        return stored.T.contiguous() if is_conv1d(module) else stored

    def load_block(self, index: int) -> nn.Module:
        """The block with its weights in place, in eval mode."""
        block = self.blocks[index]
        for path, module in block.named_modules(prefix=self.block_name(index)):
            self._fill(module, path)
        self.checkpoint.release()
        return block.eval()

    def drop_block(self, index: int) -> None:
        """Frees the block's weights."""
        for module in self.blocks[index].modules():
            _empty(module)
        self.checkpoint.release()
        trim_heap()

    def drop_all(self) -> None:
        """Frees every block's weights, and what the device keeps of freed memory: for when a run breaks off in the middle of a block."""
        for block in self.blocks:
            for module in block.modules():
                _empty(module)
        self.checkpoint.release()
        trim_heap()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def outer(self, head: bool = True) -> Iterator[None]:
        """Everything but the blocks in place: embeddings, final norm, and the head if it is asked for or holds what others are tied to.
        Inside another `outer()` it does nothing."""
        tied, left_out = self.tied_names(), self._left_out(head)
        parts = [(n, m) for n, m in self._outer_modules() if m not in left_out and (_is_empty(m) or not list(m.parameters(recurse=False)))]
        try:
            for name, module in parts:
                self._fill(module, name, leave=tied)
            for name, other in tied.items():
                owner, leaf = _owner(self.model, name)
                if owner not in left_out:
                    owner._parameters[leaf] = self.model.get_parameter(other)
            self.checkpoint.release()
            yield
        finally:
            for _, module in parts:
                _empty(module)

    @property
    def _head(self) -> nn.Module | None:
        """What makes logits of hidden states, in transformers' own models: others may use its weight without calling it."""
        return self.model.get_output_embeddings() if type(self.model).__module__.startswith("transformers.") else None

    def _left_out(self, head: bool) -> list[nn.Module]:
        """The head where it is not asked for, unless it holds what others are tied to."""
        holds = any(_owner(self.model, name)[0] is self._head for name in self.tied_names().values())
        return [] if head or holds or self._head is None else [self._head]

    def _outer_modules(self) -> list[tuple[str, nn.Module]]:
        inside = {id(m) for m in self.blocks.modules()}
        return [(name, m) for name, m in self.model.named_modules() if id(m) not in inside and (m._parameters or m._buffers)]

    def _fill(self, module: nn.Module, path: str, leave: dict[str, str] | None = None) -> None:
        """Reads the module's own parameters and buffers, in the dtypes that the model gives them; not those of its parts."""
        for leaf, parameter in module._parameters.items():
            name = f"{path}.{leaf}".lstrip(".")
            if parameter is not None and parameter.device.type == "meta" and name not in (leave or ()):
                module._parameters[leaf] = nn.Parameter(self.read(name).to(self.device, parameter.dtype), requires_grad=False)
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                name = f"{path}.{leaf}".lstrip(".")
                stored = leaf not in module._non_persistent_buffers_set
                module._buffers[leaf] = self.read(name).to(self.device, buffer.dtype) if stored else buffer.to(self.device)

    # -- its forward ---------------------------------------------------------------------------------------------------

    def stand_in(self, stand_in: StandIn, tokens: Tensor, returned: Returned) -> Tensor:
        """The model's forward on `tokens` with `stand_in` in the place of every block; its logits. Needs `outer()`."""

        def forward_of(index: int, block: nn.Module):
            parameter = next(iter(inspect.signature(block.forward).parameters))

            def forward(*args, **kwargs):
                hidden, args = (args[0], args[1:]) if args else (kwargs.pop(parameter), args)
                output = stand_in(index, hidden, args, kwargs)
                length = returned[type(block)]
                return output if length is None else (output,) + (None,) * (length - 1)

            return forward

        for index, block in enumerate(self.blocks):
            block.forward = forward_of(index, block)
        try:
            return self.model(input_ids=tokens, use_cache=False).logits
        finally:
            for block in self.blocks:
                del block.forward

    def go_through(self, stand_in: StandIn, tokens: Tensor, returned: Returned) -> None:
        """As `stand_in`, up to the head, which may be left out of `outer()`."""
        head = self._head
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(Enough))
            if head is not None:
                head.forward = _stop
                stack.callback(delattr, head, "forward")
            self.stand_in(stand_in, tokens, returned)


def _refuse_quantized(folder: Path, config) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    raise ModelError(
        f"{folder} is already quantized ({values.get('quant_method', 'by an unknown method')}); pass the original 16-bit model. "
        f"To fit adapters to this base as it is, run: cloq init --dense ORIGINAL --quantized {folder}"
    )


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, leaf = _owner(model, name)
    return getattr(owner, leaf)


def _owner(module: nn.Module, dotted: str) -> tuple[nn.Module, str]:
    path, _, leaf = dotted.rpartition(".")
    return module.get_submodule(path), leaf


def _is_empty(module: nn.Module) -> bool:
    return any(p is not None and p.device.type == "meta" for p in module._parameters.values())


def _empty(module: nn.Module) -> None:
    for leaf, parameter in module._parameters.items():
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _stop(*args: Any, **kwargs: Any) -> Any:
    raise Enough
