"""CLoQ's closed form as cloq computes it against the way of the paper: an eigendecomposition, a root, an SVD, an inverse.

    python scripts/bench_closed_form.py --shapes 576x576 1536x576 576x1536 4096x4096

Gram matrices have the spectrum of activations (energies that fall as a power, a few loud channels), errors are Gaussian. The paper's way
(arXiv:2501.18475, Theorem 3.1) is written out plainly in the given precision, with its damping of the Gram matrix; "error" is what either
leaves, over the optimum where that is known by a float64 solve (up to 2048 inputs).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import cloq

DAMPING = 0.01
EXACT_UP_TO = 2048


def problem(out: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * columns, columns, generator=generator) / torch.arange(1, columns + 1) ** 0.5
    x = x @ (torch.randn(columns, columns, generator=generator) / columns**0.5)
    x[:, torch.randperm(columns, generator=generator)[: columns // 200 + 1]] *= 30
    return torch.randn(out, columns, generator=generator) * 0.01, x.T @ x


def papers_way(error: Tensor, gram: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """`B A` from `R = Σ^{1/2} Uᵀ`, the SVD of `R Eᵀ`, and `R⁻¹`."""
    gram, error = gram.to(dtype), error.to(dtype)
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=dtype)
    values, vectors = torch.linalg.eigh(gram)
    root = values.clamp_min(0).sqrt()
    left, singular, right = torch.linalg.svd((root[:, None] * vectors.T) @ error.T, full_matrices=False)
    return ((vectors / root) @ (left[:, :rank] * singular[:rank]) @ right[:rank]).T.float()


def ours(error: Tensor, gram: Tensor, rank: int) -> Tensor:
    return cloq.closed_form(error, gram, rank).factors.delta()


def remaining(error: Tensor, gram: Tensor, delta: Tensor) -> float:
    left = error.double() - delta.double()
    return float(((left @ gram.double()) * left).sum())


def optimum(error: Tensor, gram: Tensor, rank: int) -> float:
    error, gram = error.double(), gram.double()
    values = torch.linalg.eigvalsh(error @ gram @ error.T)
    return float(values[: len(values) - rank].sum())


def timed(run: Callable[[], Tensor], repeat: int) -> tuple[float, Tensor]:
    seconds = []
    for _ in range(repeat):
        began = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[len(seconds) // 2], found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["576x576", "1536x576", "576x1536"], help="OUTxIN")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3, help="the median of so many")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours(*problem(64, 128, 0), 8)  # the libraries' first use
    print("| out x in | paper's way, float64 s | float32 s | cloq s | times as fast | error: float64 | float32 | cloq |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for shape in args.shapes:
        out, columns = map(int, shape.split("x"))
        error, gram = problem(out, columns, 0)
        best = optimum(error, gram, args.rank) if columns <= EXACT_UP_TO else None
        ways = [
            partial(papers_way, error, gram, args.rank, torch.float64),
            partial(papers_way, error, gram, args.rank, torch.float32),
            partial(ours, error, gram, args.rank),
        ]
        seconds, deltas = zip(*(timed(way, args.repeat if columns <= EXACT_UP_TO else 1) for way in ways), strict=True)
        left = [remaining(error, gram, delta) for delta in deltas]
        errors = " | ".join(f"{value / (best or left[2]):.4f}" for value in left)
        times = " | ".join(f"{value:.3f}" for value in seconds)
        print(f"| {shape} | {times} | {seconds[0] / seconds[2]:.0f} / {seconds[1] / seconds[2]:.0f} | {errors} |", flush=True)


if __name__ == "__main__":
    main()
