"""What one forward of a block costs, and which of its layers share an input, found without any weight.

A copy of the model runs its own forward on tensors that have shapes and no values, so the count is right for any architecture:
matrix products by torch's formulas, elementwise operations by the bytes they touch, attention by its own formula (half the
square: causal). Blocks that are alike are run once.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cloq.models import Decoder, linear_shape
from cloq.models.experts import experts_of
from cloq.plan.work import Work

_ATTENTION = 2.5
"""Fused attention takes this many times as long as its two products alone; measured: 2.9 with 512 tokens, 1.6 with 2048."""


@dataclass(frozen=True)
class Group:
    """names: layers that are given the same tensor, by their names inside the block. before: the work of a forward up to it.
    tokens: that they are given."""

    names: tuple[str, ...]
    before: Work
    tokens: int


@dataclass(frozen=True)
class Part:
    """A part of a block that ends in a layer (see `cloq.calibration.parts_that_end_in`). layers: all in it, `last` the one. entered, left:
    the work of a forward up to there. ending: the work of the last layer. kept: bytes of its input and of its output."""

    last: str
    layers: frozenset[str]
    entered: Work
    left: Work
    ending: Work
    kept: tuple[int, int]


@dataclass(frozen=True)
class BlockForward:
    """One forward of one sequence. groups: in the order in which it reaches them. whole: its work. largest: bytes of the largest
    tensor that it makes. parts: that end in a layer."""

    groups: tuple[Group, ...]
    whole: Work
    largest: int
    parts: tuple[Part, ...] = ()

    def chosen(self, prefix: str, names: Collection[str]) -> list[list[str]]:
        """Full names of those of its layers that are among the given ones, those together that share an input."""
        groups = ([prefix + name for name in group.names if prefix + name in names] for group in self.groups)
        return [group for group in groups if group]


def block_forwards(decoder: Decoder, length: int) -> tuple[list[BlockForward], str | None]:
    """A forward of one sequence of `length` tokens for every block, and why they could not be counted, if so.

    Experts are given equal shares of the tokens: which tokens is a matter of values. Where the model cannot run without values for another
    reason, every layer counts as a group of its own, in the order of definition, and a forward as its linear layers.
    """
    try:
        return _traced(decoder, length), None
    except Exception as error:  # the model's own code on tensors without values: anything can come
        first = (str(error).strip().splitlines() or [""])[0][:120]
        blocks = [_from_shapes(decoder, index, length) for index in range(len(decoder.blocks))]
        return blocks, f"the forward was estimated from the layers' shapes ({type(error).__name__}: {first})"


def _from_shapes(decoder: Decoder, index: int, length: int) -> BlockForward:
    prefix = decoder.block_name(index) + "."
    groups, sofar, largest = [], Work(), 0
    for name, module in decoder.linears(index).items():
        out, columns = linear_shape(module)
        groups.append(Group((name.removeprefix(prefix),), sofar, length))
        sofar += Work(products=2.0 * length * out * columns, streamed=4.0 * length * (out + columns))
        largest = max(largest, 4 * length * max(out, columns))
    return BlockForward(tuple(groups), sofar, largest)


@torch.no_grad()
def _traced(decoder: Decoder, length: int) -> list[BlockForward]:
    model = copy.deepcopy(decoder.model)
    blocks = model.get_submodule(decoder.prefix)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    counter = _Counter()
    known: dict[tuple, BlockForward] = {}
    outputs: dict[tuple, Callable] = {}
    keys = [_signature(block) for block in blocks]
    for experts in experts_of(model).values():
        experts.tokens_of = functools.partial(_equal_share, len(experts))
    with fake:
        _without_values(model)
        for index, (block, key) in enumerate(zip(blocks, keys, strict=True)):
            prefix = decoder.block_name(index) + "."
            linears = {name.removeprefix(prefix): name in decoder.expert_layers for name in decoder.linears(index)}
            block.forward = _recorded(block, key, linears, counter, known, outputs)
        with _AttentionByFormula(counter), counter:
            model(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    return [known[key] for key in keys]


def _equal_share(experts: int, index: int, top_k_index: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of `Experts.tokens_of`: as many tokens as an expert gets if all get the same, whichever."""
    tokens = torch.arange(math.ceil(top_k_index.numel() / experts))
    return tokens, torch.zeros_like(tokens)


def _signature(block: nn.Module) -> tuple:
    return (type(block), *((name, tuple(p.shape)) for name, p in block.named_parameters()))


def _without_values(model: nn.Module) -> None:
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def _recorded(block: nn.Module, key: tuple, linears: dict[str, bool], counter: _Counter, known: dict, outputs: dict) -> Callable:
    """The block's forward that counts the first block of its kind and stands in for the others. linears: layers → whether an expert's."""
    original = block.forward

    def forward(*args, **kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if key in known:
            return outputs[key](hidden)
        inputs: list[tuple[tuple, list[str], Work, int]] = []
        held = []

        def reached(module: nn.Module, arguments: tuple, name: str) -> None:
            x = arguments[0]
            held.append(x)  # a freed tensor's storage must not pass for another one
            same = (x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride())
            for storage, names, *_ in inputs:
                if storage == same:
                    names.append(name)
                    return
            inputs.append((same, [name], counter.work, x.shape[:-1].numel()))

        hooks = [block.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: reached(m, a, name)) for name in linears]
        spans = _Spans(block, [name for name, of_expert in linears.items() if not of_expert], counter)
        counter.work, counter.largest = Work(), 0
        with spans:
            output = original(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        groups = [Group(tuple(names), before, tokens) for _, names, before, tokens in inputs]
        found = {name for group in groups for name in group.names}
        groups += [Group((name,), counter.work, 0) for name in linears if name not in found]
        known[key] = BlockForward(tuple(groups), counter.work, counter.largest, spans.parts())
        rest = output[1:] if isinstance(output, tuple) else None
        outputs[key] = (lambda h: h) if rest is None else (lambda h: (h, *rest))
        return output

    return forward


class _Spans(ExitStack):
    """From where to where in a forward's work the layers of a block run, and the modules around them; and which return the same tensor."""

    def __init__(self, block: nn.Module, linears: list[str], counter: _Counter):
        super().__init__()
        self._linears = linears
        self._names = [name for name, _ in block.named_modules() if name and any(f"{layer}.".startswith(f"{name}.") for layer in linears)]
        self._found: dict[str, list[tuple[Work, Work, int, Any]]] = {}
        entered: dict[str, Work] = {}

        def enter(module: nn.Module, args: tuple, name: str) -> None:
            entered[name] = counter.work

        def leave(module: nn.Module, args: tuple, returned: Any, name: str) -> None:
            read = _bytes(args[0]) if args and isinstance(args[0], Tensor) else 0
            first = returned[0] if isinstance(returned, (tuple, list)) else returned
            self._found.setdefault(name, []).append((entered[name], counter.work, read, first))

        for name in self._names:
            module = block.get_submodule(name)
            for hook in (
                module.register_forward_pre_hook(lambda m, a, name=name: enter(m, a, name)),
                module.register_forward_hook(lambda m, a, y, name=name: leave(m, a, y, name)),
            ):
                self.callback(hook.remove)

    def parts(self) -> tuple[Part, ...]:
        found = {}
        if not all(layer in self._found for layer in self._linears):
            return ()
        for layer in self._linears:
            for name in self._names:  # from the outside in
                if layer.startswith(name + ".") and len(self._found.get(name, ())) == len(self._found.get(layer, ())) == 1:
                    ((entered, left, _, returned),), ((started, ended, read, output),) = self._found[name], self._found[layer]
                    if returned is output:
                        inside = frozenset(other for other in self._linears if other.startswith(name + "."))
                        found[name] = Part(layer, inside, entered, left, ended - started, (read, _bytes(output)))
                        break
        return tuple(found.values())


class _Counter(TorchDispatchMode):
    """Adds up the work of every operation that runs under it."""

    def __init__(self):
        super().__init__()
        self.work, self.largest = Work(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation.is_view:
            return out
        made = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        packet = operation._overloadpacket
        if packet in flop_registry:
            self.work += Work(products=float(flop_registry[packet](*args, **(kwargs or {}), out_val=out)))
        else:
            touched = [*made, *(t for t in args if isinstance(t, Tensor))]
            self.work += Work(streamed=float(sum(map(_bytes, touched))), calls=1)
        self.largest = max([self.largest, *map(_bytes, made)])
        return out


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _AttentionByFormula(TorchFunctionMode):
    """`softmax(Q Kᵀ) V` as the fused kernels compute it: two products over the lower triangle, no `(length, length)` tensor."""

    def __init__(self, counter: _Counter):
        super().__init__()
        self._counter = counter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, key, value = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key", "value")))
        pairs = query.shape[:-1].numel() * key.shape[-2] / 2
        self._counter.work += Work(products=_ATTENTION * 2.0 * pairs * (query.shape[-1] + value.shape[-1]))
        return query.new_empty(*query.shape[:-1], value.shape[-1])
