"""`a:0.5,b:0.5`: several sources, each with its share of the sequences."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from cloq.errors import CalibrationError

_WEIGHT = re.compile(r"(.*):\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


class Part(NamedTuple):
    """One source of a mixture. weight: its share of the sequences; those of a mixture sum to 1."""

    source: str
    weight: float


def parse_mixture(source: str) -> list[Part]:
    """A calibration source → its parts; a single source is a mixture of one.

    Parts are separated by commas. A weight is a number after the last colon of a part; other colons belong to the name
    (`owner/name:config`, `C:\\text.txt`). Either every part has a weight or none, which means equal shares; weights are
    normalised. A path that exists is never taken apart, whatever it contains. Raises `CalibrationError` for an empty part, a
    weight that is not positive, a source named twice.
    """
    if os.path.exists(os.path.expanduser(source)):
        return [Part(source, 1.0)]
    parts = [_part(text.strip(), source) for text in source.split(",")]
    if len({weight is None for _, weight in parts}) == 2:
        without = ", ".join(name for name, weight in parts if weight is None)
        raise CalibrationError(f"the mixture {source!r} gives no weight to {without}; give one to every part (a:0.7,b:0.3) or to none")
    names = [os.path.realpath(os.path.expanduser(name)) for name, _ in parts]
    for (name, _), real in zip(parts, names, strict=True):
        if names.count(real) > 1:
            raise CalibrationError(f"the mixture {source!r} names {name} twice; name it once, with the sum of the weights")
    total = sum(1.0 if weight is None else weight for _, weight in parts)
    return [Part(name, (1.0 if weight is None else weight) / total) for name, weight in parts]


def _part(text: str, source: str) -> tuple[str, float | None]:
    found = _WEIGHT.fullmatch(text)
    has_weight = found is not None and not os.path.exists(os.path.expanduser(text))
    name, weight = (found[1].strip(), float(found[2])) if has_weight else (text, None)
    if not name:
        raise CalibrationError(f"the mixture {source!r} has a part without a name; write it as a:0.5,b:0.5")
    if weight is not None and not 0 < weight < float("inf"):
        raise CalibrationError(
            f"the mixture {source!r} gives {name} the weight {found[2]}; weights are above 0. Leave out what has no share"
        )
    return name, weight


def shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` things divided by `weights` (which sum to 1): whole numbers that sum to `total`, each within 1 of its exact share.

    Largest remainder; of equal remainders the first.
    """
    exact = [weight * total for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole
