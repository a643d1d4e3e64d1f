"""What one layer costs once its Gram matrix is there: quantizing it, fitting its factors, measuring both.

Each formula counts the matrix products of the routine that it names; the constants before the other terms were fitted to measured
times of that routine on one core (GPTQ, eigendecomposition, MagR's prox) and are good to some tens of percent.
"""

from __future__ import annotations

from cloq.algebra import linalg, lowrank
from cloq.algebra.drift import MIXTURES
from cloq.calibration.gram import PANEL
from cloq.initializers.cloq import compensated
from cloq.plan.work import Work
from cloq.quantizers.columns import INNER
from cloq.quantizers.gptq import BLOCK
from cloq.quantizers.magr import Magr
from cloq.specs import LoraSpec, QuantSpec

Shape = tuple[int, int]

_CALLS_PER_COLUMN = 20
_CALLS_PER_GROUP = 150
_CHOLESKY = 0.7  # n³: the factorization needs a third, at half the speed of a product
_EIGEN = 9.0  # n³
_QR = 4.0  # out · in²: the triangle and the basis need 4, minus what the smaller square saves
_PROX_BYTES = 1300  # for each weight and step: some six rounds of Newton's iteration
_KRYLOV_BLOCKS = 6
_TRIED = 3.8  # dampings of a correction


def solve(shape: Shape, quant: QuantSpec, lora: LoraSpec, rank: int, heldout: bool, given: bool = False) -> Work:
    """`solve.solve_layer` for a layer `(out, in)`. given: the base is, and only the factors are found."""
    rank = min(rank, *shape)
    quantized = Work() if given else quantize(shape, quant)
    work = errors(shape, rank, heldout)
    if rounds := lora.rounds_on(given):  # the first factors; the codes are improved once
        whole = compensated(rounds)
        work += fit(shape, lora.init, rank) + rounds * following(shape, rank) + descent(shape)
        return work + whole * (quantized + deflation(shape[1], rank)) + (rounds - whole) * to_the_nearest(shape, quant)
    times = lora.iterations if lora.init == "loftq" else 1
    return work + times * (quantized + fit(shape, lora.init, rank))


def quantize(shape: Shape, quant: QuantSpec) -> Work:
    """With statistics of the inputs."""
    work = magr(shape) if quant.magr else Work()
    if quant.quantizer == "gptq":
        work += gptq(shape)
    return work + _rounded(shape, quant, quant.search)


def to_the_nearest(shape: Shape, quant: QuantSpec) -> Work:
    """The same without statistics, as all but the last rounds have it: what is GPTQ otherwise has its scales searched then."""
    return _rounded(shape, quant, quant.search or quant.quantizer == "gptq")


def _rounded(shape: Shape, quant: QuantSpec, search: bool) -> Work:
    out, columns = shape
    work = Work(streamed=120.0 * out * columns)
    if search and quant.quantizer != "nf4":
        work += Work(searched=float(out) * columns, calls=float(_CALLS_PER_GROUP) * columns / (quant.group_size or columns))
    return work


def gptq(shape: Shape) -> Work:
    """`in` columns one by one, each moving the next few; products bring every block up to date with all columns before it."""
    out, columns = shape
    return Work(products=damped_cholesky(columns).products + float(out) * columns * (columns + 2 * BLOCK)) + _column_by_column(shape)


def magr(shape: Shape) -> Work:
    out, columns = shape
    steps = Magr.iterations
    return Work(products=2.0 * out * columns**2 * (steps + 1), streamed=float(_PROX_BYTES) * out * columns * steps, calls=100.0 * steps)


def fit(shape: Shape, init: str, rank: int) -> Work:
    """The factors. `cloq` weighs with the Gram matrix, `eora` with its roots, `qera` with its diagonal, others not."""
    out, columns = shape
    if init == "zero":
        return Work()
    roots = Work(wide=_EIGEN * columns**3 + 2.0 * (out + rank) * columns**2) if init == "eora" else Work()
    return roots + top_eigenvectors(shape, rank, whole_gram=init == "cloq", wide=init == "eora")


def deflation(columns: int, rank: int) -> Work:
    """`lowrank.deflate`."""
    return Work(products=4.0 * rank * columns**2, streamed=24.0 * columns**2)


def descent(shape: Shape) -> Work:
    """A sweep of `quantizers.descend`: every block's gradient when the sweep gets there."""
    out, columns = shape
    return Work(products=2.0 * out * columns**2) + _column_by_column(shape)


def _column_by_column(shape: Shape) -> Work:
    """The plain loops of `quantizers.columns`, without their products: each column rounded, and what it moves of the next few."""
    out, columns = shape
    return Work(cached=48.0 * out * columns * INNER / 2 + 80.0 * out * columns, calls=float(_CALLS_PER_COLUMN) * columns)


def following(shape: Shape, rank: int) -> Work:
    """`lowrank.follow`: the error times the Gram matrix, and two steps with thin matrices."""
    out, columns = shape
    return Work(products=2.0 * out * columns**2 + 18.0 * rank * out * columns, streamed=30.0 * out * columns)


def top_eigenvectors(shape: Shape, rank: int, whole_gram: bool, wide: bool = False) -> Work:
    """`lowrank.top_eigenvectors`, which picks route and precision (float32 for large layers, unless `wide`) by the same rules."""
    out, columns = shape
    small = min(shape)
    weigh = 2.0 * out * columns**2 if whole_gram else 0.0
    last = 6.0 * rank * out * columns  # two projections for the Rayleigh quotients, and the factor A
    if small <= lowrank.EXACT_BELOW or rank > lowrank.EXACT_SHARE * small:
        tall = (_QR + 2.0) * out * columns**2 if out > columns else 0.0  # a QR first
        operations, calls = weigh + tall + 2.0 * small**2 * columns + _EIGEN * small**3 + last + 4.0 * rank**2 * small, 50.0
    else:
        width = rank + max(8, rank // 8)
        steps = _KRYLOV_BLOCKS * (4.0 * width * out * columns)
        orthogonal = 5.0 * out * width**2 * _KRYLOV_BLOCKS * (_KRYLOV_BLOCKS + 1)
        rayleigh = _EIGEN * width**3 * sum(k**3 for k in range(1, _KRYLOV_BLOCKS + 1))
        operations, calls = weigh + steps + orthogonal + rayleigh + last, 50.0 * _KRYLOV_BLOCKS
    return Work(calls=calls, **{"wide" if wide or small <= lowrank.EXACT_BELOW else "products": operations})


def errors(shape: Shape, rank: int, heldout: bool) -> Work:
    """Norms of the weight, the error and what is left of it, on one or two sets of tokens, each by one triangle of the Gram matrix; and
    the spectrum."""
    out, columns = shape
    norms = 3 * (2 if heldout else 1)
    triangle = float(out) * columns * (columns + min(linalg.NORM_PANEL, columns))
    products = norms * triangle + 2.0 * rank * columns**2 + 4.0 * out * columns * rank
    return Work(products=products, streamed=(norms + 6) * 12.0 * out * columns, wide=_EIGEN * rank**3, calls=100)


def gram(columns: int, tokens: int) -> Work:
    """`Σ x xᵀ` over tokens, one triangle of it, by panels."""
    return Work(products=float(tokens) * columns * (columns + min(PANEL, columns)))


def drift(rows: int, columns: int, tokens: int, added: bool) -> Work:
    """`Σ (x° − x) xᵀ` over tokens, `(in, in)` and not symmetric; or, of a layer that is added to a stream, `Σ (t° − t) xᵀ`,
    `(out, in)`, what the layer itself is of it being a product with the Gram matrix; see `cloq.algebra.drift`."""
    own = 2.0 * rows * columns**2 if added else 0.0
    return Work(products=2.0 * tokens * rows * columns + own, streamed=4.0 * tokens * (2 * rows + columns))


def damped_cholesky(columns: int) -> Work:
    return Work(products=_CHOLESKY * columns**3)


def corrected(shape: Shape, chosen: bool) -> Work:
    """`drift.corrected`, once the Gram matrix is factorized: a product and two triangular solves.

    chosen: as `drift.corrected_by_heldout` does it, with a factorization for every damping that is tried, and a step and its norm for
    mixtures of the rows; and one step for all of them.
    """
    out, columns = shape
    if not chosen:
        return Work(products=4.0 * out * columns**2)
    step = Work(products=2.0 * columns**2 + 1.0 * columns**2)  # of one row, and its norm
    mixed = min(out, MIXTURES)
    wanted = Work(products=2 * 2.0 * out * columns**2 + (2 * 2.0 * mixed * out * columns if mixed < out else 0.0))
    return _TRIED * (damped_cholesky(columns) + mixed * step) + out * step + wanted


def apply(shape: Shape, rank: int) -> Work:
    """`Q + B A` into the block."""
    out, columns = shape
    return Work(products=2.0 * out * columns * rank, streamed=40.0 * out * columns)
