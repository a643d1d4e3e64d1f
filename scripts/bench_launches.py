"""How many operations a layer's solve is made of, and how often it waits for a value: what a GPU would have to launch. No GPU is needed.

    python scripts/bench_launches.py --inputs 4096 --variant "" --variant "effort=published"

A small operation costs a GPU five to ten microseconds, however many rows the layer has, so the layer here has few. Loops that are
a kernel on a GPU (`cloq.quantizers.columns`) count as one launch each; those of `--single` as the single operations that they are
without it. Views and allocations count nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from unittest import mock

import torch
from bench_layers import settings
from torch.utils._python_dispatch import TorchDispatchMode

from cloq.quantizers import columns
from cloq.specs import layer_spec, run_spec
from cloq.streaming.solve import solve_layer
from cloq.types import LayerStats

KERNELS = ("round", "descend", "fit_grid")
WAITING = "aten::_local_scalar_dense"
NOTHING = frozenset(
    f"aten::{name}"
    for name in (
        "view", "_unsafe_view", "reshape", "as_strided", "slice", "select", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand",
        "diagonal", "unbind", "split", "detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty",
    )
)  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operations by the function of cloq that asked for them. hidden: whether a kernel's plain twin is at work."""

    def __init__(self) -> None:
        super().__init__()
        self.by_place: Counter[str] = Counter()
        self.waits, self.hidden = 0, False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name
        if not self.hidden and name == WAITING:
            self.waits += 1
        elif not self.hidden and name not in NOTHING:
            self.by_place[_place()] += 1
        return operation(*args, **(kwargs or {}))

    def as_one(self, name: str, loop):
        """The loop, which counts as one launch."""

        def counted(*args):
            self.by_place[f"kernel {name}"] += 1
            self.hidden = True
            try:
                return loop(*args)
            finally:
                self.hidden = False

        return counted


def _place() -> str:
    frame = sys._getframe(2)
    while frame and "/cloq/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/cloq/')[2]} {frame.f_code.co_name}" if frame else "elsewhere"


@contextlib.contextmanager
def counting(single: Collection[str]) -> Iterator[Launches]:
    launches = Launches()
    with contextlib.ExitStack() as stack:
        for name in KERNELS:
            if name not in single:
                stack.enter_context(mock.patch.object(columns, f"_{name}", launches.as_one(name, getattr(columns, f"_{name}"))))
        stack.enter_context(launches)
        yield launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=96)
    parser.add_argument("--variant", action="append", help="settings of `cloq quantize` as NAME=VALUE …; repeatable")
    parser.add_argument("--single", nargs="+", default=[], choices=KERNELS, help="loops that are no kernel")
    parser.add_argument("--places", type=int, default=12, help="places to be named")
    args = parser.parse_args()
    torch.manual_seed(0)
    inputs, weight = torch.randn(args.inputs, args.inputs), torch.randn(args.outputs, args.inputs) / args.inputs**0.5
    gram = inputs.T @ inputs
    for variant in args.variant or [""]:
        run = run_spec(**settings(variant))
        with counting(args.single) as launches:
            solve_layer(weight, LayerStats(gram, args.inputs), LayerStats(gram, args.inputs), layer_spec(run, "layer"), run.lora)
        print(f"{variant or 'the defaults'}: {launches.by_place.total():,} launches, {launches.waits} waits")
        for place, count in launches.by_place.most_common(args.places):
            print(f"  {count:8,}  {place}")


if __name__ == "__main__":
    main()
