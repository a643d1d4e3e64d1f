"""A GPU that is not there: tensors that say they are on `cuda:0`, hold their values in host memory, and refuse to be mixed with others.

    with pretended_gpu():
        cloq.quantize(model, device="cuda:0", …)       # the same numbers as on the CPU, or an error where two devices meet

What it shows is where tensors are: a product of one here and one there, a factory that forgot the device, numpy on a tensor of the GPU. It
shows nothing of CUDA's own arithmetic, kernels or memory. Name the device with its number; torch looks for a driver otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda:0")
MEMORY = 1 << 30

_TAKES_BOTH = ("aten::copy_", "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
"""Operations that CUDA does between devices: copies, and whatever takes indices from the host."""


class _There(Tensor):
    """A tensor on the GPU. torch's own code takes it for one in host memory, so that it asks for no driver; Python sees the GPU."""

    held: Tensor
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, held: Tensor) -> _There:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device="cpu", **layout)

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if function is Tensor.cpu:
            return args[0].held.clone()
        if function in (Tensor.tolist, Tensor.data_ptr):
            return function(args[0].held)
        if function is Tensor.to:
            target = next((_device_of(value) for value in (*args[1:], *kwargs.values()) if _device_of(value) is not None), None)
            here = args[0].held if isinstance(args[0], _There) else args[0]
            if target is not None and (target.type == "cpu") == isinstance(args[0], _There):  # from one to the other
                moved = here.to(*_here(args[1:]), **_here(kwargs)).clone()
                return moved if target.type == "cpu" else _There(moved)
        return torch._C._disabled_torch_function_impl(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Operations(TorchDispatchMode):
    """Factories that are asked for the GPU, and copies to it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """`torch.tensor`, which makes its tensor before any operation runs."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and _on_gpu(kwargs.get("device")):
            return _There(function(*args, **_here(kwargs)))
        return function(*args, **kwargs)


@contextlib.contextmanager
def pretended_gpu(free: int = MEMORY) -> Iterator[None]:
    """Inside, `cuda:0` is a device that tensors can be on. Triton finds no driver for it, as on a GPU that it does not know. free: bytes
    of its memory that it says are free."""
    from cloq.quantizers import columns

    replaced = {
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "mem_get_info": lambda device=None: (free, MEMORY),
        "max_memory_allocated": lambda device=None: 0,
        "empty_cache": lambda: None,
    }
    columns._found.cache_clear()
    try:
        with mock.patch.multiple(torch.cuda, **replaced), _Operations(), _Literals():
            yield
    finally:
        columns._found.cache_clear()


def _run(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    name, asked = operation._schema.name, kwargs.get("device")
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    there = any(isinstance(tensor, _There) for tensor in tensors)
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, _There) and tensor.ndim and tensor.device.type != "meta"]
    if there and elsewhere and name not in _TAKES_BOTH:
        raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU, {tuple(elsewhere[0].shape)}")
    if not there and not _on_gpu(asked):
        return operation(*args, **kwargs)
    result = operation(*_here(args), **_here(kwargs))
    if asked is not None and not _on_gpu(asked):
        return result
    if name == "aten::copy_" and not isinstance(args[0], _There):
        return args[0]
    wrapped = tree_map(lambda value: _There(value) if isinstance(value, Tensor) and value.device.type == "cpu" else value, result)
    return return_and_correct_aliasing(operation, args, kwargs, wrapped)


def _here(values: Any) -> Any:
    """The same with tensors and devices of the host."""

    def one(value: Any) -> Any:
        if isinstance(value, _There):
            return value.held
        return torch.device("cpu") if isinstance(value, (str, torch.device)) and _on_gpu(value) else value

    return tree_map(one, values)


def _on_gpu(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _device_of(value: Any) -> torch.device | None:
    """What an argument of `Tensor.to` says of the device."""
    if isinstance(value, Tensor):
        return value.device
    return torch.device(value) if isinstance(value, (str, torch.device)) else None
