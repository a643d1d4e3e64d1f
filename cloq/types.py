"""The values that travel through cloq: statistics in, quantized weights and LoRA factors out.

Orientation is Hugging Face's everywhere: a weight is `(out, in)` and a layer computes `y = W x`. The papers (GPTQ, MagR, CLoQ) mostly
write the transpose; this is the only place that says so.

All of these are immutable by convention: no function in cloq writes into a tensor that it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from cloq.precision import full_precision


@dataclass(frozen=True, eq=False)
class LayerStats:
    """Second-order statistics of a linear layer's inputs, and what its outputs count.

    gram: `Σ x xᵀ` over all calibration tokens, the raw sum, `(in, in)`, float32 or float64.
    n_tokens: how many tokens are in the sum.
    borrowed: for how many further ones a mean over other tokens stands in it; see `cloq.calibration.topped_up`.
    outputs: weight of the squared error of each output, `(out,)`, positive, with a mean of 1; `None` where all count alike.

    Two of them merge by `+`, so neither order, batching nor the number of processes matters. Factors such as 2 or 1/n are applied where
    they are used.
    """

    gram: Tensor
    n_tokens: int
    borrowed: int = 0
    outputs: Tensor | None = None
    _found: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """`find()`, which must follow from the Gram matrix and `key` alone: found on the first call, and kept as long as the statistics.

        Layers that share an input share their statistics, and so what is found here.
        """
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    def for_outputs(self, outputs: Tensor | None) -> LayerStats:
        """The same inputs for a layer whose outputs count so; what was found of the Gram matrix stays known."""
        if outputs is None:
            return self
        weighted = replace(self, outputs=outputs)
        object.__setattr__(weighted, "_found", self._found)
        return weighted

    def __add__(self, other: LayerStats) -> LayerStats:
        if self.gram.shape != other.gram.shape:
            raise ValueError(f"cannot merge Gram matrices of shapes {tuple(self.gram.shape)} and {tuple(other.gram.shape)}")
        return LayerStats(self.gram + other.gram, self.n_tokens + other.n_tokens, self.borrowed + other.borrowed)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight on a group-wise integer grid: `W[o, i] ≈ scale[o, g] · (codes[o, i] − zero[o, g])` with `g = group_index[i]`.

    codes: `(out, in)` uint8, each below `2**bits`.
    scale: `(out, groups)` float32 whose values are exactly representable in float16, as the packed file stores them. May be negative
        (a symmetric full-range grid chooses the side that gets the extra level).
    zero: `(out, groups)` uint8, each below `2**bits`.
    group_index: `(in,)` int64, the group of each input column.
    bits: 2, 3, 4 or 8.
    group_size: the requested size; `None` is one group per output channel. The last group of a row is shorter where the size does not
        divide `in`.
    symmetric: every zero point is `2**(bits-1)`.
    damping: relative damping with which GPTQ's Cholesky succeeded (0 where there was none).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_index: Tensor
    bits: int
    group_size: int | None
    symmetric: bool = False
    damping: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes.shape)

    def dequantize(self) -> Tensor:
        """What the packed file decodes to, `(out, in)` float32. Exact: an integer below 2^9 times an 11-bit significand fits in 24 bits."""
        zero, scale = (per_group.float().index_select(1, self.group_index) for per_group in (self.zero, self.scale))
        return self.codes.float().sub_(zero).mul_(scale)

    def storage_bits(self) -> int:
        """Size in bits of codes, scales (16 bits) and zero points as they are stored."""
        return self.codes.numel() * self.bits + self.scale.numel() * (16 + self.bits)


@dataclass(frozen=True, eq=False)
class CodebookWeight:
    """A weight on a fixed codebook: `W[o, i] ≈ scale[block] · codebook[codes[o, i]]`, blocks running over the flattened weight.

    codes: `(out, in)` uint8.
    scale: `(blocks,)` float32, the largest magnitude of each block of `block_size` consecutive values in row-major order.
    codebook: `(16,)` float32, ascending, within [−1, 1].
    """

    codes: Tensor
    scale: Tensor
    codebook: Tensor
    block_size: int
    bits: int = 4
    damping: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes.shape)

    def dequantize(self) -> Tensor:
        """What the file decodes to, `(out, in)` float32."""
        scale = self.scale.repeat_interleave(self.block_size)[: self.codes.numel()]
        return (self.codebook[self.codes.flatten().long()] * scale).reshape(self.codes.shape)

    def storage_bits(self) -> int:
        """Size in bits of codes and float32 scales as they are stored."""
        return self.codes.numel() * self.bits + self.scale.numel() * 32


AnyQuantizedWeight = QuantizedWeight | CodebookWeight


@dataclass(frozen=True)
class WeightLayout:
    """What a format needs to know of a quantized weight before its tensors are read.

    kind: `integer` or `codebook`. shape: `(out, in)`. group_size: of an integer grid, or the codebook's block size. permuted: the groups
    are not runs of consecutive columns (activation order without static groups).
    """

    kind: str
    shape: tuple[int, int]
    bits: int
    group_size: int | None
    symmetric: bool
    permuted: bool


def layout(weight: AnyQuantizedWeight) -> WeightLayout:
    """The layout of a quantized weight."""
    if isinstance(weight, CodebookWeight):
        return WeightLayout("codebook", weight.shape, weight.bits, weight.block_size, False, False)
    steps = weight.group_index.diff()
    return WeightLayout("integer", weight.shape, weight.bits, weight.group_size, weight.symmetric, bool((steps < 0).any()))


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """A low-rank correction `ΔW = B A` with `A (r, in)` and `B (out, r)`, float32. PEFT applies it with scaling 1."""

    A: Tensor
    B: Tensor

    def __post_init__(self):
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(f"LoRA factors need A (r, in) and B (out, r), got A {tuple(self.A.shape)} and B {tuple(self.B.shape)}")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @full_precision()
    def delta(self) -> Tensor:
        """`B @ A`, `(out, in)`."""
        return self.B @ self.A


@dataclass(frozen=True)
class LayerMetrics:
    """What a report needs about one layer. Errors are relative and squared: `‖(W − Ŵ) S‖² / ‖W S‖²` with `S Sᵀ` the Gram matrix and `W` the
    layer's target, which is the original weight unless it makes up for earlier layers (`cloq.algebra.drift`).

    error_quantized / error_corrected: of `Q` and of `Q + B A`, on the calibration tokens.
    heldout_quantized / heldout_corrected: the same on tokens that the solve never saw; `None` without a held-out share.
    n_tokens: calibration tokens in the Gram matrix.
    damping: relative damping of the Cholesky factorization that succeeded.
    seconds: wall time of quantization plus factors.
    rank: rank of the factors, after clipping to what the layer allows.
    bits_per_weight: storage of the quantized weight over its number of entries, without the adapter.
    spectrum: shares of the error `‖(W − Q) S‖²` that the factors' directions hold, descending, at most 32 of them; for CLoQ these are the
        leading eigenvalues of the error itself.
    notes: everything where the code had to change course, in words.
    """

    error_quantized: float
    error_corrected: float
    heldout_quantized: float | None
    heldout_corrected: float | None
    n_tokens: int
    damping: float
    seconds: float
    rank: int
    bits_per_weight: float
    spectrum: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class LayerResult:
    """One finished linear layer: its quantized weight, its factors, and how well they do."""

    weight: AnyQuantizedWeight
    factors: LoraFactors
    metrics: LayerMetrics

    def effective_weight(self, adapter: bool = True) -> Tensor:
        """The dense `(out, in)` float32 weight that the layer computes with: `Q + B A`, or `Q` alone."""
        dense = self.weight.dequantize()
        return dense + self.factors.delta() if adapter else dense


class Quantizer(Protocol):
    """An algorithm that turns a weight and its input statistics into a quantized weight: a frozen dataclass with one verb. Without
    statistics it rounds to the nearest."""

    def quantize(self, weight: Tensor, stats: LayerStats | None) -> AnyQuantizedWeight: ...


Quantize = Callable[[Tensor, "LayerStats | None"], AnyQuantizedWeight]
"""A quantizer as the initializers are given it: `Quantizer.quantize`, or a base that is there already, whatever is asked."""


class Initializer(Protocol):
    """An algorithm that finds the quantized weight and the factors that go with it: a frozen dataclass with one verb.

    It is handed `quantize` as a function, so that quantize-then-fit (CLoQ), fit-then-quantize (PiSSA) and alternation (LoftQ) share one
    shape. `rank` must not exceed `min(weight.shape)`.
    """

    def initialize(self, weight: Tensor, stats: LayerStats, quantize: Quantize, rank: int) -> tuple[AnyQuantizedWeight, LoraFactors]: ...


class GivenBase(Protocol):
    """A base that someone else quantized: its layers by full name, each read exactly as the file decodes."""

    names: frozenset[str]

    def weight(self, name: str) -> AnyQuantizedWeight: ...

    def fingerprint(self) -> str: ...
