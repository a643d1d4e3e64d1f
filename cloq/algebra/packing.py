"""Unsigned integers of 1 to 8 bits ↔ a little-endian bit stream in int32 words: one exact inverse pair for every width and format.

A row of n codes becomes `ceil(n · bits / 32)` words; code i occupies bits `i · bits … (i + 1) · bits − 1` of the stream and may
straddle two words (3 bits: codes 10 and 21 of every 32). GPTQ and compressed-tensors files both use this layout, along different axes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """`(rows, n)` integers below `2**bits` → `(rows, ceil(n·bits/32))` int32; unused high bits of the last word are 0.

    Raises `ValueError` for a code outside the range: a packed file has no room to hold it.
    """
    rows, n = codes.shape
    if codes.numel() and (int(codes.max()) >= 2**bits or int(codes.min()) < 0):
        raise ValueError(f"codes must lie in 0…{2**bits - 1} for {bits} bits, got {int(codes.min())}…{int(codes.max())}")
    period, words = _period(bits)
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -n % period)).reshape(rows, -1, period)
    stream = torch.zeros(rows, padded.shape[1], words + 1, dtype=torch.int64, device=codes.device)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        value = padded[:, :, i] << shift
        stream[:, :, word] |= value & 0xFFFFFFFF
        stream[:, :, word + 1] |= value >> 32
    flat = stream[:, :, :words].reshape(rows, -1)[:, : math.ceil(n * bits / 32)]
    return torch.where(flat >= 2**31, flat - 2**32, flat).to(torch.int32)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: `(rows, words)` int32 → `(rows, n)` uint8. Raises `ValueError` for the wrong number of words."""
    rows, have = packed.shape
    if have != math.ceil(n * bits / 32):
        raise ValueError(f"{n} codes of {bits} bits need {math.ceil(n * bits / 32)} words a row, got {have}")
    period, words = _period(bits)
    stream = torch.nn.functional.pad(packed.to(torch.int64) & 0xFFFFFFFF, (0, -have % words)).reshape(rows, -1, words)
    codes = torch.empty(rows, stream.shape[1], period, dtype=torch.uint8, device=packed.device)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        value = stream[:, :, word] >> shift
        if shift + bits > 32:
            value = value | (stream[:, :, word + 1] << (32 - shift))
        codes[:, :, i] = (value & (2**bits - 1)).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :n].contiguous()


def _period(bits: int) -> tuple[int, int]:
    """The smallest run of codes that fills whole words: (codes, words)."""
    if not 1 <= bits <= 8:
        raise ValueError(f"packing is for 1 to 8 bits, got {bits}")
    codes = 32 // math.gcd(32, bits)
    return codes, codes * bits // 32
