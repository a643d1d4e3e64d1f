"""Hooks on one block: what its layers are given in a forward, and which of them are given the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cloq.errors import ModelError
from cloq.linears import linear_shape


class Enough(Exception):
    """Raised inside a forward once all that is wanted of it has been seen: what follows need not be computed."""


def shared_inputs(run: Callable[[], object], linears: dict[str, nn.Module]) -> list[list[str]]:
    """Groups of layers that are given the very same tensor, in the order in which one forward reaches them.

    run: one forward of the block. Layers that the forward never reaches come last, each alone. Two inputs are the same if they
    start at the same address with the same shape, strides and type, and nothing wrote to them in between. All of them are held
    until the forward ends, so a reused buffer cannot pass for an equal input; empty inputs have no address and are never the
    same. Raises `ModelError` for a layer that runs twice, whose statistics would be counted twice.
    """
    groups: dict[tuple, list[str]] = {}
    held: list[Tensor] = []
    reached: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        once(name, reached)
        held.append(x)
        groups.setdefault(_identity(x, len(held)), []).append(name)

    with torch.no_grad(), watching(linears, linears, see):
        run()
    return [*groups.values(), *([name] for name in linears if name not in reached)]


def once(name: str, reached: set[str]) -> None:
    """Adds a name to those that a forward has reached; `ModelError` the second time."""
    if name in reached:
        raise ModelError(
            f"{name} runs more than once in one forward of its block, which is not supported; leave it dense with --skip {name}"
        )
    reached.add(name)


def _identity(x: Tensor, position: int) -> tuple:
    version = None if x.is_inference() else x._version  # goes up with every write in place; inference tensors keep no count
    alone = position if x.numel() == 0 else 0
    return (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x.device, version, alone)


@contextmanager
def hooked(handle) -> Iterator[None]:
    """Removes a hook afterwards, whatever happened."""
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def inputs_of(modules: Iterable[nn.Module], see: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """`see(module, x)` before each forward of the modules, with the first tensor that it is given."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None:
            see(module, x)

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(hooked(module.register_forward_pre_hook(hook, with_kwargs=True)))
        yield


@contextmanager
def watching(linears: dict[str, nn.Module], names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`see(name, input)` before each forward of the named layers; a layer of two names is seen twice."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(inputs_of([linears[name]], lambda module, x, name=name: see(name, x)))
        yield


@contextmanager
def calling(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward in the place of a module's; its hooks stay."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def muted(linear: nn.Module) -> Iterator[None]:
    """A linear layer that returns its bias, or zeros, for any token."""
    out = linear_shape(linear)[0]

    def silent(x: Tensor) -> Tensor:
        nothing = x.new_zeros(*x.shape[:-1], out)
        return nothing if linear.bias is None else nothing + linear.bias

    with calling(linear, silent):
        yield
