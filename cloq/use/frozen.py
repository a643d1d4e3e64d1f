"""Packed layers under training: the backward pass decodes them again instead of keeping what the forward pass decoded.

A layer computes `y = x W`, and the gradient with respect to `x` needs `W`. Left to itself autograd keeps the decoded `W` of every layer
from the forward pass until the backward pass: a dense copy of the whole model in the precision of the activations, eight times the size of
a 2-bit base in 16 bits and sixteen times in 32. Decoding twice costs a few per cent of a step. bitsandbytes' layers do this by themselves.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


class _DecodedProduct(torch.autograd.Function):
    """`x (tokens, in)` times the layer's decoded weight `(in, out)`; nothing but the layer is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return x @ _decoded(layer, x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient @ _decoded(ctx.layer, gradient.dtype).T).to(ctx.dtype), None


def _decoded(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """`(in, out)`."""
    return layer.dequantize_weight().to(dtype)


def decode_again(model: nn.Module) -> int:
    """Makes the model's packed GPTQ layers decode in the backward pass too, and returns how many there are.

    What a layer computes is unchanged, bit by bit, and so is its forward pass where no gradient is asked for. Only the kernels that decode
    and multiply (GPTQModel's `TorchLinear` and what is built on it, which is all that trains) are touched.
    """
    layers = [module for module in model.modules() if _decodes_and_multiplies(module)]
    for layer in layers:
        if not layer.qweight.is_cuda:  # GPTQModel wraps it with torch.compile, which on a CPU needs a C++ compiler and gains little
            vars(layer).pop("dequantize_weight", None)
        layer.forward = functools.partial(_forward, layer, layer.forward)
    return len(layers)


def _decodes_and_multiplies(module: nn.Module) -> bool:
    if not any(cls.__name__ == "TorchLinear" and cls.__module__.startswith("gptqmodel.") for cls in type(module).__mro__):
        return False
    plain = module.adapter is None and module.g_idx.shape[0] == module.in_features
    return plain and not (module.online_full_had or module.online_partial_had)


def _forward(layer: nn.Module, inference, x: Tensor) -> Tensor:
    if not (x.requires_grad and torch.is_grad_enabled()):
        return inference(x)
    out = _DecodedProduct.apply(x.reshape(-1, x.shape[-1]), layer).reshape(*x.shape[:-1], layer.out_features)
    return out if layer.bias is None else out + layer.bias.to(out.dtype)
