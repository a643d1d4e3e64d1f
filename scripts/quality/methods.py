"""What is compared: a base and factors on it, by the name that the table has for them."""

from __future__ import annotations

from dataclasses import dataclass

from quality.protocol import OPEN

BITS_16 = 16
_CALIBRATION = frozenset({"calib", "calib_samples", "calib_len", "calib_seed"})


@dataclass(frozen=True)
class Method:
    """base: `dense`, `nf4`, `gptq` (shared by all that name it), `own`, or the library that makes base and factors: `gptqmodel`, `peft`.
    init, settings: of the run that makes the factors. family: methods of one family are variants of each other, not rivals; of nobody
    else's if empty."""

    base: str
    init: str = "zero"
    settings: tuple[tuple[str, object], ...] = ()
    family: str = ""

    def widths(self, bits: list[float]) -> list[float]:
        """Those of the widths at which there is such a method."""
        only = {"dense": BITS_16, "nf4": 4, "peft": 4}.get(self.base)
        if only is None:
            return bits
        return [only] if only == BITS_16 or only in bits else []

    @property
    def moved_by(self) -> frozenset[str]:
        """Settings that change what this method starts from; a sweep of others leaves it the same cell."""
        if self.base in ("dense", "nf4", "peft"):
            return frozenset({"rank"})
        if self.init == "loftq":  # it sees weights alone, and so does its quantizer
            return frozenset({"rank", "group_size"})
        if self.base == "gptqmodel":
            return _CALIBRATION | {"rank", "group_size"}
        fitted_to_data = self.base == "own" or self.init in ("cloq", "eora", "qera")
        moved = _CALIBRATION | {"rank", "group_size", "sequential"} | ({"propagate"} if fitted_to_data else set())
        return moved.union(OPEN) if self.base == "own" and "effort" not in dict(self.settings) else moved


METHODS = {
    "lora-16": Method("dense"),
    "qlora-nf4": Method("nf4"),
    "zero": Method("gptq", "zero"),
    "svd": Method("gptq", "svd"),
    "qera": Method("gptq", "qera"),
    "eora": Method("gptq", "eora"),
    "cloq": Method("gptq", "cloq", (("split", "paper"),), family="cloq"),
    "cloq-balanced": Method("gptq", "cloq", (("split", "balanced"),), family="cloq"),
    "loftq": Method("own", "loftq", (("quantizer", "rtn"),)),
    "cloq-paper": Method("own", "cloq", (("effort", "published"),), family="cloq"),
    "cloq-rounds": Method("own", "cloq", (("correction", 0.0),), family="cloq"),
    "cloq-best": Method("own", "cloq", (("effort", "best"),), family="cloq"),
    "cloq-run": Method("own", "cloq", family="cloq"),
    "gptqmodel-eora": Method("gptqmodel", "eora"),
    "peft-loftq": Method("peft", "loftq"),
}
"""Methods on the shared base are as published, but for `cloq-balanced`: no layer makes up for those before it. `loftq` alternates on
round-to-nearest, as published, with scales searched like everybody's. `cloq-run` is what `cloq quantize` makes. The last two are other
libraries' own work from the 16-bit model to the factors; see `rivals`."""

OWN = [name for name, method in METHODS.items() if method.base not in ("gptqmodel", "peft")]
"""What is run if no method is named: nothing that needs another library's quantizer."""


def are_rivals(one: str, other: str) -> bool:
    """Whether one is to be measured against the other: neither itself, nor of its family, nor the 16-bit model."""
    mine, theirs = METHODS[one], METHODS[other]
    return one != other and theirs.base != "dense" and not (mine.family and mine.family == theirs.family)
