"""Does to cloq what can be done to it, again and again, on a tiny model that is made on the spot, and counts how it took it.

    python scripts/torture.py --minutes 6
    python scripts/torture.py --only "kill -9 and continue" --rounds 50 --seed 1

Every trial ends in one of three ways: the right result (the bytes of an undisturbed run), a clear refusal (exit code 2, one message and
no traceback), or something wrong. Wherever the fault goes away again, the run has to go on and end with the same bytes. Prints a table,
and exits with 1 if anything was wrong. A trial is drawn from the seed, its name and its number alone, so a wrong one can be repeated.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked processes have none of their parent's threads
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from faults.bench import Bench, bench
from faults.faults import FAULTS
from faults.fuzz import CASES, batch
from faults.trial import REFUSED, RIGHT, WRONG, Verdict

FUZZ = {f"fuzz: {name}": name for name in CASES}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="go on in rounds until so much time has passed")
    parser.add_argument("--rounds", type=int, default=1, help="trials of each kind, where no time is given")
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--only", action="append", choices=[*FAULTS, *FUZZ], help="only this kind of trial (repeatable)")
    parser.add_argument("--examples", type=int, default=40, help="cases of a fuzzer in a round")
    parser.add_argument("--verbose", type=int, default=1500, help="characters of each complaint")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    _load_everything()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    started = time.monotonic()
    with bench() as made:
        for number in _rounds(args):
            for name in args.only or [*FAULTS, *FUZZ]:
                if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
                    break
                for verdict in _trial(name, made, f"{args.seed}/{name}/{number}", args.examples):
                    counts[name][verdict.kind] += 1
                    if verdict.kind == WRONG:
                        print(f"WRONG: --only {name!r} --first {number} --seed {args.seed}\n{verdict.why[-args.verbose :]}\n", flush=True)
    print(table(counts), f"\n{time.monotonic() - started:.0f} s, seed {args.seed}")
    return 1 if any(count[WRONG] for count in counts.values()) else 0


def _trial(name: str, made: Bench, seed: str, examples: int) -> list[Verdict]:
    return batch(FUZZ[name], made, seed, examples) if name in FUZZ else [FAULTS[name](made, random.Random(seed))]


def _rounds(args: argparse.Namespace) -> Iterator[int]:
    if args.minutes is None:
        yield from range(args.first, args.first + args.rounds)
        return
    number, until = args.first, time.monotonic() + 60 * args.minutes
    while time.monotonic() < until:
        yield number
        number += 1


def _load_everything() -> None:
    """What a command imports is imported once, before processes are forked."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch

    from cloq.models import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)


def table(counts: dict[str, Counter[str]]) -> str:
    """Markdown: what was done, how often, and how it ended."""
    lines = ["| trial | tried | right result | clear refusal | wrong |", "|---|--:|--:|--:|--:|"]
    total: Counter[str] = Counter()
    for name, count in counts.items():
        lines.append(f"| {name} | {count.total()} | {count[RIGHT]} | {count[REFUSED]} | {count[WRONG]} |")
        total += count
    return "\n".join([*lines, f"| all | {total.total()} | {total[RIGHT]} | {total[REFUSED]} | {total[WRONG]} |"])


if __name__ == "__main__":
    sys.exit(main())
