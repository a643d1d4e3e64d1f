"""One layer: quantized, its factors fitted, both measured."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from cloq import initializers, quantizers
from cloq.algebra import linalg
from cloq.errors import ModelError
from cloq.precision import full_precision
from cloq.quantizers import grid
from cloq.specs import LayerSpec, LoraSpec
from cloq.types import AnyQuantizedWeight, LayerMetrics, LayerResult, LayerStats, LoraFactors

SPECTRUM_POINTS = 32


@full_precision()
def solve_layer(
    weight: Tensor, stats: LayerStats, unseen: LayerStats | None, layer: LayerSpec, lora: LoraSpec, given: AnyQuantizedWeight | None = None
) -> LayerResult:  # fmt: skip
    """Quantizes one layer, fits its factors, and measures both. Pure: tensors in, a value out.

    weight: `(out, in)` float32. stats, unseen: of the calibration and the held-out tokens. given: the quantized weight, where it is fixed.
    Raises `ModelError` for a weight that the quantizer's scales cannot hold.
    """
    started = time.perf_counter()
    notes = []
    rank = min(layer.rank, *weight.shape)
    if rank < layer.rank:
        notes.append(f"rank {layer.rank} clipped to {rank}, the most that {tuple(weight.shape)} allows")
    group_size = layer.quant.group_size
    if group_size is not None and weight.shape[1] % group_size:
        notes.append(f"group size {group_size} does not divide {weight.shape[1]} inputs: the last group has {weight.shape[1] % group_size}")
    if stats.borrowed:
        notes.append(
            f"fewer than {stats.n_tokens + stats.borrowed} calibration tokens reached this expert: topped up with a mean over tokens that "
            "went to others"
        )
    elif stats.n_tokens == 0:
        notes.append("no calibration token reached this layer: quantized without statistics, factors fitted to the plain weight error")
        stats = LayerStats(torch.eye(weight.shape[1], device=weight.device), 0)
    unseen = unseen if unseen and unseen.n_tokens else None
    quantizer = quantizers.from_spec(layer.quant)
    if given is None:  # of the weight itself, since factors that come first could take from the quantizer what it refuses
        grid.finite(weight, torch.finfo(torch.float32).max if layer.quant.quantizer == "nf4" else grid.LARGEST_WEIGHT)
    initializer = initializers.from_spec(lora.replace(rounds=0) if given and lora.rounds_on(given=False) else lora, layer.quant.bits)
    quantized, factors = initializer.initialize(weight, stats, lambda w, s: given or quantizer.quantize(w, s), rank)
    if quantized.damping > layer.quant.damping:
        notes.append(f"Cholesky failed with damping {layer.quant.damping:g}; raised to {quantized.damping:g}")
    seconds = time.perf_counter() - started
    residual = weight - quantized.dequantize()
    corrected = residual - factors.delta()
    if not linalg.all_finite(corrected):
        raise ModelError(f"a layer of shape {tuple(weight.shape)} came out of quantization with NaN or Inf")
    before, after, total = _errors(weight, residual, corrected, stats.gram)
    heldout = _errors(weight, residual, corrected, unseen.gram) if unseen else (None, None)
    return LayerResult(
        quantized,
        factors,
        LayerMetrics(
            error_quantized=before,
            error_corrected=after,
            heldout_quantized=heldout[0],
            heldout_corrected=heldout[1],
            n_tokens=stats.n_tokens,
            damping=quantized.damping,
            seconds=seconds,
            rank=rank,
            bits_per_weight=quantized.storage_bits() / weight.numel(),
            spectrum=_spectrum(factors, stats.gram, total),
            notes=tuple(notes),
        ),
    )


def _errors(weight: Tensor, residual: Tensor, corrected: Tensor, gram: Tensor) -> tuple[float, float, float]:
    """Relative errors of `Q` and of `Q + B A`, and `‖(W − Q) S‖²`, from one norm of each matrix."""
    whole, before, after = (linalg.gram_norm2(matrix, gram) for matrix in (weight, residual, corrected))
    return linalg.share(before, whole), linalg.share(after, whole), before


def _spectrum(factors: LoraFactors, gram: Tensor, total: float) -> tuple[float, ...]:
    """Up to 32 of the eigenvalues of `(B A) G (B A)ᵀ`, as shares of `‖E S‖²`: how much of the error how few directions take away."""
    if total <= 0:
        return ()
    core = torch.linalg.qr(factors.B).R @ factors.A
    values = torch.linalg.eigvalsh((core @ gram @ core.T).double()).flip(0).clamp_min(0)
    at = sorted({math.floor(i * (len(values) - 1) / (SPECTRUM_POINTS - 1)) for i in range(SPECTRUM_POINTS)})
    return tuple(value / total for value in values[at].tolist())
